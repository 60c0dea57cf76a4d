"""From one version of a cache to the next: the version in force stays whole until the next one is, whatever happens.

What has a new name in every version (indexes, pairs, plans) lies beside the old and becomes the cache's with the
manifest that names it. What keeps its name (row tables, zarr.json, the last chunk of an array) is made in `next/` and
moved. `next/manifest.json` decides: before it is there, `next/` is work in progress and the cache knows nothing of it;
afterwards whoever writes next moves the files into place, those that were moved already being no longer in `next/`.
Rows that existed keep their bytes in all of these files, so readers may come at any moment.
"""

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from ..disk.durable import PARTIAL, make_folder, sync_folder
from ..disk.layout import Layout
from ..errors import CacheError
from .journal import Journal
from .manifest import read_manifest, write_manifest
from .schema import Manifest

TABLES = ("rows/", "failed.parquet")
"""What says which rows have an embedding."""


def put_in_force(layout: Layout, manifest: Manifest) -> None:
    """Make this the cache's manifest; of a version in the making, move its files into place as well.

    Files of the version before that are no longer part of the cache are listed as `superseded` and stay, for readers
    that have them open, until the next change that supersedes any.

    Args:
        manifest: its `superseded` is ignored.
    """
    before = read_manifest(layout.base)
    older = before.superseded if before else []
    superseded = sorted(set(before.files) - set(manifest.files)) if before else []
    if superseded:
        for name in set(older) - set(manifest.files):
            _remove(layout.base.root, name)
    write_manifest(layout, manifest.replace(superseded=superseded or older))
    if layout.under:
        complete_change(layout.base)


def complete_change(layout: Layout) -> None:
    """Finish a change that was decided, by this process or by one that was killed. For the one writer only."""
    _take_mended(layout)
    following = layout.next
    manifest = read_manifest(following)
    if manifest is None:
        return
    # The new length last of all: a reader that goes by it alone finds every row. A row that has become good has its
    # embedding before its table says so; one that was given up is marked before its embedding goes.
    tables_last = _num_failed(following) < _num_failed(layout)

    def turn(name: str) -> tuple[bool, bool, str]:
        return name.endswith("zarr.json"), tables_last and name.startswith(TABLES), name

    for name in sorted(manifest.files, key=turn):
        if (following.root / name).exists():
            move_file(following.root / name, layout.root / name)
    Journal(layout).take_over(following)
    if not layout.manifest.exists() or layout.manifest.read_bytes() != following.manifest.read_bytes():
        write_manifest(layout, manifest)
    discard_change(layout)


def _num_failed(layout: Layout) -> int:
    with suppress(CacheError):  # a damaged manifest is about to be replaced
        if manifest := read_manifest(layout):
            return sum(entry.failed for entry in manifest.arrays.values())
    return 0


def _take_mended(layout: Layout) -> None:
    """A repair that was decided becomes the next version; an append under way stood on the damaged one and goes."""
    mend = layout.mend
    if not mend.manifest.exists():
        return
    try:
        mended, current = read_manifest(mend), read_manifest(layout)
    except CacheError:  # one of the two is damaged: another repair will see to it
        return
    if mended and current and mended.version == current.version + 1:
        discard_change(layout)
        os.replace(mend.root, layout.next.root)  # noqa: PTH105 - as below
        sync_folder(layout.root)


def discard_change(layout: Layout) -> None:
    """Remove `next/`: all of it or, for those who look, nothing."""
    if layout.next.root.exists():
        rest = layout.root / f".next.{uuid.uuid4().hex[:12]}{PARTIAL}"
        os.replace(layout.next.root, rest)  # noqa: PTH105 - as below
        sync_folder(layout.root)
        shutil.rmtree(rest)


def move_file(source: Path, target: Path) -> None:
    """Move a file that is on disk to its place, durably; it replaces what is there."""
    make_folder(target.parent)
    os.replace(source, target)  # noqa: PTH105 - the tests that kill between the steps patch os.replace
    sync_folder(target.parent)


def _remove(root: Path, name: str) -> None:
    path = root / name
    path.unlink(missing_ok=True)
    for folder in path.parents:  # a store of pairs is many small folders
        if folder == root or (folder.is_dir() and any(folder.iterdir())):
            return
        if folder.is_dir():
            folder.rmdir()
