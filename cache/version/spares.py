"""Spare copies of what nothing else can bring back: the manifest, the plans, the masks, the row tables.

Embeddings, indexes and pairs can be computed again, from these and the sources. A copy is named after its checksum and
lies in `log/spare/`. Nobody reads it until a checksum says that the file itself is damaged.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ..disk.durable import digest, file_digest, replacing, write_bytes
from ..disk.layout import Layout
from .schema import FileEntry

_KINDS = ("plan", "masks/", "rows/", "failed.parquet")


def has_spare(name: str) -> bool:
    """Whether a file of the manifest is one of those that are kept twice."""
    return name.startswith(_KINDS) and not name.endswith("zarr.json")


def keep_spares(layout: Layout, manifest: bytes, files: Mapping[str, FileEntry]) -> None:
    """Copy a manifest that is about to be in force and the files that it relies on, where no sound copy is there."""
    for name, entry in files.items():
        if has_spare(name) and spare(layout, entry.digest) is None:
            _copy(layout.root / name, layout.spares / entry.digest, entry.digest)
    write_bytes(layout.spares / digest(manifest), manifest)


def drop_spares(layout: Layout, manifests: list[str], files: Mapping[str, FileEntry]) -> None:
    """Remove copies that belong to neither of the manifests that may be in force."""
    wanted = {*manifests, *(entry.digest for entry in files.values())}
    for path in layout.spares.iterdir() if layout.spares.exists() else ():
        if path.name not in wanted:
            path.unlink()


def renew_spares(layout: Layout, files: Mapping[str, FileEntry], damaged: Iterable[str]) -> dict[str, str]:
    """Make damaged or missing copies again whose originals are sound; remove those of earlier versions.

    Args:
        files: of the manifest in force.
        damaged: the copies, as names below the cache.

    Returns:
        The copies that are in order now, and what was done.
    """
    manifest, done = layout.manifest.read_bytes(), {}
    keep_spares(layout, manifest, files)
    wanted = {digest(manifest), *(entry.digest for entry in files.values())}
    for name in damaged:
        path = layout.root / name
        if path.name not in wanted:
            path.unlink(missing_ok=True)
            done[name] = "removed: a copy of a file of an earlier version"
        elif spare(layout, path.name) is not None:
            done[name] = "copied again from the original"
    return done


def spare(layout: Layout, wanted: str) -> Path | None:
    """The copy of a file with this digest; None where there is no sound one."""
    path = layout.spares / wanted
    return path if path.is_file() and file_digest(path) == wanted else None


def spare_manifests(layout: Layout) -> list[str]:
    """Digests of the manifests among the copies, the newest version last."""
    found = []
    for path in layout.spares.iterdir() if layout.spares.exists() else ():
        with suppress(ValueError, TypeError):
            if path.stat().st_size < 2**28 and path.read_bytes()[:1] == b"{" and spare(layout, path.name):
                document = json.loads(path.read_bytes())
                if "files" in document:
                    found.append((int(document["version"]), path.name))
    return [name for _, name in sorted(found)]


def put_back(layout: Layout, name: str, wanted: str) -> bool:
    """Replace a damaged file by its spare copy; False where there is no sound one."""
    copy = spare(layout, wanted)
    return copy is not None and _copy(copy, layout.root / name, wanted)


class _DamagedError(Exception):
    """A copy that must not be kept."""


def _copy(source: Path, target: Path, wanted: str) -> bool:
    """Copy a file durably, unless its bytes are not those wanted: damage must not replace a sound copy."""
    if not source.is_file():
        return False
    with suppress(_DamagedError), replacing(target) as partial:
        shutil.copyfile(source, partial)
        if file_digest(partial) != wanted:
            raise _DamagedError
        return True
    return False
