"""Spare copies of what nothing else can bring back: the manifest, the plans, the masks, the row tables.

Embeddings, indexes and pairs can be computed again, from these and the sources. A copy is named after its checksum. It
lies in the log folder and nobody reads it, until a checksum says that the file itself is no longer what it was.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import xxhash

from ..disk.durable import digest, replacing, write_bytes
from ..disk.layout import Layout
from .schema import FileEntry

BLOCK_BYTES = 2**20
_KINDS = ("plan", "masks/", "rows/", "failed.parquet")


def has_spare(name: str) -> bool:
    """Whether a file of the manifest is one of those that are kept twice."""
    return name.startswith(_KINDS) and not name.endswith("zarr.json")


def keep_spares(layout: Layout, manifest: bytes, files: Mapping[str, FileEntry]) -> None:
    """Copy what a manifest that is about to be in force relies on, and the manifest itself."""
    for name, entry in files.items():
        target = _path(layout, entry.digest)
        if has_spare(name) and not (target.exists() and target.stat().st_size == entry.bytes):
            _copy(layout.root / name, target, entry.digest)
    write_bytes(_path(layout, digest(manifest)), manifest)


def drop_spares(layout: Layout, manifests: list[str], files: Mapping[str, FileEntry]) -> None:
    """Remove copies that belong to neither of the manifests that may be in force."""
    wanted = {*manifests, *(entry.digest for entry in files.values())}
    folder = _path(layout, "").parent
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in wanted:
            path.unlink()


def spare(layout: Layout, wanted: str) -> Path | None:
    """The copy of a file with this digest, whole; None where there is none."""
    path = _path(layout, wanted)
    return path if wanted and path.is_file() and _digest(path) == wanted else None


def spare_manifests(layout: Layout) -> list[str]:
    """Digests of the manifests among the copies, the newest version last."""
    found = []
    folder = _path(layout, "").parent
    for path in folder.iterdir() if folder.exists() else ():
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
    state = xxhash.xxh3_128()
    with suppress(_DamagedError, FileNotFoundError), replacing(target) as partial:
        with source.open("rb") as file, partial.open("wb") as out:
            while block := file.read(BLOCK_BYTES):
                state.update(block)
                out.write(block)
        if state.hexdigest() != wanted:
            raise _DamagedError
        return True
    return False


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def _path(layout: Layout, name: str) -> Path:
    return layout.root / "log" / "spare" / (name or "-")
