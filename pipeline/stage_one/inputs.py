"""What goes into a cache: listed once into row tables, then compared with what a later run is given."""

from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from ...cache.disk.durable import digest
from ...cache.disk.layout import Layout
from ...cache.disk.row_tables import FAILED, IMAGE_COLUMNS, LABELLED_COLUMNS, OK, SENTENCE_COLUMNS, RowTable, write_rows
from ...cache.errors import CacheError, InputError
from ...cache.version.manifest import read_manifest
from ...cache.version.plan_file import require_same
from ...stages.inputs.image_source import ImageSource, label_images
from ...stages.inputs.open_source import open_source
from ...stages.inputs.prompts import class_prompts, read_classes, read_templates
from ...stages.inputs.sentences import Sentence, read_sentences
from ...stages.settings.data import EvaluateSettings, PromptSettings
from ..config.load import Config
from .source_changes import compare_images, compare_sentences, image_rows, labelled_rows

PROMPTS = "prompts"


def freeze_inputs(config: Config, layout: Layout) -> dict[str, Any]:
    """List images, sentences and evaluation sets into the row tables.

    Returns:
        The `inputs` of plan.json: counts and digests of every list.

    Raises:
        InputError: if a source is missing or empty.
    """
    shard_rows = config.cache.shard_rows
    source = open_source(config.images.source)
    images = source.list()
    write_rows(layout.image_rows, IMAGE_COLUMNS, image_rows(source, images, config.images.hash), shard_rows)
    sentences = _SentenceRows(config)
    num_sentences = write_rows(layout.sentence_rows, SENTENCE_COLUMNS, sentences.rows(), shard_rows)
    if sentences.num_good == 0:
        names = ", ".join(str(path) for path in config.sentences.source)
        raise InputError(f"sentences.source: {names}: no usable sentence in {num_sentences} lines")
    return {
        "images": list_document(image.source for image in images),
        "sentences": {"rows": num_sentences, "sources": sentences.sources, "prompts": sentences.prompts},
        "evaluate": {name: freeze_evaluate_set(config, layout, name) for name in config.evaluate},
    }


def freeze_evaluate_set(config: Config, layout: Layout, name: str) -> dict[str, Any]:
    """List one evaluation set into its row table; returns what plan.json says of it.

    Raises:
        InputError: if its images or its classes are missing or do not fit.
    """
    settings = config.evaluate[name]
    source = open_source(settings.images)
    found = label_images(source, read_classes(settings.classes))
    rows = labelled_rows(source, found, config.images.hash)
    write_rows(layout.evaluate_rows(name), LABELLED_COLUMNS, rows, config.cache.shard_rows)
    return {**classes_document(settings), **list_document(image.source for image in found)}


def compare_inputs(config: Config, layout: Layout, plan: dict[str, Any], *, report: bool = False) -> list[str]:
    """Hold what a run is given against the lists that were frozen.

    Args:
        report: say what has become of lines of sentences, rather than refuse a run that has other ones.

    Returns:
        Lines to show: what has appeared or gone since, and sources that are not at hand.

    Raises:
        CacheError: naming the key, if the run asks for other sentences, prompts, classes or evaluation sets.
    """
    frozen = plan["inputs"]
    notes: list[str] = []
    rows = RowTable(layout.find(layout.image_rows), frozen["images"]["rows"])
    _compare_images(open_source(config.images.source), rows, "images.source", notes, report)
    try:
        _compare_sentences(config, layout, plan, notes, report)
    except InputError as error:
        notes.append(f"sentences.source: not compared: {error}")
    for name, settings in config.evaluate.items():
        if name not in frozen["evaluate"]:
            raise CacheError(
                f"{layout.root}: evaluate.{name} is not in this cache; choose another cache.dir or leave it out"
            )
        try:
            require_same_classes(layout, frozen, name, settings)
        except InputError as error:
            notes.append(f"evaluate.{name}: not compared: {error}")
        rows = RowTable(layout.find(layout.evaluate_rows(name)), frozen["evaluate"][name]["rows"])
        _compare_images(open_source(settings.images), rows, f"evaluate.{name}.images", notes, report)
    return notes


def require_same_classes(layout: Layout, frozen: dict[str, Any], name: str, settings: EvaluateSettings) -> None:
    """Refuse other classes or prompts of an evaluation set than the cache was made with.

    Raises:
        CacheError: naming the key that differs.
        InputError: if the classes or templates are not at hand.
    """
    document = classes_document(settings)
    there = {key: frozen["evaluate"][name][key] for key in document}
    require_same(layout.root, {"evaluate": {name: there}}, {"evaluate": {name: document}})


def transductive_sets(config: Config) -> list[str]:
    """Evaluation sets with a class name that the training prompts used too."""
    prompts = config.sentences.prompts
    if not prompts:
        return []
    trained = {name for names in read_classes(prompts.classes).values() for name in _used(names, prompts)}
    return [
        name
        for name, settings in sorted(config.evaluate.items())
        if any(trained.intersection(_used(names, settings)) for names in read_classes(settings.classes).values())
    ]


def evaluate_prompts(settings: EvaluateSettings) -> list[list[str]]:
    """Prompts of each class of a set, in the order of the sorted class ids."""
    templates = read_templates(settings.templates)
    return [prompts for _, prompts in class_prompts(read_classes(settings.classes), templates, settings.names)]


