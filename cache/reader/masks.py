"""Masks: named choices of rows. A run selects a subset by a mask's name; nothing that is there is written again.

A mask never changes, since runs are recorded with it: another choice is another name.
"""

import io
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..disk.durable import digest, replacing
from ..disk.layout import SIDES, Layout
from ..errors import CacheError, InputError
from ..version.lock import writer_lock
from ..version.manifest import file_entry, read_manifest
from ..version.schema import Manifest
from ..version.versions import put_in_force

Side = Literal["images", "sentences"]
MASK_COLUMNS = pa.schema([("row", pa.int64()), ("keep", pa.bool_())])
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_mask_name(name: str) -> None:
    """Refuse a name that cannot be a mask's; before a long search, not after it.

    Raises:
        InputError: if it is unfit.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"mask {name!r}: the name becomes a file; wanted letters, digits, '_', '.' and '-'")


def add_mask(layout: Layout, side: Side, name: str, keep: NDArray[np.bool_], *, rows_since: bool = False) -> None:
    """Give a choice of rows a name, in a new version of the cache.

    Args:
        keep: (N,) bool, one for each row of the side.
        rows_since: the cache may have grown while the choice was made; what has come since is not chosen.

    Raises:
        InputError: if the name is unfit or is another choice's already.
        CacheError: if the cache is unfinished or is being written by another process.
        ValueError: if `keep` is of another length than the side.
    """
    check_mask_name(name)
    with writer_lock(layout):
        manifest = read_manifest(layout)
        if manifest is None:
            raise CacheError(f"{layout.root}: unfinished (no manifest.json); run `dimefm cache-teacher` to finish it")
        num_rows = manifest.arrays[SIDES[side]].rows
        if rows_since and keep.ndim == 1:
            keep = np.concatenate([keep, np.zeros(max(0, num_rows - len(keep)), dtype=np.bool_)])
        if keep.shape != (num_rows,) or keep.dtype != np.bool_:
            raise ValueError(f"mask of {side}: {keep.dtype} {keep.shape}, wanted bool ({num_rows},)")
        if name in mask_names(manifest, side):
            there = read_mask(layout, manifest, side, name, num_rows)
            if np.array_equal(there, keep):
                return
            raise InputError(
                f"{layout.root}: has another mask of {side} named {name!r}, which runs may be recorded with; "
                "choose another name"
            )
        path = layout.mask(side, name)
        with replacing(path) as partial:
            pq.write_table(pa.table([pa.array(np.arange(num_rows)), pa.array(keep)], schema=MASK_COLUMNS), partial)
        files = {**manifest.files, layout.name_of(path): file_entry(path)}
        put_in_force(layout, manifest.replace(version=manifest.version + 1, files=files))


def read_mask(layout: Layout, manifest: Manifest, side: str, name: str, num_rows: int) -> NDArray[np.bool_]:
    """A mask as the manifest has it.

    Returns:
        (num_rows,) bool; rows that came after the mask are not chosen.

    Raises:
        InputError: if there is no such mask; it names those that there are.
        CacheError: if its file is missing or damaged.
    """
    wanted, path = mask_digest(layout, manifest, side, name), layout.mask(side, name)
    data = path.read_bytes() if path.exists() else b""
    if digest(data) != wanted:
        raise CacheError(f"{path}: missing or damaged (its checksum differs); make the mask again under another name")
    keep = np.array(pq.read_table(io.BytesIO(data)).column("keep"), dtype=np.bool_)
    return np.concatenate([keep, np.zeros(max(0, num_rows - len(keep)), dtype=np.bool_)])[:num_rows]


def mask_digest(layout: Layout, manifest: Manifest, side: str, name: str) -> str:
    """Digest of a mask's file, from the manifest.

    Raises:
        InputError: if there is no such mask.
    """
    entry = manifest.files.get(layout.name_of(layout.mask(side, name)))
    if entry is None:
        there = ", ".join(mask_names(manifest, side)) or "none"
        raise InputError(f"{side}.mask = {name!r}: {layout.root} has no such mask of {side}; it has: {there}")
    return entry.digest


def mask_names(manifest: Manifest, side: str) -> list[str]:
    """Names of the masks over one side."""
    files = (Path(name) for name in manifest.files)
    return sorted(path.stem for path in files if path.parts[:2] == ("masks", side))
