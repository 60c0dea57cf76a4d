"""What has become of images and sentences since a cache listed them: changed, gone, new."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

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
    now = _columns_of(source.list())
    there = table.columns(*(name for name in ("source", "bytes", "modified_ns", "digest") if table.has(name)))
    found = pc.index_in(there["source"], now["source"])
    if found.null_count == table.num_rows:
        raise CacheError(
            f"{source.location}: holds none of the {table.num_rows:,} images of this cache; is it another folder?"
        )
    has_digest = there["digest"].is_valid().to_numpy() if "digest" in there.column_names else np.False_
    is_gone = found.is_null().to_numpy()
    at = found.fill_null(0).to_numpy()
    resized = now["bytes"][at] != there["bytes"].to_numpy()
    touched = now["modified_ns"][at] != there["modified_ns"].to_numpy()
    changed = (resized | (now["is_bad"][at] & has_digest)) & ~is_gone
    suspect = touched & ~changed & ~is_gone

    def named(is_one: NDArray[np.bool_]) -> dict[int, str]:
        rows = np.flatnonzero(is_one)
        return dict(zip(rows.tolist(), there["source"].take(pa.array(rows)).to_pylist()))

    new = now["source"].filter(pc.invert(pc.is_in(now["source"], there["source"]))).to_pylist()
    changes = SourceChanges(table.num_rows, named(changed), named(suspect & ~has_digest), named(is_gone), new)
    suspects = named(suspect & has_digest)
    keys = row_keys(source, table)(np.array(list(suspects), dtype=np.int64)) if suspects else []
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
