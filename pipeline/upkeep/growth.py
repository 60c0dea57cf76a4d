"""What a finished cache would take in: images, lines and evaluation sets that have come since it was made."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import xxhash

from ...cache.disk.layout import Layout
from ...cache.disk.row_tables import IMAGE_COLUMNS, SENTENCE_COLUMNS, RowTable, write_rows
from ...cache.errors import CacheError
from ...cache.version.plan_file import read_plan
from ...stages.inputs.image_source import FoundImage
from ...stages.inputs.open_source import open_source
from ...stages.inputs.sentences import read_sentences
from ..config.load import Config
from ..stage_one.inputs import (
    PROMPTS,
    freeze_evaluate_set,
    list_document,
    prompt_lines,
    prompt_row,
    prompts_document,
    require_same_classes,
    sentence_row,
)
from ..stage_one.source_changes import image_rows


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
        inputs: `inputs` of the next plan, but for evaluation sets that it does not list yet.
        images: new files, sorted by the bytes of their paths.
        lines: new lines of each sentences file; they follow everything that is there, prompts too.
        prompts: new prompts; they follow the new lines.
        evaluate: new evaluation sets.
        num_rows: how many images and sentences are new.
    """

    inputs: dict[str, Any]
    images: list[FoundImage]
    lines: list[Lines]
    prompts: list[str]
    evaluate: list[str]
    num_rows: dict[str, int]

    def __bool__(self) -> bool:
        return any(self.num_rows.values()) or bool(self.evaluate)

    def line(self) -> str:
        """One line for the person who asked for it."""
        sets = "".join(f", evaluate.{name}" for name in self.evaluate)
        return f"new: {self.num_rows['images']:,} images, {self.num_rows['sentences']:,} sentences{sets}"


def find_growth(config: Config, layout: Layout, plan: dict[str, Any]) -> Growth:
    """Hold the sources against the plan in force. Reads the sources, writes nothing.

    Raises:
        CacheError: if what is in the cache has changed: other lines where it has its own, another folder of images,
            prompts that are gone, other classes of an evaluation set.
        InputError: if a source is missing.
    """
    if "rows_of" in plan:
        return _shared_growth(config, layout, plan)
    frozen = plan["inputs"]
    for name in sorted(set(config.evaluate) & set(frozen["evaluate"])):
        require_same_classes(layout, frozen, name, config.evaluate[name])
    there = RowTable(layout.image_rows, frozen["images"]["rows"]).column("source").to_pylist()
    known = set(there)
    source = open_source(config.images.source)
    found = source.list()
    if known.isdisjoint(image.source for image in found):
        raise CacheError(
            f"images.source: {source.location}: holds none of the {len(known):,} images of {layout.root}; "
            "append adds to a folder: is it another one?"
        )
    images = [image for image in found if image.source not in known]
    sources, lines = _new_lines(config, layout, frozen["sentences"]["sources"])
    prompts, prompts_now = _new_prompts(config, layout, frozen["sentences"])
    num_sentences = sum(item.stop - item.first for item in lines) + len(prompts)
    return Growth(
        {
            "images": list_document(chain(there, (image.source for image in images))) if images else frozen["images"],
            "sentences": {
                "rows": frozen["sentences"]["rows"] + num_sentences,
                "sources": sources,
                "prompts": prompts_now,
            },
            "evaluate": frozen["evaluate"],
        },
        images,
        lines,
        prompts,
        sorted(set(config.evaluate) - set(frozen["evaluate"])),
        {"images": len(images), "sentences": num_sentences},
    )


def stage_growth(config: Config, layout: Layout, plan: dict[str, Any], growth: Growth) -> dict[str, Any]:
    """Write the row tables of the next version beside the cache: the rows that it has, then the new ones.

    Returns:
        The `inputs` of its plan.
    """
    if "rows_of" in plan:
        return growth.inputs
    frozen, following, shard_rows = plan["inputs"], layout.next, plan["shard_rows"]
    if growth.num_rows["images"]:
        there = RowTable(layout.image_rows, frozen["images"]["rows"]).records()
        new = image_rows(open_source(config.images.source), growth.images, config.images.hash)
        write_rows(following.image_rows, IMAGE_COLUMNS, chain(there, new), shard_rows)
    if growth.num_rows["sentences"]:
        there = RowTable(layout.sentence_rows, frozen["sentences"]["rows"]).records()
        write_rows(following.sentence_rows, SENTENCE_COLUMNS, chain(there, _sentence_rows(growth)), shard_rows)
    evaluate = {name: freeze_evaluate_set(config, following, name) for name in growth.evaluate}
    return {**growth.inputs, "evaluate": {**frozen["evaluate"], **evaluate}}


