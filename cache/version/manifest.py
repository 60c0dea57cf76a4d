"""manifest.json: what a finished cache consists of, every file with its checksum. Written last; it decides what exists.

The manifest's own checksum lies beside it. Two files cannot be replaced in one step, so the checksum file is written
first and holds the lines of the old manifest and of the new one: whichever is there after a crash is vouched for. Its
last line is the checksum of the lines before it.
"""

from collections.abc import Iterable
from pathlib import Path

from ..disk.durable import digest, file_digest, write_bytes
from ..disk.layout import Layout
from ..errors import CacheError
from .schema import FileEntry, Manifest, refuse_newer
from .spares import drop_spares, keep_spares, spare_manifests


def file_entry(path: Path) -> FileEntry:
    """Size and checksum of a file."""
    return FileEntry(bytes=path.stat().st_size, digest=file_digest(path))


def write_manifest(layout: Layout, manifest: Manifest) -> None:
    """Put a version of the cache into force."""
    data = manifest.to_bytes()
    known = [digest(layout.manifest.read_bytes())] if layout.manifest.exists() else []
    kept = not layout.under  # a version in the making becomes the cache's own with another call of this
    if kept:
        keep_spares(layout, data, manifest.files)
    write_bytes(layout.manifest_digest, digest_lines([*known, digest(data)]))
    write_bytes(layout.manifest, data)
    if kept:
        drop_spares(layout, [*known, digest(data)], manifest.files)


def digest_lines(digests: Iterable[str]) -> bytes:
    """manifest.xxh3: the checksums of manifests, a line each, and the checksum of these lines."""
    lines = "".join(f"{line}\n" for line in dict.fromkeys(digests)).encode()
    return lines + f"{digest(lines)}\n".encode()


def vouched_digests(layout: Layout) -> tuple[list[str], bool]:
    """Checksums of the manifests that may be in force, and whether the file that has them is whole."""
    data = layout.manifest_digest.read_bytes() if layout.manifest_digest.exists() else b""
    lines = data.decode("ascii", "replace").splitlines()
    if len(lines) > 1 and digest_lines(lines[:-1]) == data:
        return lines[:-1], True
    return lines, False  # cut or changed, yet what is left of it may vouch; early caches had no checksum in it


def trusted_copy(layout: Layout) -> str | None:
    """Digest of the spare copy to go by where the manifest itself is damaged; None where there is none."""
    vouched, whole = vouched_digests(layout)
    copies = spare_manifests(layout)
    if whole:
        return next((line for line in reversed(vouched) if line in copies), None)
    return copies[-1] if copies else None  # an older one may be all that is still vouched for


def read_manifest(layout: Layout) -> Manifest | None:
    """The manifest in force, or None for an unfinished cache.

    Raises:
        CacheError: if it was cut or edited, its checksum is missing, or its format is newer than this code.
    """
    if not layout.manifest.exists():
        return None
    data = layout.manifest.read_bytes()
    refuse_newer(layout.manifest, data)
    if not layout.manifest_digest.exists():
        raise CacheError(
            f"{layout.manifest_digest}: missing; without it nobody can tell whether manifest.json is whole"
        )
    if digest(data) not in vouched_digests(layout)[0]:
        raise CacheError(f"{layout.manifest}: not what dimefm wrote (its checksum differs); put the original back")
    return Manifest.parse(layout.manifest, data)
