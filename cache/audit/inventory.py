"""The files that a manifest lists, and which rows of which array each of them holds."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..disk.layout import DIRECTIONS, IMAGES, SIDES
from ..reader.pixel_packs import pack_path
from ..version.schema import FileEntry, Manifest

_PACK = re.compile(r"(?P<array>pixels/[^/]+)/(?P<chunk>\d+)\.pack")
_CHUNK = re.compile(r"(?P<store>[^/]+\.zarr)/(?P<array>.+)/c/(?P<chunk>\d+)(/0)*")

Content = Literal["embeddings", "head", "ids", "scores", "pixels", "other"]


@dataclass(frozen=True)
class Piece:
    """One file of a cache.

    Attributes:
        name: relative to the cache.
        num_bytes: its size.
        digest: XXH3-128 of its bytes.
        content: what it holds.
        array: of a chunk file, its array, as in the manifest's `arrays` or below the store of pairs; of a pack, the
            folder of packs.
        chunk: of a chunk file or pack, its number.
        first: of a chunk file or pack, the first row in it.
        num_rows: of a chunk file or pack, the rows in it that exist; what follows is padding.
        row_bytes: bytes of one row; 0 where rows differ.
        shard_rows: of a pack, the rows that its table has room for.
    """

    name: str
    num_bytes: int
    digest: str
    content: Content = "other"
    array: str = ""
    chunk: int = -1
    first: int = 0
    num_rows: int = 0
    row_bytes: int = 0
    shard_rows: int = 0

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Its rows as (first, last)."""
        return ((self.first, self.first + self.num_rows - 1),) if self.num_rows else ()

    @property
    def is_teachers(self) -> bool:
        """Whether only the teacher can make it again."""
        return self.content in ("embeddings", "head")


def pieces(manifest: Manifest, shard_rows: int) -> list[Piece]:
    """Every file of a manifest, in the order of names."""
    return [_piece(name, entry, manifest, shard_rows) for name, entry in sorted(manifest.files.items())]


def _piece(name: str, entry: FileEntry, manifest: Manifest, shard_rows: int) -> Piece:
    num_bytes, digest = entry.bytes, entry.digest
    if pack := _PACK.fullmatch(name):
        first = int(pack["chunk"]) * shard_rows
        num_rows = max(0, min(shard_rows, manifest.arrays[IMAGES].rows - first))
        shard = int(pack["chunk"])
        return Piece(name, num_bytes, digest, "pixels", pack["array"], shard, first, num_rows, shard_rows=shard_rows)
    match = _CHUNK.fullmatch(name)
    if not match:
        return Piece(name, num_bytes, digest)
    array, chunk = match["array"], int(match["chunk"])
    if array.endswith("/head"):
        return Piece(name, num_bytes, digest, "head", array, chunk, row_bytes=num_bytes)
    direction, _, part = array.partition("/")
    rows_of = SIDES[DIRECTIONS[direction][0]] if direction in DIRECTIONS else array
    content: Content = "embeddings" if direction not in DIRECTIONS else "ids" if part == "ids" else "scores"
    first = chunk * shard_rows
    num_rows = max(0, min(shard_rows, _rows(manifest, rows_of) - first))
    return Piece(name, num_bytes, digest, content, array, chunk, first, num_rows, num_bytes // shard_rows)


def unlisted_packs(manifest: Manifest, shard_rows: int) -> list[Piece]:
    """Packs that a cache with pixels must have and its manifest does not list: of no bytes, so any file differs."""
    if not manifest.pixels:
        return []
    shards = range(-(-manifest.arrays[IMAGES].rows // shard_rows))
    names = (pack_path(Path(manifest.pixels.folder), shard).as_posix() for shard in shards)
    nothing = FileEntry(bytes=0, digest="")
    return [_piece(name, nothing, manifest, shard_rows) for name in names if name not in manifest.files]


def num_targets(array: str, manifest: Manifest) -> int:
    """How many rows the ids of an array of pairs choose from."""
    return manifest.arrays[SIDES[DIRECTIONS[array.partition("/")[0]][1]]].rows


def _rows(manifest: Manifest, array: str) -> int:
    return manifest.arrays[array].rows if array in manifest.arrays else 0
