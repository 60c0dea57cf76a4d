"""Kept pixels: the training images, small, as JPEGs in packs; one pack for each shard of image rows.

A pack is JPEGs back to back from its first byte, and at its end a table of `shard_rows + 1` offsets: row i of the shard
is bytes `offsets[i]` to before `offsets[i + 1]`. Rows without pixels, and rows that do not exist yet, have none there.
So a pack that has grown begins with the bytes of the one before, and a reader of the old version finds its rows in it.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..disk.durable import Attempt, attempting
from ..disk.layout import IMAGES, Layout
from ..errors import CacheError
from ..version.manifest import read_manifest
from ..version.schema import Manifest

SOI = b"\xff\xd8\xff"
"""How every JPEG begins: the marker of its start and the first byte of another one."""

OFFSET = np.dtype("<u8")

MAX_OPEN = 64
"""Packs that one reader holds open. Their number grows with the rows of a cache; what a reader holds must not."""

REPAIR = "run `dimefm cache repair`"


def table_bytes(shard_rows: int) -> int:
    """Length of the table at the end of a pack."""
    return (shard_rows + 1) * OFFSET.itemsize


def kept_setting(manifest: Manifest | None) -> str | None:
    """What `cache.pixels` was when the packs of a cache were made; None where it has none."""
    return manifest.pixels.setting if manifest and manifest.pixels else None


class PackWriter:
    """Writes one pack, row by row; memory stays at one row and the table."""

    def __init__(self, file: BinaryIO, shard_rows: int) -> None:
        """Use `writing_pack` or `attempting_pack`."""
        self._file, self._state = file, xxhash.xxh3_128()
        self._offsets = np.zeros(shard_rows + 1, dtype=OFFSET)
        self.num_rows = 0
        self.attempt: Attempt | None = None

    def add(self, jpeg: bytes | memoryview) -> None:
        """The next row; empty where it has no pixels."""
        self._write(jpeg)
        self.num_rows += 1
        self._offsets[self.num_rows :] = self._offsets[self.num_rows - 1] + np.uint64(len(jpeg))

    def take_over(self, path: Path, num_rows: int, wanted: str) -> None:
        """Begin with the rows of the pack that this one replaces.

        Args:
            wanted: digest of that pack: copying damage would seal it.

        Raises:
            CacheError: if it is missing or is another one.
        """
        assert not self.num_rows
        state, offsets = xxhash.xxh3_128(), read_offsets(path, len(self._offsets) - 1)
        left = int(offsets[num_rows])
        with path.open("rb") as file:
            while block := file.read(2**20):
                state.update(block)
                self._write(block[:left])
                left -= min(left, len(block))
        if state.hexdigest() != wanted:
            raise CacheError(f"{path}: damaged (its checksum differs); {REPAIR} first")
        self.num_rows = num_rows
        self._offsets[: num_rows + 1] = offsets[: num_rows + 1]
        self._offsets[num_rows + 1 :] = offsets[num_rows]

    def finish(self) -> None:
        """Write the table."""
        self._write(self._offsets.tobytes())

    @property
    def digest(self) -> str:
        """Of the pack's bytes, once it is finished."""
        return self._state.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._state.update(data)


@contextmanager
def attempting_pack(path: Path, shard_rows: int) -> Iterator[PackWriter]:
    """Write a pack beside its place: after this the writer's `attempt` is all of it, or there is nothing.

    Raises:
        CacheError: if the system refuses.
    """
    with attempting(path) as partial, partial.open("wb") as file:
        writer = PackWriter(file, shard_rows)
        yield writer
        writer.finish()
    writer.attempt = Attempt(partial, path, partial.stat().st_size, writer.digest)


@contextmanager
def writing_pack(path: Path, shard_rows: int) -> Iterator[PackWriter]:
    """Write a pack durably: all of it is in its place after this, or nothing.

    Raises:
        CacheError: if the system refuses.
    """
    with attempting_pack(path, shard_rows) as writer:
        yield writer
    assert writer.attempt
    writer.attempt.commit()


def read_offsets(path: Path, shard_rows: int) -> NDArray[np.uint64]:
    """The table of a pack: (shard_rows + 1,) uint64, ascending, from 0 to where the table begins.

    Raises:
        CacheError: if the pack is missing or its table cannot be that.
    """
    try:
        with path.open("rb") as file:
            begin = os.fstat(file.fileno()).st_size - table_bytes(shard_rows)
            file.seek(max(0, begin))
            offsets = np.frombuffer(file.read(), dtype=OFFSET) if begin >= 0 else np.empty(0, dtype=OFFSET)
    except FileNotFoundError as error:
        raise CacheError(f"{path}: missing; {REPAIR}") from error
    if len(offsets) != shard_rows + 1 or offsets[0] != 0 or offsets[-1] != begin or (offsets[1:] < offsets[:-1]).any():
        raise CacheError(f"{path}: its table of offsets does not fit its JPEGs; {REPAIR}")
    return offsets


