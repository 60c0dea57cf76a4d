"""What has come to the sources of a finished cache since it was made: images, lines, prompts, evaluation sets."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...cache.disk.layout import Layout
from ...cache.disk.row_tables import IMAGE_COLUMNS, SENTENCE_COLUMNS, RowTable, write_rows
from ...cache.errors import CacheError
from ...cache.version.plan_file import read_plan
from ...cache.version.schema import Inputs, Plan, PromptList, SentenceList, SentenceSource
from ...stages.inputs.image_source import FoundImage, list_notes
from ...stages.inputs.prompts import prompt_lines
from ...stages.inputs.sentences import read_sentences
from ...stages.settings.data import SentencesSettings
from ..progress import say
from ..stage_one.inputs import (
    PROMPTS,
    LineCount,
    image_rows,
    list_document,
    list_evaluate_set,
    prompt_row,
    prompts_document,
    sentence_row,
)
from ..stage_one.source_changes import require_planned_classes
from ..stage_one.sources import Sources


@dataclass(frozen=True)
class Lines:
    """New lines at the end of a sentences file: those from `first` to before `stop`."""

    path: Path
    first: int
    stop: int


@dataclass(frozen=True)
class Growth:
    """New rows of a cache, in the order in which they join it.

    Attributes:
        inputs: `inputs` of the next plan, without the new evaluation sets.
        num_images: how many images are new.
        num_sentences: how many sentences are new, prompts among them.
        images: new images, in the order of their source.
        lines: new lines of each sentences file; they follow all sentences of the cache, prompts too.
        prompts: new prompts; they follow the new lines.
        evaluate: new evaluation sets.
    """

    inputs: Inputs
    num_images: int
    num_sentences: int
    images: list[FoundImage] = field(default_factory=list)
    lines: list[Lines] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.num_images or self.num_sentences or self.evaluate)

    def line(self) -> str:
        """A line that says what is new."""
        sets = "".join(f", evaluate.{name}" for name in self.evaluate)
        return f"new: {self.num_images:,} images, {self.num_sentences:,} sentences{sets}"


def find_growth(sources: Sources, layout: Layout, plan: Plan) -> Growth:
    """Compare the sources with the plan in force. Reads the sources, writes nothing.

    Raises:
        CacheError: if rows of the cache have changed: other lines than it has, another folder of images, prompts that
            are gone, other classes of an evaluation set.
        InputError: if a source is missing.
    """
    if plan.rows_of:
        return _shared_growth(sources, layout, plan, plan.rows_of)
    frozen, evaluate = plan.inputs, sources.evaluate
    for name in sorted(set(evaluate) & set(frozen.evaluate)):
        require_planned_classes(layout, plan, name, evaluate[name].settings)
    listed = RowTable(layout.image_rows, frozen.images.rows).column("source").to_pylist()
    known = set(listed)
    found = sources.images.list()
    for note in list_notes(found, "images.source"):
        say(note)
    if known.isdisjoint(image.source for image in found):
        raise CacheError(
            f"images.source: {sources.images.location}: holds none of the {len(known):,} images of {layout.root}; "
            "append adds to a folder: is it another one?"
        )
    images = [image for image in found if image.source not in known]
    files, lines = _new_lines(sources.sentences, layout, frozen.sentences.sources)
    prompts, all_prompts = _new_prompts(sources.sentences, layout, frozen.sentences)
    num_sentences = sum(item.stop - item.first for item in lines) + len(prompts)
    sentences = SentenceList(rows=frozen.sentences.rows + num_sentences, sources=files, prompts=all_prompts)
    inputs = frozen.replace(sentences=sentences)
    if images:
        inputs = inputs.replace(images=list_document(chain(listed, (image.source for image in images))))
    new_sets = sorted(evaluate.keys() - frozen.evaluate.keys())
    return Growth(inputs, len(images), num_sentences, images, lines, prompts, new_sets)


def stage_growth(sources: Sources, layout: Layout, plan: Plan, growth: Growth) -> Inputs:
    """Write the row tables of the next version into `next/`: the rows of the cache, then the new ones.

    Returns:
        The `inputs` of its plan.
    """
    if plan.rows_of:
        return growth.inputs
    frozen, following, shard_rows = plan.inputs, layout.next, plan.shard_rows
    if growth.num_images:
        there = RowTable(layout.image_rows, frozen.images.rows).records()
        new = image_rows(sources.images, growth.images, sources.hash_images)
        write_rows(following.image_rows, IMAGE_COLUMNS, chain(there, new), shard_rows)
    if growth.num_sentences:
        there = RowTable(layout.sentence_rows, frozen.sentences.rows).records()
        write_rows(following.sentence_rows, SENTENCE_COLUMNS, chain(there, _sentence_rows(growth)), shard_rows)
    evaluate = {name: list_evaluate_set(sources, following, name, shard_rows) for name in growth.evaluate}
    return growth.inputs.replace(evaluate={**frozen.evaluate, **evaluate})


def _sentence_rows(growth: Growth) -> Iterator[dict[str, Any]]:
    for item in growth.lines:
        yield from map(sentence_row, islice(read_sentences([item.path]), item.first, item.stop))
    yield from map(prompt_row, growth.prompts)


def _new_lines(
    settings: SentencesSettings, layout: Layout, frozen: list[SentenceSource]
) -> tuple[list[SentenceSource], list[Lines]]:
    """`sources` of the next plan, and what is new in each file. The files of the cache come first, in their order."""
    files, lines = [], []
    if len(settings.source) < len(frozen):
        raise CacheError(
            f"sentences.source: {len(settings.source)} files, {layout.root} was made from {len(frozen)} "
            f"({', '.join(item.name for item in frozen)}); put them back in front of new ones"
        )
    for i, path in enumerate(settings.source):
        held = frozen[i] if i < len(frozen) else LineCount(path).document()
        now = LineCount(path, held.rows).read_all()
        if (path.name, now.digest_upto) != (held.name, held.digest):
            raise CacheError(
                f"{path}: does not begin with the {held.rows:,} lines of {held.name} that {layout.root} has; "
                "append takes new lines at the end of a file, or new files after the others"
            )
        files.append(now.document())
        lines.append(Lines(path, held.rows, now.rows))
    return files, lines


def _new_prompts(
    settings: SentencesSettings, layout: Layout, frozen: SentenceList
) -> tuple[list[str], PromptList | None]:
    """Prompts that no row has yet, and what the next plan says of all prompts."""
    now = prompt_lines(settings.prompts) if settings.prompts else []
    document = prompts_document(now) if now else None
    if document == frozen.prompts:
        return [], document
    table = RowTable(layout.sentence_rows, frozen.rows)
    rows = zip(table.column("text").to_pylist(), table.column("origin").to_pylist(), strict=True)
    held = Counter(text for text, origin in rows if origin == PROMPTS)
    if gone := held - Counter(now):
        raise CacheError(
            f"sentences.prompts: no longer makes {next(iter(gone))!r}, which is a row of {layout.root}; "
            "append only adds: put the classes and templates back, or choose another cache.dir"
        )
    new = []
    for prompt in now:
        if held[prompt]:
            held[prompt] -= 1
        else:
            new.append(prompt)
    return new, document


def _shared_growth(sources: Sources, layout: Layout, plan: Plan, rows_of: str) -> Growth:
    """New rows of the cache whose row tables this one shares; that one takes in new sources first."""
    other = Layout(layout.root / rows_of)
    theirs, held = read_plan(other), plan.inputs
    if theirs is None:
        raise CacheError(f"{other.root}: no teacher cache; {layout.root} shares its row tables: put it back")
    num_held = held.images.rows
    if list_document(RowTable(layout.image_rows, num_held).column("source").to_pylist()) != held.images:
        raise CacheError(f"{layout.image_rows}: its first {num_held:,} rows are not those of {layout.root}")
    inputs = theirs.inputs
    names = sorted((set(sources.evaluate) | set(held.evaluate)) & set(inputs.evaluate))
    return Growth(
        inputs.replace(evaluate={name: inputs.evaluate[name] for name in names}),
        inputs.images.rows - num_held,
        inputs.sentences.rows - held.sentences.rows,
        evaluate=sorted(set(names) - held.evaluate.keys()),
    )
