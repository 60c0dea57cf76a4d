"""What goes into a cache: listed once into row tables, then compared with what a later run is given."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from ..cache.durable import digest
from ..cache.errors import CacheError, InputError
from ..cache.layout import Layout
from ..cache.plan import require_same
from ..cache.rows import FAILED, IMAGE_COLUMNS, LABELLED_COLUMNS, OK, SENTENCE_COLUMNS, RowTable, write_rows
from ..stages.images import FoundImage, find_images, find_labelled_images
from ..stages.prompts import class_prompts, read_classes, read_templates
from ..stages.sentences import read_sentences
from ..stages.settings import EvaluateSettings, PromptSettings
from .config import Config

PROMPTS = "prompts"


def freeze_inputs(config: Config, layout: Layout) -> dict[str, Any]:
    """List images, sentences and evaluation sets into the row tables.

    Returns:
        The `inputs` of plan.json: counts and digests of every list.

    Raises:
        InputError: if a source is missing or empty.
    """
    shard_rows = config.cache.shard_rows
    images = find_images(config.images.source)
    if not images:
        raise InputError(f"images.source: {config.images.source}: no .jpg, .jpeg, .png or .webp file below it")
    write_rows(layout.image_rows, IMAGE_COLUMNS, map(_image_row, images), shard_rows)
    sentences = _SentenceRows(config)
    num_sentences = write_rows(layout.sentence_rows, SENTENCE_COLUMNS, sentences.rows(), shard_rows)
    if sentences.num_good == 0:
        names = ", ".join(str(path) for path in config.sentences.source)
        raise InputError(f"sentences.source: {names}: no usable sentence in {num_sentences} lines")
    evaluate = {}
    for name, settings in config.evaluate.items():
        classes = read_classes(settings.classes)
        found = find_labelled_images(settings.images, sorted(classes))
        if not found:
            raise InputError(f"evaluate.{name}.images: {settings.images}: no image in a folder named after a class id")
        write_rows(layout.evaluate_rows(name), LABELLED_COLUMNS, map(_labelled_row, found), shard_rows)
        evaluate[name] = {**_classes_document(settings), **_list_document(found)}
    return {
        "images": _list_document(images),
        "sentences": {"rows": num_sentences, "sources": sentences.sources, "prompts": sentences.prompts},
        "evaluate": evaluate,
    }


def compare_inputs(config: Config, layout: Layout, frozen: dict[str, Any]) -> list[str]:
    """Hold what a run is given against the lists that were frozen.

    Returns:
        Lines to show: what has appeared or gone since, and sources that are not at hand.

    Raises:
        CacheError: naming the key, if the run asks for other sentences, prompts, classes or evaluation sets.
    """
    notes: list[str] = []
    _compare_images(config.images.source, layout.image_rows, "images.source", notes)
    try:
        _compare_sentences(config, layout, frozen["sentences"], notes)
    except InputError as error:
        notes.append(f"sentences.source: not compared: {error}")
    for name, settings in config.evaluate.items():
        if name not in frozen["evaluate"]:
            raise CacheError(
                f"{layout.root}: evaluate.{name} is not in this cache; choose another cache.dir or leave it out"
            )
        try:
            document = _classes_document(settings)
            there = {key: frozen["evaluate"][name][key] for key in document}
            require_same(layout.root, {"evaluate": {name: there}}, {"evaluate": {name: document}})
        except InputError as error:
            notes.append(f"evaluate.{name}: not compared: {error}")
        _compare_images(settings.images, layout.evaluate_rows(name), f"evaluate.{name}.images", notes)
    return notes


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


def _image_row(image: FoundImage) -> dict[str, Any]:
    status = {"status": FAILED, "reason": image.problem} if image.problem else {"status": OK}
    return {"source": image.source, "bytes": image.bytes, "modified_ns": image.modified_ns, **status}


def _labelled_row(image: FoundImage) -> dict[str, Any]:
    return {**_image_row(image), "class_id": image.source.split("/", 1)[0]}


def _list_document(images: Sequence[FoundImage]) -> dict[str, Any]:
    names = xxhash.xxh3_128()
    for image in images:
        names.update(image.source.encode() + b"\0")
    return {"rows": len(images), "digest": names.hexdigest()}


def _classes_document(settings: EvaluateSettings) -> dict[str, Any]:
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
                status = {"status": FAILED, "reason": sentence.problem} if sentence.problem else {"status": OK}
                yield {"text": sentence.text, "origin": sentence.origin, **status}
            self.sources.append({"name": path.name, "rows": lines, "digest": seen.hexdigest()})
        if self._settings.prompts:
            prompts = prompt_lines(self._settings.prompts)
            self.prompts = _prompts_document(prompts)
            self.num_good += len(prompts)
            yield from ({"text": prompt, "origin": PROMPTS, "status": OK} for prompt in prompts)


def _prompts_document(prompts: list[str]) -> dict[str, Any]:
    return {"rows": len(prompts), "digest": digest(*(prompt.encode() + b"\n" for prompt in prompts))}


def _compare_sentences(config: Config, layout: Layout, frozen: dict[str, Any], notes: list[str]) -> None:
    sources = []
    for path, there in zip(config.sentences.source, frozen["sources"], strict=False):
        lines, seen, at_frozen_length = 0, xxhash.xxh3_128(), ""
        for sentence in read_sentences([path]):
            lines += 1
            seen.update(sentence.text.encode() + b"\n")
            if lines == there["rows"]:
                at_frozen_length = seen.hexdigest()
        if lines > there["rows"]:
            notes.append(f"{path}: {lines - there['rows']:,} lines have appeared since; this cache does not hold them")
        found = at_frozen_length or seen.hexdigest()
        sources.append({"name": path.name, "rows": min(lines, there["rows"]), "digest": found})
    sources += [{"name": path.name} for path in config.sentences.source[len(frozen["sources"]) :]]
    prompts = _prompts_document(prompt_lines(config.sentences.prompts)) if config.sentences.prompts else None
    require_same(
        layout.root,
        {"sentences": {"source": frozen["sources"], "prompts": frozen["prompts"]}},
        {"sentences": {"source": sources, "prompts": prompts}},
    )


def _compare_images(folder: Path, table: Path, key: str, notes: list[str]) -> None:
    if not folder.is_dir():
        notes.append(f"{key}: {folder} is not at hand")
        return
    frozen = set(RowTable(table).column("source").to_pylist())
    now = {image.source for image in find_images(folder)}
    if not now & frozen:
        raise CacheError(
            f"{key}: {folder}: holds none of the {len(frozen):,} images of this cache; is it another folder?"
        )
    if now - frozen:
        notes.append(f"{key}: {len(now - frozen):,} images have appeared since; this cache does not hold them")
    if frozen - now:
        notes.append(f"{key}: {len(frozen - now):,} images of this cache are gone from {folder}")
