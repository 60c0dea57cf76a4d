"""What goes into a cache: images, sentences and labelled sets, listed once into row tables."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ...cache.disk.durable import digest
from ...cache.disk.layout import Layout
from ...cache.disk.row_tables import FAILED, IMAGE_COLUMNS, LABELLED_COLUMNS, OK, SENTENCE_COLUMNS, write_rows
from ...cache.errors import InputError
from ...cache.version.manifest import read_manifest
from ...cache.version.schema import ImageList, Inputs, LabelledList, PromptList, SentenceList, SentenceSource
from ...stages.inputs.image_source import (
    FoundImage,
    ImageSource,
    LabelledImage,
    image_digests,
    keys_of,
    label_images,
    list_notes,
)
from ...stages.inputs.prompts import class_names, class_prompts, prompt_lines, read_classes
from ...stages.inputs.sentences import Sentence, read_sentences
from ...stages.settings.data import EvaluateSettings, SentencesSettings
from ..progress import say
from .sources import Sources

PROMPTS = "prompts"


def list_inputs(sources: Sources, layout: Layout, shard_rows: int) -> Inputs:
    """List images, sentences and labelled sets into the row tables.

    Raises:
        InputError: if a source is missing or empty.
    """
    images = sources.images.list()
    for note in list_notes(images, "images.source"):
        say(note)
    rows = image_rows(sources.images, images, sources.hash_images)
    write_rows(layout.image_rows, IMAGE_COLUMNS, rows, shard_rows)
    return Inputs(
        images=list_document(image.source for image in images),
        sentences=_list_sentences(sources.sentences, layout, shard_rows),
        evaluate={name: list_evaluate_set(sources, layout, name, shard_rows) for name in sources.evaluate},
    )


def list_evaluate_set(sources: Sources, layout: Layout, name: str, shard_rows: int) -> LabelledList:
    """List one labelled set into its row table.

    Raises:
        InputError: if its images or its classes are missing or do not fit.
    """
    images, settings = sources.evaluate[name].images, sources.evaluate[name].settings
    found = label_images(images, read_classes(settings.classes))
    for note in list_notes(found, f"evaluate.{name}.images"):
        say(note)
    rows = labelled_rows(images, found, sources.hash_images)
    write_rows(layout.evaluate_rows(name), LABELLED_COLUMNS, rows, shard_rows)
    counted = list_document(image.source for image in found)
    return LabelledList(**classes_document(settings), rows=counted.rows, digest=counted.digest)


def image_rows(source: ImageSource, images: Sequence[FoundImage], hashed: bool) -> Iterator[dict[str, Any]]:
    """Rows of an image table, without their numbers.

    Args:
        hashed: whether each image's checksum joins its row.
    """
    digests: Iterator[str | None] | None = None
    if hashed:
        good = [image for image in images if not image.problem]  # reading a pipe would wait for ever
        keys = keys_of(source, {name: [getattr(image, name) for image in good] for name in source.columns})
        digests = image_digests(source, keys)
    for image in images:
        row: dict[str, Any] = {"source": image.source, "bytes": image.bytes, "modified_ns": image.modified_ns}
        row["digest"] = next(digests) if digests and not image.problem else None
        yield row | _status(image.problem)


def labelled_rows(source: ImageSource, images: Sequence[LabelledImage], hashed: bool) -> Iterator[dict[str, Any]]:
    """The same of a labelled set: with each image's class."""
    for image, row in zip(images, image_rows(source, images, hashed), strict=True):
        yield {**row, "class_id": image.class_id}


def sentence_row(sentence: Sentence) -> dict[str, Any]:
    """A line's row in the sentence table, without its number."""
    return {"text": sentence.text, "origin": sentence.origin, **_status(sentence.problem)}


def prompt_row(prompt: str) -> dict[str, Any]:
    """A prompt's row in the sentence table, without its number."""
    return {"text": prompt, "origin": PROMPTS, "status": OK}


