"""What has become of images and sentences since a cache listed them: changed, gone, new."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.audit.findings import runs_of, show_runs
from ...cache.disk.row_tables import FAILED, OK, RowTable
from ...cache.errors import CacheError
from ...stages.inputs.image_source import FoundImage, ImageSource, LabelledImage, image_digests, keys_of, row_keys
from ...stages.inputs.sentences import read_sentences

NAMES_SHOWN = 3


@dataclass(frozen=True)
class SourceChanges:
    """A folder of images held against a row table.

    Attributes:
        num_rows: rows of the table.
        changed: rows whose file has another size, or another checksum where the table has one.
        touched: rows whose file has the same size and another modification time, where no checksum can tell more.
        gone: rows whose file is no longer there.
        new: files that no row was made from.
    """

    num_rows: int
    changed: dict[int, str] = field(default_factory=dict)
    touched: dict[int, str] = field(default_factory=dict)
    gone: dict[int, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {kind: len(getattr(self, kind)) for kind in ("changed", "touched", "gone", "new")}

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
        return [f"{key}: {len(names):,} {what}: {_first(names)}" for names, what in lines if names]


def compare_images(source: ImageSource, table: RowTable) -> SourceChanges:
    """Hold the images of a source against the rows that were made from them; only those whose time differs are read.

    Raises:
        CacheError: if not one image of the table is there, as when it is another folder.
        InputError: if the source is missing or cannot be listed.
    """
    num_rows = table.num_rows
    columns = [name for name in ("source", "bytes", "modified_ns", "digest") if table.has(name)]
    frozen = {name: table.column(name).to_pylist() for name in columns}
    now = {image.source: image for image in source.list()}
    there = [name in now for name in frozen["source"]]
    if not any(there):
        raise CacheError(
            f"{source.location}: holds none of the {num_rows:,} images of this cache; is it another folder?"
        )
    gone = {row: frozen["source"][row] for row in np.flatnonzero(~np.array(there)).tolist()}
    changes = SourceChanges(num_rows, gone=gone)
    suspects = []
    digests = frozen.get("digest", [None] * num_rows)
    for row, name in enumerate(frozen["source"]):
        if row in gone:
            continue
        image = now[name]
        if image.bytes != frozen["bytes"][row] or (image.problem and digests[row]):
            changes.changed[row] = name
        elif image.modified_ns != frozen["modified_ns"][row]:
            if digests[row] is None:
                changes.touched[row] = name
            else:
                suspects.append(row)
    keys = row_keys(source, table)(np.array(suspects, dtype=np.int64)) if suspects else []
    for row, found in zip(suspects, image_digests(source, keys)):
        if found != digests[row]:
            changes.changed[row] = frozen["source"][row]
    known = set(frozen["source"])
    changes.new.extend(name for name in now if name not in known)
    return changes


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


def compare_sentences(paths: Sequence[Path], plan: Mapping[str, Any] | None, table: RowTable) -> LineChanges:
    """Hold files of sentences against the rows that were made from them, one shard of the table in memory at a time.

    Args:
        plan: of the cache; None where it is lost. Only files that share a name need it.
    """
    found, named = LineChanges(), Counter(path.name for path in paths)
    sources = plan["inputs"]["sentences"]["sources"] if plan and "grown" not in plan else []
    for i, path in enumerate(paths):
        first, stop = 0, table.num_rows
        if named[path.name] > 1:
            if i >= len(sources):
                found.notes.append(f"{path}: not compared: rows of several files are called {path.name}")
                continue
            first = sum(source["rows"] for source in sources[:i])
            stop = first + sources[i]["rows"]
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


def image_rows(source: ImageSource, images: Sequence[FoundImage], hashed: bool) -> Iterator[dict[str, Any]]:
    """Rows of an image table, without their numbers.

    Args:
        hashed: whether each file's checksum joins its row.
    """
    digests: Iterator[str | None] | None = None
    if hashed:
        good = [image for image in images if not image.problem]  # reading a pipe would wait for ever
        keys = keys_of(source, {name: [getattr(image, name) for image in good] for name in source.columns})
        digests = image_digests(source, keys)
    for image in images:
        row: dict[str, Any] = {"source": image.source, "bytes": image.bytes, "modified_ns": image.modified_ns}
        row["digest"] = next(digests) if digests and not image.problem else None
        row |= {"status": FAILED, "reason": image.problem} if image.problem else {"status": OK}
        yield row


def labelled_rows(source: ImageSource, images: Sequence[LabelledImage], hashed: bool) -> Iterator[dict[str, Any]]:
    """The same of an evaluation set: with each image's class."""
    for image, row in zip(images, image_rows(source, images, hashed), strict=True):
        yield {**row, "class_id": image.class_id}


def _first(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, islice(names, NAMES_SHOWN)))
    return shown + (f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else "")
