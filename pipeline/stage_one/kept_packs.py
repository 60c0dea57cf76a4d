"""Kept pixels in the jobs: what is asked for, which pack a shard gets, what it takes, and what the manifest says."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.layout import IMAGES, Layout
from ...cache.disk.row_tables import LOST, OK, RowTable, read_own_failures
from ...cache.errors import CacheError
from ...cache.reader.pixel_packs import kept_setting, pack_path
from ...cache.version.journal import Journal
from ...cache.version.manifest import file_entry, read_manifest
from ...stages.embed.pack_pixels import QUALITY, SUBSAMPLING, PackedImage
from ...stages.embed.tasks import ExistingRows, PackTask
from ...stages.inputs.image_source import ImageSource, keys_of
from ...stages.settings.cache import kept_side
from ..config.load import Config

BYTES_A_PIXEL = 0.4
"""Of photos at the quality that is kept; busy ones take 0.5, smooth ones 0.2."""

USUAL_ASPECT = 4 / 3

MISSING = "nothing"


def require_same_pixels(config: Config, layout: Layout, plan: Mapping[str, Any]) -> None:
    """Refuse a cache whose pixels are kept otherwise. A config without the key leaves a finished cache as it is.

    Raises:
        CacheError: naming what is there and what is asked for.
    """
    manifest, asked = read_manifest(layout), config.cache.pixels
    there = kept_setting(manifest) if manifest else plan.get("pixels")
    if there == asked or (manifest and (there is None or asked is None)):
        return
    advice = "choose another cache.dir, or ask for the same"
    if manifest is None:
        advice = "ask for the same until it is finished (a finished cache can still be given pixels), or delete it"
    raise CacheError(
        f"{layout.root}: made with cache.pixels = {there or MISSING}, but this run asks for {asked or MISSING}; "
        f"{advice}"
    )


def pack_task(
    layout: Layout, setting: str, shard: int, plan: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> PackTask:
    """The pack of one shard.

    Args:
        plan: of the cache; where it holds crops, pictures that are made smaller say what size they had.
        before: the manifest of the version that a version in the making grows from; the rows that it has are kept.
    """
    side, shard_rows = kept_side(setting), int(plan["shard_rows"])
    assert side is not None
    array = layout.packs(setting)
    existing = None
    num_rows = before["arrays"][IMAGES]["rows"] - shard * shard_rows if before else 0
    if before and num_rows > 0:
        path = pack_path(layout.base.root / array, shard)
        existing = ExistingRows(path, num_rows, before["files"][layout.base.name_of(path)]["digest"])
    path = pack_path(layout.root / array, shard)
    return PackTask(path, array, shard, side, shard_rows, existing, note_size="views" in plan)


def packed_images(
    source: ImageSource, layout: Layout, table: Path, num_rows: int, shard: int
) -> Iterator[PackedImage | None]:
    """The images of a shard whose pixels are kept, those of lost rows among them; None for rows that failed."""
    rows = RowTable(table, num_rows)
    columns = [name for name in ("bytes", "status", "reason", "digest") if rows.has(name)]
    own = read_own_failures(layout.find(layout.own_failures)).get(IMAGES, {})
    shard_rows = rows.shard(shard, [*source.columns, *columns])
    first = shard * rows.shard_rows
    for i, key in enumerate(keys_of(source, shard_rows)):
        ok, reason = shard_rows["status"][i] == OK, shard_rows["reason"][i] or ""
        lost = not ok and reason.startswith(LOST)
        if (
            layout.shares_rows
        ):  # what the tables' owner has lost is still here; what failed here is in a file of its own
            ok, reason = ok or lost, own.get(first + i, "")
            lost = reason.startswith(LOST)
            ok = ok and not reason
        if ok or lost:
            digest = shard_rows["digest"][i] if "digest" in shard_rows else None
            yield PackedImage(key, shard_rows["bytes"][i], digest, lost)
        else:
            yield None


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


def pixels_document(layout: Layout, setting: str, shard_rows: int) -> dict[str, Any]:
    """`pixels` of the manifest."""
    return {
        "setting": setting,
        "folder": layout.packs(setting),
        "shard_rows": shard_rows,
        "quality": QUALITY,
        "subsampling": SUBSAMPLING,
    }


def pack_files(layout: Layout, journal: Journal, setting: str, num_shards: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, size and checksum) of every pack, as the journal has them: nothing is read twice."""
    array = layout.packs(setting)
    known = {record.shard: record.digest for record in journal.of(array)}
    for shard in range(num_shards):
        path = pack_path(layout.root / array, shard)
        found = layout.find(path)
        entry = {"bytes": found.stat().st_size, "digest": known[shard]} if shard in known else file_entry(found)
        yield layout.name_of(path), entry


def setting_in_force(config: Config, layout: Layout, plan: Mapping[str, Any], journal: Journal) -> str | None:
    """Whose packs the next manifest has: those of the one before, those that were asked for, those that are there."""
    before = read_manifest(layout.base)
    if before:
        return kept_setting(before) or (None if layout.under else config.cache.pixels)
    if plan.get("pixels"):
        return str(plan["pixels"])
    return complete_setting(layout, journal, plan)  # of a manifest that was lost


def complete_setting(layout: Layout, journal: Journal, plan: Mapping[str, Any]) -> str | None:
    """A setting whose packs are all counted and there; None where there is none."""
    num_rows, shard_rows = plan["inputs"]["images"]["rows"], plan["shard_rows"]
    for folder in sorted((layout.root / layout.packs("")).glob("jpeg-*")):
        array = layout.packs(folder.name)
        if all(
            journal.has(array, shard, min(shard_rows, num_rows - shard * shard_rows))
            and pack_path(folder, shard).exists()
            for shard in range(-(-num_rows // shard_rows))
        ):
            return folder.name
    return None
