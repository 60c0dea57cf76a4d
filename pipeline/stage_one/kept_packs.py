"""Packs of kept pixels in stage one: which pack a shard gets, what it takes, and what the manifest says."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.layout import IMAGES, Layout
from ...cache.disk.row_tables import LOST, OK, RowTable, read_own_failures
from ...cache.reader.pixel_packs import kept_setting, pack_path
from ...cache.version.journal import Journal
from ...cache.version.manifest import file_entry, read_manifest
from ...cache.version.schema import FileEntry, KeptPixels, Manifest, Plan
from ...stages.embed.tasks import QUALITY, SUBSAMPLING, ExistingRows, PackedImage, PackTask
from ...stages.inputs.image_source import ImageSource, keys_of
from ...stages.settings.cache import kept_side

BYTES_A_PIXEL = 0.4
"""Of photos at the quality that is kept; busy ones take 0.5, smooth ones 0.2."""

USUAL_ASPECT = 4 / 3


def pack_task(layout: Layout, setting: str, shard: int, plan: Plan, before: Manifest | None = None) -> PackTask:
    """The pack of one shard.

    Args:
        plan: of the cache; where it holds crops, pictures that are made smaller say what size they had.
        before: the manifest of the version that a version in the making grows from; the rows that it has are kept.
    """
    side, shard_rows = kept_side(setting), plan.shard_rows
    assert side is not None
    array = layout.packs(setting)
    existing = None
    num_rows = before.arrays[IMAGES].rows - shard * shard_rows if before else 0
    if before and num_rows > 0:
        path = pack_path(layout.base.root / array, shard)
        existing = ExistingRows(path, num_rows, before.files[layout.base.name_of(path)].digest)
    path = pack_path(layout.root / array, shard)
    return PackTask(path, array, shard, side, shard_rows, existing, note_size=plan.views is not None)


def packed_images(
    source: ImageSource, layout: Layout, table: Path, num_rows: int, shard: int
) -> Iterator[PackedImage | None]:
    """The images of a shard whose pixels are kept, those of lost rows among them; None for rows that failed."""
    rows = RowTable(table, num_rows)
    columns = rows.shard(shard, [*source.columns, "bytes", "status", "reason", *(["digest"] * rows.has("digest"))])
    keys, first = keys_of(source, columns), shard * rows.shard_rows
    digests = columns.get("digest", [None] * len(keys))
    own, shares_rows = read_own_failures(layout.find(layout.own_failures)).get(IMAGES, {}), layout.shares_rows
    for i, key in enumerate(keys):
        is_ok, reason = columns["status"][i] == OK, columns["reason"][i] or ""
        is_lost = not is_ok and reason.startswith(LOST)
        if shares_rows:
            # What the owner of the tables has lost is still in this cache; what failed here is in a file of its own.
            reason = own.get(first + i, "")
            is_ok, is_lost = (is_ok or is_lost) and not reason, reason.startswith(LOST)
        yield PackedImage(key, columns["bytes"][i], digests[i], is_lost) if is_ok or is_lost else None


def pack_bytes(setting: str, sizes: NDArray[np.int64]) -> int:
    """About what the packs take on disk: an estimate, from the usual photo and the sizes of the files.

    Args:
        sizes: (N,) bytes of each image file; what is kept of it is hardly ever larger.
    """
    side = kept_side(setting) or 0
    usual = side * side * USUAL_ASPECT * BYTES_A_PIXEL
    return int(np.minimum(sizes, usual).sum()) + 8 * len(sizes)


def image_sizes(layout: Layout, num_rows: int) -> NDArray[np.int64]:
    """(num_rows,) bytes of each image's file."""
    return np.array(RowTable(layout.find(layout.image_rows), num_rows).column("bytes"), dtype=np.int64)


def pixels_document(layout: Layout, setting: str, shard_rows: int) -> KeptPixels:
    """`pixels` of the manifest."""
    folder = layout.packs(setting)
    return KeptPixels(setting=setting, folder=folder, shard_rows=shard_rows, quality=QUALITY, subsampling=SUBSAMPLING)


def pack_files(layout: Layout, journal: Journal, setting: str, num_shards: int) -> Iterator[tuple[str, FileEntry]]:
    """(name, size and checksum) of every pack, as the journal has them: nothing is read twice."""
    array = layout.packs(setting)
    known = {record.shard: record.digest for record in journal.of(array)}
    for shard in range(num_shards):
        path = pack_path(layout.root / array, shard)
        found = layout.find(path)
        is_known = shard in known
        entry = FileEntry(bytes=found.stat().st_size, digest=known[shard]) if is_known else file_entry(found)
        yield layout.name_of(path), entry


def setting_in_force(layout: Layout, plan: Plan, journal: Journal, asked: str | None) -> str | None:
    """Whose packs the next manifest has: those of the one before, those that were asked for, those that are there."""
    before = read_manifest(layout.base)
    if before:
        return kept_setting(before) or (None if layout.under else asked)
    return plan.pixels or _complete_setting(layout, journal, plan)


def _complete_setting(layout: Layout, journal: Journal, plan: Plan) -> str | None:
    """A setting whose packs are all counted and there, of a cache whose manifest was lost; None where there is none."""
    num_rows, shard_rows = plan.inputs.images.rows, plan.shard_rows
    for folder in sorted((layout.root / layout.packs("")).glob("jpeg-*")):
        array = layout.packs(folder.name)
        if all(
            journal.has(array, shard, min(shard_rows, num_rows - shard * shard_rows))
            and pack_path(folder, shard).exists()
            for shard in range(-(-num_rows // shard_rows))
        ):
            return folder.name
    return None