def _status(problem: str | None) -> dict[str, str]:
    return {"status": FAILED, "reason": problem} if problem else {"status": OK}


def list_document(sources: Iterable[str]) -> ImageList:
    """What plan.json says of a list of images: how many, and a digest of their names in the order of their rows."""
    num_rows, names = 0, xxhash.xxh3_128()
    for source in sources:
        num_rows += 1
        names.update(source.encode() + b"\0")
    return ImageList(rows=num_rows, digest=names.hexdigest())


@dataclass
class LineCount:
    """Lines of a file that have been read so far, and their digest.

    Attributes:
        upto: a number of lines.
        digest_upto: the digest of the first `upto` lines; None where there are fewer.
        num_good: lines that can be embedded.
    """

    path: Path
    upto: int = 0
    rows: int = 0
    num_good: int = 0
    digest_upto: str | None = None

    def __post_init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self._note()

    def read(self) -> Iterator[Sentence]:
        """Every line of the file, counted as it passes."""
        for sentence in read_sentences([self.path]):
            self.rows += 1
            self.num_good += sentence.problem is None
            self._state.update(sentence.text.encode() + b"\n")
            self._note()
            yield sentence

    def read_all(self) -> "LineCount":
        """Read the file to its end."""
        for _ in self.read():
            pass
        return self

    def document(self) -> SentenceSource:
        """What plan.json says of the file."""
        return SentenceSource(name=self.path.name, rows=self.rows, digest=self._state.hexdigest())

    def _note(self) -> None:
        if self.rows == self.upto:
            self.digest_upto = self._state.hexdigest()


def _list_sentences(settings: SentencesSettings, layout: Layout, shard_rows: int) -> SentenceList:
    files = [LineCount(path) for path in settings.source]
    prompts = prompt_lines(settings.prompts) if settings.prompts else []

    def rows() -> Iterator[dict[str, Any]]:
        for file in files:
            yield from map(sentence_row, file.read())
        yield from map(prompt_row, prompts)

    num_rows = write_rows(layout.sentence_rows, SENTENCE_COLUMNS, rows(), shard_rows)
    if not prompts and not any(file.num_good for file in files):
        names = ", ".join(str(path) for path in settings.source)
        raise InputError(f"sentences.source: {names}: no usable sentence in {num_rows} lines")
    documents = [file.document() for file in files]
    return SentenceList(
        rows=num_rows, sources=documents, prompts=prompts_document(prompts) if settings.prompts else None
    )


def prompts_document(prompts: Collection[str]) -> PromptList:
    """What plan.json says of the prompts among the sentences."""
    return PromptList(rows=len(prompts), digest=digest(*(prompt.encode() + b"\n" for prompt in prompts)))


def classes_document(settings: EvaluateSettings) -> dict[str, Any]:
    """What plan.json says of the classes of a set: ids, names, and a digest of their prompts."""
    names = class_names(settings)
    prompts = [prompt for of_class in class_prompts(settings) for prompt in of_class]
    return {
        "class_ids": list(names),
        "class_names": list(names.values()),
        "prompts": digest(*(prompt.encode() + b"\0" for prompt in prompts)),
    }


def transductive_sets(sources: Sources) -> list[str]:
    """Labelled sets with a class name that the training prompts used too."""
    prompts = sources.sentences.prompts
    if not prompts:
        return []
    trained = {name for names in class_names(prompts).values() for name in names}
    return [
        name
        for name, labelled in sorted(sources.evaluate.items())
        if any(trained.intersection(names) for names in class_names(labelled.settings).values())
    ]


def transductive_sets_or_recorded(sources: Sources, layout: Layout) -> list[str]:
    """As `transductive_sets`; what the manifest says where the class files are no longer at hand."""
    try:
        return transductive_sets(sources)
    except InputError:
        manifest = read_manifest(layout)
        if manifest is None:
            raise
        return manifest.transductive