def _sentence_rows(growth: Growth) -> Iterator[dict[str, Any]]:
    for item in growth.lines:
        yield from map(sentence_row, islice(read_sentences([item.path]), item.first, item.stop))
    yield from map(prompt_row, growth.prompts)


def _new_lines(
    config: Config, layout: Layout, frozen: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[Lines]]:
    """`sources` of the next plan, and what is new in each file. The files of the cache come first, in their order."""
    sources, lines = [], []
    paths = config.sentences.source
    if len(paths) < len(frozen):
        raise CacheError(
            f"sentences.source: {len(paths)} files, {layout.root} was made from {len(frozen)} "
            f"({', '.join(item['name'] for item in frozen)}); put them back in front of new ones"
        )
    for i, path in enumerate(paths):
        nothing: dict[str, Any] = {"name": path.name, "rows": 0, "digest": xxhash.xxh3_128().hexdigest()}
        held = frozen[i] if i < len(frozen) else nothing
        num_lines, seen = 0, xxhash.xxh3_128()
        at_held = seen.hexdigest() if held["rows"] == 0 else None
        for sentence in read_sentences([path]):
            num_lines += 1
            seen.update(sentence.text.encode() + b"\n")
            if num_lines == held["rows"]:
                at_held = seen.hexdigest()
        if (path.name, at_held) != (held["name"], held["digest"]):
            raise CacheError(
                f"{path}: does not begin with the {held['rows']:,} lines of {held['name']} that {layout.root} has; "
                "append takes new lines at the end of a file, or new files after the others"
            )
        sources.append({"name": path.name, "rows": num_lines, "digest": seen.hexdigest()})
        lines.append(Lines(path, held["rows"], num_lines))
    return sources, lines


def _new_prompts(config: Config, layout: Layout, frozen: dict[str, Any]) -> tuple[list[str], dict[str, Any] | None]:
    """Prompts that no row has yet, and what the next plan says of all prompts."""
    now = prompt_lines(config.sentences.prompts) if config.sentences.prompts else []
    document = prompts_document(now) if now else None
    if document == frozen["prompts"]:
        return [], document
    table = RowTable(layout.sentence_rows, frozen["rows"])
    rows = zip(table.column("text").to_pylist(), table.column("origin").to_pylist(), strict=True)
    there = Counter(text for text, origin in rows if origin == PROMPTS)
    if there - Counter(now):
        gone = next(iter(there - Counter(now)))
        raise CacheError(
            f"sentences.prompts: no longer makes {gone!r}, which is a row of {layout.root}; "
            "append only adds: put the classes and templates back, or choose another cache.dir"
        )
    new = []
    for prompt in now:
        if there[prompt]:
            there[prompt] -= 1
        else:
            new.append(prompt)
    return new, document


def _shared_growth(config: Config, layout: Layout, plan: dict[str, Any]) -> Growth:
    """New rows of the cache whose row tables this one shares; that one takes in new sources first."""
    other = Layout(layout.root / plan["rows_of"])
    theirs = read_plan(other)
    if theirs is None:
        raise CacheError(f"{other.root}: no teacher cache; {layout.root} shares its row tables: put it back")
    held = plan["inputs"]["images"]
    if list_document(RowTable(layout.image_rows, held["rows"]).column("source").to_pylist()) != held:
        raise CacheError(f"{layout.image_rows}: its first {held['rows']:,} rows are not those of {layout.root}")
    inputs = theirs["inputs"]
    names = sorted((set(config.evaluate) | set(plan["inputs"]["evaluate"])) & set(inputs["evaluate"]))
    num_rows = {side: inputs[side]["rows"] - plan["inputs"][side]["rows"] for side in ("images", "sentences")}
    return Growth(
        {**inputs, "evaluate": {name: inputs["evaluate"][name] for name in names}},
        [],
        [],
        [],
        sorted(set(names) - set(plan["inputs"]["evaluate"])),
        num_rows,
    )
