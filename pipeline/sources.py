"""What has become of the source images since a cache listed them: changed, gone, new."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import CacheError
from ..cache.rows import FAILED, OK, RowTable
from ..stages.images import FoundImage, LabelledImage, file_digests, find_images

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


def compare_images(folder: Path, table: RowTable) -> SourceChanges:
    """Hold the images below a folder against the rows that were made from them. Opens only files whose time differs.

    Raises:
        CacheError: if not one image of the table is there, as when it is another folder.
        InputError: if the folder is missing or cannot be listed.
    """
    num_rows = table.num_rows
    columns = [name for name in ("source", "bytes", "modified_ns", "digest") if table.has(name)]
    frozen = {name: table.column(name).to_pylist() for name in columns}
    now = {image.source: image for image in find_images(folder)}
    there = [source in now for source in frozen["source"]]
    if not any(there):
        raise CacheError(f"{folder}: holds none of the {num_rows:,} images of this cache; is it another folder?")
    gone = {row: frozen["source"][row] for row in np.flatnonzero(~np.array(there)).tolist()}
    changes = SourceChanges(num_rows, gone=gone)
    suspects = []
    digests = frozen.get("digest", [None] * num_rows)
    for row, source in enumerate(frozen["source"]):
        if row in gone:
            continue
        image = now[source]
        if image.bytes != frozen["bytes"][row] or (image.problem and digests[row]):
            changes.changed[row] = source
        elif image.modified_ns != frozen["modified_ns"][row]:
            if digests[row] is None:
                changes.touched[row] = source
            else:
                suspects.append(row)
    for row, found in zip(suspects, file_digests(folder, [frozen["source"][row] for row in suspects])):
        if found != digests[row]:
            changes.changed[row] = frozen["source"][row]
    known = set(frozen["source"])
    changes.new.extend(source for source in now if source not in known)
    return changes


def image_rows(folder: Path, images: Sequence[FoundImage], hashed: bool) -> Iterator[dict[str, Any]]:
    """Rows of an image table, without their numbers.

    Args:
        hashed: whether each file's checksum joins its row.
    """
    good = (image.source for image in images if not image.problem)  # reading a pipe would wait for ever
    digests = file_digests(folder, good) if hashed else None
    for image in images:
        row: dict[str, Any] = {"source": image.source, "bytes": image.bytes, "modified_ns": image.modified_ns}
        row["digest"] = next(digests) if digests and not image.problem else None
        row |= {"status": FAILED, "reason": image.problem} if image.problem else {"status": OK}
        yield row


def labelled_rows(folder: Path, images: Sequence[LabelledImage], hashed: bool) -> Iterator[dict[str, Any]]:
    """The same of an evaluation set: with each image's class."""
    for image, row in zip(images, image_rows(folder, images, hashed), strict=True):
        yield {**row, "class_id": image.class_id}


def _first(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, islice(names, NAMES_SHOWN)))
    return shown + (f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else "")