def pack_contents(path: Path, shard_rows: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The table of a pack, and whether each row's bytes begin as a JPEG does.

    Returns:
        (shard_rows + 1,) uint64 and (shard_rows,) bool, True where there is nothing.

    Raises:
        CacheError: as `read_offsets`.
    """
    offsets = read_offsets(path, shard_rows)
    begins: NDArray[np.bool_] = np.ones(shard_rows, dtype=np.bool_)
    with path.open("rb", buffering=0) as file:
        for place in np.flatnonzero(np.diff(offsets)):
            begins[place] = os.pread(file.fileno(), len(SOI), int(offsets[place])) == SOI
    return offsets, begins


class PixelPacks:
    """The kept pixels of a cache, read row by row. Any number of readers, threads and processes; none of them writes.

    Rows are read, not mapped: the pages of a map that a random order has touched would count as memory of each worker
    until all packs are in it, and a map of a file that was cut kills its process. Pickled, it is a path and three
    numbers; packs are opened when a row of theirs is read.
    """

    def __init__(self, folder: Path, setting: str, num_rows: int, shard_rows: int) -> None:
        """Use `open`."""
        self.folder, self.setting, self.num_rows, self.shard_rows = folder, setting, num_rows, shard_rows
        self._open_packs: OrderedDict[int, tuple[BinaryIO, int]] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def open(cls, layout: Layout, manifest: Manifest) -> "PixelPacks | None":
        """The packs of a cache; of one that has none and shares another one's rows, the packs of that one.

        Returns:
            None where neither has any.
        """
        num_rows, pixels = manifest.arrays[IMAGES].rows, manifest.pixels
        if not pixels and layout.shares_rows:
            # Whatever failed there is failed here as well, so no row that can be drawn is without pixels.
            layout = Layout(layout.base.image_rows.parent.resolve().parent)
            owner = read_manifest(layout)
            pixels = owner.pixels if owner else None
        if pixels is None:
            return None
        return cls(layout.root / layout.packs(pixels.setting), pixels.setting, num_rows, pixels.shard_rows)

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> tuple[Path, str, int, int]:
        return self.folder, self.setting, self.num_rows, self.shard_rows

    def __setstate__(self, state: tuple[Path, str, int, int]) -> None:
        PixelPacks.__init__(self, *state)

    def path(self, row: int) -> Path:
        """The pack that a row is in."""
        return pack_path(self.folder, row // self.shard_rows)

    def read(self, row: int) -> bytes:
        """The JPEG of a row: upright, RGB, its shorter side at most as many pixels as the setting says.

        Raises:
            IndexError: if there is no such row.
            CacheError: if it has no pixels (it failed), or its pack is missing or cut.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows} rows of kept pixels")
        shard, place = divmod(int(row), self.shard_rows)
        file, begin = self._pack(shard)
        entry = os.pread(file.fileno(), 2 * OFFSET.itemsize, begin + place * OFFSET.itemsize)
        first, end = np.frombuffer(entry, dtype=OFFSET).tolist() if len(entry) == 2 * OFFSET.itemsize else (0, 0)
        if not 0 <= first < end <= begin:
            what = "no kept pixels: it failed" if first == end else "offsets that do not fit"
            raise CacheError(f"{self.path(row)}: row {row} has {what}; `dimefm cache verify` looks at every row")
        jpeg = os.pread(file.fileno(), end - first, first)
        if len(jpeg) != end - first:
            raise CacheError(f"{self.path(row)}: cut; {REPAIR}")
        return jpeg

    def _pack(self, shard: int) -> tuple[BinaryIO, int]:
        """A pack's file, and where its table begins. A file that is let go of is closed after its last use."""
        with self._lock:
            found = self._open_packs.pop(shard, None)
            if found is None:
                path = pack_path(self.folder, shard)
                try:
                    file = path.open("rb", buffering=0)
                except FileNotFoundError as error:
                    raise CacheError(f"{path}: missing; {REPAIR}") from error
                found = file, os.fstat(file.fileno()).st_size - table_bytes(self.shard_rows)
                if found[1] < 0:
                    raise CacheError(f"{path}: cut; {REPAIR}")
            self._open_packs[shard] = found
            if len(self._open_packs) > MAX_OPEN:
                self._open_packs.popitem(last=False)
        return found


def pack_path(folder: Path, shard: int) -> Path:
    """File of one pack below the folder of packs."""
    return folder / f"{shard:06d}.pack"
