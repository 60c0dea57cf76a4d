"""manifest.json: what a finished cache consists of, every file with its checksum. Written last; it decides what exists.

The manifest's own checksum lies beside it. Two files cannot be replaced in one step, so the checksum file is written
first and holds the lines of the old manifest and of the new one: whichever is there after a crash is vouched for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .durable import digest, to_json, write_bytes
from .errors import CacheError
from .layout import FORMAT, Layout
from .plan import parse_document


def file_entry(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, read whole."""
    data = path.read_bytes()
    return {"bytes": len(data), "digest": digest(data)}


def write_manifest(layout: Layout, document: Mapping[str, Any]) -> None:
    """Put a version of the cache into force."""
    data = to_json({"format": FORMAT, **document})
    known = [digest(layout.manifest.read_bytes())] if layout.manifest.exists() else []
    lines = [*known, digest(data)]
    write_bytes(layout.manifest_digest, "".join(f"{line}\n" for line in dict.fromkeys(lines)).encode())
    write_bytes(layout.manifest, data)


def read_manifest(layout: Layout) -> dict[str, Any] | None:
    """The manifest in force, or None for an unfinished cache.

    Raises:
        CacheError: if it was cut or edited, its checksum is missing, or its format is newer than this code.
    """
    if not layout.manifest.exists():
        return None
    data = layout.manifest.read_bytes()
    document = parse_document(layout.manifest, data)
    if not layout.manifest_digest.exists():
        raise CacheError(
            f"{layout.manifest_digest}: missing; without it nobody can tell whether manifest.json is whole"
        )
    if digest(data) not in layout.manifest_digest.read_text().split():
        raise CacheError(f"{layout.manifest}: not what dimefm wrote (its checksum differs); put the original back")
    return document