def _used(names: list[str], settings: PromptSettings | EvaluateSettings) -> list[str]:
    return names if settings.names == "all" else names[:1]


def list_document(sources: Iterable[str]) -> dict[str, Any]:
    """What plan.json says of a list of images: how many, and a digest of their names in the order of their rows."""
    num_rows, names = 0, xxhash.xxh3_128()
    for source in sources:
        num_rows += 1
        names.update(source.encode() + b"\0")
    return {"rows": num_rows, "digest": names.hexdigest()}


def classes_document(settings: EvaluateSettings) -> dict[str, Any]:
    """What plan.json says of the classes of a set: ids, names, and a digest of their prompts."""
    classes = read_classes(settings.classes)
    prompts = evaluate_prompts(settings)
    return {
        "class_ids": sorted(classes),
        "class_names": [_used(classes[class_id], settings) for class_id in sorted(classes)],
        "prompts": digest(*(prompt.encode() + b"\0" for of_class in prompts for prompt in of_class)),
    }


def prompt_lines(settings: PromptSettings) -> list[str]:
    """Class names through templates, as they join the sentences."""
    templates = read_templates(settings.templates)
    prompts = class_prompts(read_classes(settings.classes), templates, settings.names)
    return [prompt for _, of_class in prompts for prompt in of_class]


class _SentenceRows:
    """Rows of the sentence table, and digests of what they came from, in one pass."""

    def __init__(self, config: Config) -> None:
        self._settings = config.sentences
        self.sources: list[dict[str, Any]] = []
        self.prompts: dict[str, Any] | None = None
        self.num_good = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        for path in self._settings.source:
            lines, seen = 0, xxhash.xxh3_128()
            for sentence in read_sentences([path]):
                lines += 1
                seen.update(sentence.text.encode() + b"\n")
                self.num_good += sentence.problem is None
                yield sentence_row(sentence)
            self.sources.append({"name": path.name, "rows": lines, "digest": seen.hexdigest()})
        if self._settings.prompts:
            prompts = prompt_lines(self._settings.prompts)
            self.prompts = prompts_document(prompts)
            self.num_good += len(prompts)
            yield from map(prompt_row, prompts)


def sentence_row(sentence: Sentence) -> dict[str, Any]:
    """A line's row in the sentence table, without its number."""
    status = {"status": FAILED, "reason": sentence.problem} if sentence.problem else {"status": OK}
    return {"text": sentence.text, "origin": sentence.origin, **status}


def prompt_row(prompt: str) -> dict[str, Any]:
    """A prompt's row in the sentence table, without its number."""
    return {"text": prompt, "origin": PROMPTS, "status": OK}


def prompts_document(prompts: list[str]) -> dict[str, Any]:
    return {"rows": len(prompts), "digest": digest(*(prompt.encode() + b"\n" for prompt in prompts))}


def _compare_sentences(config: Config, layout: Layout, plan: dict[str, Any], notes: list[str], report: bool) -> None:
    frozen, paths = plan["inputs"]["sentences"], config.sentences.source
    names = {"sentences": {"source": [there["name"] for there in frozen["sources"]]}}
    require_same(layout.root, names, {"sentences": {"source": [path.name for path in paths]}})
    same, grown = True, []
    for path, there in zip(paths, frozen["sources"], strict=True):
        lines, seen = 0, xxhash.xxh3_128()
        at_frozen_length = seen.hexdigest()
        for sentence in read_sentences([path]):
            lines += 1
            seen.update(sentence.text.encode() + b"\n")
            if lines == there["rows"]:
                at_frozen_length = seen.hexdigest()
        same &= lines >= there["rows"] and at_frozen_length == there["digest"]
        if lines > there["rows"]:
            grown.append(f"{path}: {lines - there['rows']:,} lines have appeared since; this cache does not hold them")
    if not same:
        table = RowTable(layout.find(layout.sentence_rows), frozen["rows"])
        grown = [f"sentences.source: {note}" for note in compare_sentences(paths, plan, table).notes]
    if not same and not report:
        raise CacheError(
            f"{layout.root}: made from other lines: {'; '.join(grown)}; put them back, choose another "
            "cache.dir or delete that one"
        )
    notes += grown
    prompts = prompts_document(prompt_lines(config.sentences.prompts)) if config.sentences.prompts else None
    require_same(layout.root, {"sentences": {"prompts": frozen["prompts"]}}, {"sentences": {"prompts": prompts}})


def _compare_images(source: ImageSource, table: RowTable, key: str, notes: list[str], report: bool) -> None:
    if not source.at_hand():
        notes.append(f"{key}: {source.location} is not at hand")
        return
    try:
        notes.extend(compare_images(source, table).notes(key))
    except InputError as error:  # it cannot be listed, or has no image
        if not report:
            raise
        notes.append(f"{key}: not compared: {error}")


def transductive_sets_or_recorded(config: Config, layout: Layout) -> list[str]:
    """Evaluation sets that the prompts touch; as recorded before, where the class files are no longer at hand."""
    try:
        return transductive_sets(config)
    except InputError:
        manifest = read_manifest(layout)
        if manifest is None:
            raise
        return list(manifest["transductive"])
