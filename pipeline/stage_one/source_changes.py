"""What has become of images, sentences and classes since a cache listed them: changed, gone, new."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...cache.audit.findings import runs_of, show_runs
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, evaluate_images, table_of
from ...cache.disk.row_tables import RowTable
from ...cache.errors import CacheError, InputError
from ...cache.version.plan_file import require_same
from ...cache.version.schema import Plan
from ...stages.inputs.image_source import FoundImage, ImageSource, image_digests, row_keys
from ...stages.inputs.prompts import prompt_lines
from ...stages.inputs.sentences import read_sentences
from ...stages.settings.data import EvaluateSettings, SentencesSettings
from ..progress import some_names
from .inputs import LineCount, classes_document, prompts_document
from .sources import Sources

LISTED = "`dimefm cache verify DIR --sources --json` has all"


def compare_inputs(sources: Sources, layout: Layout, plan: Plan, *, report: bool = False) -> list[str]:
    """Hold what a run is given against the lists of its plan.

    Args:
        report: say what has become of lines of sentences, rather than refuse a run that has other ones.

    Returns:
        Lines to show: what has appeared or gone since, and sources that are not at hand.

    Raises:
        CacheError: naming the key, if the run asks for other sentences, prompts, classes or labelled sets.
    """
    frozen = plan.inputs
    rows = RowTable(table_of(layout, IMAGES), frozen.images.rows)
    notes = _image_notes(sources.images, rows, "images.source", report)
    try:
        notes += _sentence_notes(sources.sentences, layout, plan, report)
    except InputError as error:
        notes.append(f"sentences.source: not compared: {error}")
    for name, labelled in sources.evaluate.items():
        if name not in frozen.evaluate:
            raise CacheError(
                f"{layout.root}: evaluate.{name} is not in this cache; choose another cache.dir or leave it out"
            )
        try:
            require_planned_classes(layout, plan, name, labelled.settings)
        except InputError as error:
            notes.append(f"evaluate.{name}: not compared: {error}")
        rows = RowTable(table_of(layout, evaluate_images(name)), frozen.evaluate[name].rows)
        notes += _image_notes(labelled.images, rows, f"evaluate.{name}.images", report)
    return notes


def require_planned_classes(layout: Layout, plan: Plan, name: str, settings: EvaluateSettings) -> None:
    """Refuse other classes or prompts of a labelled set than the cache was made with.

    Raises:
        CacheError: naming the key that differs.
        InputError: if the classes or templates are not at hand.
    """
    asked, there = classes_document(settings), plan.inputs.evaluate[name].to_dict()
    found = {key: there.get(key) for key in asked}
    require_same(layout.root, {"evaluate": {name: found}}, {"evaluate": {name: asked}})


def _image_notes(source: ImageSource, table: RowTable, key: str, report: bool) -> list[str]:
    if not source.at_hand():
        return [f"{key}: {source.location} is not at hand"]
    try:
        return compare_images(source, table).notes(key)
    except InputError as error:  # it cannot be listed, or has no image
        if not report:
            raise
        return [f"{key}: not compared: {error}"]


def _sentence_notes(settings: SentencesSettings, layout: Layout, plan: Plan, report: bool) -> list[str]:
    frozen, paths = plan.inputs.sentences, settings.source
    names = {"sentences": {"source": [there.name for there in frozen.sources]}}
    require_same(layout.root, names, {"sentences": {"source": [path.name for path in paths]}})
    is_same, notes = True, []
    for path, there in zip(paths, frozen.sources, strict=True):
        now = LineCount(path, there.rows).read_all()
        is_same &= now.digest_upto == there.digest
        if now.rows > there.rows:
            notes.append(f"{path}: {now.rows - there.rows:,} lines have appeared since; this cache does not hold them")
    if not is_same:
        table = RowTable(table_of(layout, SENTENCES), frozen.rows)
        notes = [f"sentences.source: {note}" for note in compare_sentences(paths, plan, table).notes]
    if not is_same and not report:
        raise CacheError(
            f"{layout.root}: made from other lines: {'; '.join(notes)}; put them back, choose another "
            "cache.dir or delete that one"
        )
    asked = prompts_document(prompt_lines(settings.prompts)).to_dict() if settings.prompts else None
    there_prompts = frozen.prompts.to_dict() if frozen.prompts else None
    require_same(layout.root, {"sentences": {"prompts": there_prompts}}, {"sentences": {"prompts": asked}})
    return notes


@dataclass(frozen=True)
class SourceChanges:
    """A folder of images held against a row table.

    Attributes:
        changed: rows whose file has another size, or another checksum where the table has one.
        touched: rows whose file has the same size and another modification time, where no checksum can tell more.
        gone: rows whose file is no longer there.
        new: files that no row was made from.
        passed_over: what the listing says of files that it left out.
    """

    changed: dict[int, str] = field(default_factory=dict)
    touched: dict[int, str] = field(default_factory=dict)
    gone: dict[int, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    passed_over: Sequence[str] = ()

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {kind: len(getattr(self, kind)) for kind in ("changed", "touched", "gone", "new")}

    def names(self) -> dict[str, list[str]]:
        """Which ones they are."""
        of_rows = {kind: list(getattr(self, kind).values()) for kind in ("changed", "touched", "gone")}
        return {**of_rows, "new": list(self.new)}

    def notes(self, key: str) -> list[str]:
        """A line for each kind that there is, naming the first few.

        Args:
            key: the config's name for the folder.
        """
        lines = (
            (self.new, "images have appeared since; this cache does not hold them"),
            (self.gone.values(), "images of this cache are gone"),
            (self.changed.values(), "images have changed; this cache holds the old ones"),
            (
                self.touched.values(),
                "images have another modification time and the size they had; images.hash would tell a change",
            ),
        )
        notes = [f"{key}: {len(names):,} {what}: {some_names(names, LISTED)}" for names, what in lines if names]
        return notes + [f"{key}: {note}" for note in self.passed_over]


def compare_images(source: ImageSource, table: RowTable) -> SourceChanges:
    """Hold the images of a source against the rows that were made from them; only those whose time differs are read.

    Raises:
        CacheError: if not one image of the table is there, as when it is another folder.
        InputError: if the source is missing or cannot be listed.
    """
    listed = source.list()
    now = _columns_of(listed)
    there = table.columns(*(name for name in ("source", "bytes", "modified_ns", "digest") if table.has(name)))
    found = pc.index_in(there["source"], now["source"])
    is_gone = found.is_null().to_numpy().copy()
    for row in np.flatnonzero(is_gone).tolist():  # an earlier version listed what is passed over now
        is_gone[row] = not source.passes_over(there["source"][row].as_py())
    if is_gone.all():
        raise CacheError(
            f"{source.location}: holds none of the {table.num_rows:,} images of this cache; is it another folder?"
        )
    has_digest = there["digest"].is_valid().to_numpy() if "digest" in there.column_names else np.False_
    is_there = found.is_valid().to_numpy()
    at = found.fill_null(0).to_numpy()
    resized = now["bytes"][at] != there["bytes"].to_numpy()
    touched = now["modified_ns"][at] != there["modified_ns"].to_numpy()
    changed = (resized | (now["is_bad"][at] & has_digest)) & is_there
    suspect = touched & ~changed & is_there

    def named(is_one: NDArray[np.bool_]) -> dict[int, str]:
        rows = np.flatnonzero(is_one)
        return dict(zip(rows.tolist(), there["source"].take(pa.array(rows)).to_pylist()))

    new = now["source"].filter(pc.invert(pc.is_in(now["source"], there["source"]))).to_pylist()
    passed_over = getattr(listed, "notes", ())
    changes = SourceChanges(named(changed), named(suspect & ~has_digest), named(is_gone), new, passed_over)
    suspects = named(suspect & has_digest)
    keys = row_keys(source, table)(np.fromiter(suspects, np.int64)) if suspects else ()
    for (row, name), digest in zip(suspects.items(), image_digests(source, keys)):
        if digest != there["digest"][row].as_py():
            changes.changed[row] = name
    return changes


def _columns_of(images: Sequence[FoundImage]) -> dict[str, Any]:
    """A list of images as columns, which take a fifth of the memory of a dictionary of them."""
    return {
        "source": pa.array([image.source for image in images], pa.string()),
        "bytes": np.fromiter((image.bytes for image in images), np.int64, len(images)),
        "modified_ns": np.fromiter((image.modified_ns for image in images), np.int64, len(images)),
        "is_bad": np.fromiter((image.problem is not None for image in images), np.bool_, len(images)),
    }


@dataclass
class LineChanges:
    """Files of sentences held against a row table, line by line: rows keep their places.

    Attributes:
        changed: rows whose line reads otherwise now.
        gone: rows whose file has fewer lines by now.
        num_new: lines beyond those of the table.
        notes: a line for each file that is not as it was.
    """

    changed: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    num_new: int = 0
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {"changed": len(self.changed), "gone": len(self.gone), "new": self.num_new}


def compare_sentences(paths: Sequence[Path], plan: Plan | None, table: RowTable) -> LineChanges:
    """Hold files of sentences against the rows that were made from them, one shard of the table in memory at a time.

    Args:
        plan: of the cache; None where it is lost. Only files that share a name need it.
    """
    found, named = LineChanges(), Counter(path.name for path in paths)
    sources = plan.inputs.sentences.sources if plan and not plan.grown else []
    for i, path in enumerate(paths):
        first, stop = 0, table.num_rows
        if named[path.name] > 1:
            if i >= len(sources):
                found.notes.append(f"{path}: not compared: rows of several files are called {path.name}")
                continue
            first = sum(source.rows for source in sources[:i])
            stop = first + sources[i].rows
        held = (row for row in _lines_of(table, path.name) if first <= row[0] < stop)
        changed, gone, num_new = [], [], 0
        lines = (sentence.text for sentence in read_sentences([path])) if path.is_file() else iter(())
        for row, line in zip_longest(held, lines):
            if row is None:
                num_new += 1
            elif line is None:
                gone.append(row[0])
            elif row[1] != line:
                changed.append(row[0])
        if changed or gone or num_new:
            lost = ((changed, "have changed"), (gone, "are gone"))
            parts = [f"{len(rows):,} lines {what} ({show_runs(runs_of(rows))})" for rows, what in lost if rows]
            parts += [f"{num_new:,} lines are new"] if num_new else []
            found.notes.append(f"{path}: {', '.join(parts)}")
        found.changed += changed
        found.gone += gone
        found.num_new += num_new
    return found


def _lines_of(table: RowTable, origin: str) -> Iterator[tuple[int, str]]:
    """Row and text of what came from a file, in order."""
    for shard in range(table.num_shards):
        columns = table.shard(shard, ["row", "text", "origin"])
        for row, text, name in zip(columns["row"], columns["text"], columns["origin"], strict=True):
            if name == origin:
                yield row, text
