"""Writing so that a crash at any moment leaves either the old file or the new one, never half of one."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..errors import OS_ADVICE, CacheError

PARTIAL = ".partial"


def digest(*pieces: bytes | memoryview) -> str:
    """XXH3-128 of the pieces, one after the other, as 32 hex digits."""
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """XXH3-128 of a file, as `digest` gives it; memory stays small."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make what was written to a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each of them durable.

    Raises:
        CacheError: if the system refuses.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> CacheError:
    """One line for a full disk, a read-only one, a file where a folder should be."""
    advice = OS_ADVICE.get(error.errno or 0, "wanted a place that can be written")
    return CacheError(f"{path}: cannot be written: {error.strerror or error}; nothing that was there is lost; {advice}")


@dataclass(frozen=True)
class Attempt:
    """A file that is whole and durable under a name of its own, beside the place that it takes if it is committed.

    Several processes may make one file, and one of them more than once: each attempt has another name, and whoever
    keeps the books commits one of them. The others are removed by `sweep_partials`.

    Attributes:
        partial: where it is.
        path: the place.
        num_bytes: what was written.
        digest: of what was written.
    """

    partial: Path
    path: Path
    num_bytes: int
    digest: str

    def require_sound(self) -> None:
        """Read the file: another machine wrote it, and this one's view of the disk is what counts.

        Raises:
            CacheError: if it is missing, or its size or checksum is not what was written.
        """
        try:
            num_bytes = self.partial.stat().st_size
            is_sound = num_bytes == self.num_bytes and file_digest(self.partial) == self.digest
        except OSError as error:
            raise CacheError(
                f"{self.path}: what was written for it is not there ({error.strerror or error}); wanted "
                f"{self.num_bytes:,} bytes in {self.partial}"
            ) from error
        if not is_sound:
            raise CacheError(
                f"{self.path}: what was written for it is other bytes than its writer says ({num_bytes:,} are there, "
                f"wanted {self.num_bytes:,} with checksum {self.digest})"
            )

    def commit(self) -> None:
        """Move the file to its place, durably; what is there is replaced.

        Raises:
            CacheError: if the system refuses; the attempt is removed then.
        """
        _put_in_place(self.partial, self.path)

    def discard(self) -> None:
        """Remove the file: another attempt counts."""
        self.partial.unlink(missing_ok=True)


@contextmanager
def _removed_on_failure(partial: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def _put_in_place(partial: Path, path: Path) -> None:
    with _removed_on_failure(partial, path):
        os.replace(partial, path)  # noqa: PTH105 - the tests that kill between the steps patch os.fsync and os.replace
    sync_folder(path.parent)


@contextmanager
def attempting(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and stays, on failure removed.

    Raises:
        CacheError: if the system refuses: a full disk, a read-only one, no permission.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    with _removed_on_failure(partial, path):
        yield partial
        sync_file(partial)


def attempt_bytes(path: Path, data: bytes | memoryview) -> Attempt:
    """Write a whole file beside its place.

    Raises:
        CacheError: as `attempting`.
    """
    with attempting(path) as partial:
        partial.write_bytes(data)
    return Attempt(partial, path, len(data), digest(data))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, on failure removed.

    Raises:
        CacheError: as `attempting`.
    """
    with attempting(path) as partial:
        yield partial
    _put_in_place(partial, path)


def share_file(source: Path, target: Path) -> None:
    """Give a finished file a second name, durably; a copy where the file system has no links.

    Files of a cache are replaced and never changed in place, so neither name sees what becomes of the other.

    Raises:
        CacheError: if the system refuses.
    """
    target.unlink(missing_ok=True)  # two names of one file: a rename would leave both
    with replacing(target) as partial:
        try:
            os.link(source, partial)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, partial)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file durably: temporary name, fsync, rename, fsync of the folder."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def to_json(value: Any) -> bytes:
    """JSON with sorted keys, so that equal values are equal bytes.

    Raises:
        ValueError: for NaN and infinities: they are no JSON, and strict readers refuse the whole file.
    """
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document durably.

    Raises:
        ValueError: as `to_json`; nothing is written then.
        CacheError: if the system refuses.
    """
    write_bytes(path, to_json(value))


def to_json_line(value: Any) -> bytes:
    """One line of a file that `append_line` writes. NaN and infinities raise ValueError, as in `to_json`."""
    return (json.dumps(value, sort_keys=True, allow_nan=False) + "\n").encode()


def append_line(path: Path, value: Any, *, durable: bool = True) -> None:
    """Add one JSON line and fsync it. A kill in the middle leaves a torn last line, which `read_lines` drops.

    Raises:
        ValueError: as `to_json_line`; nothing is written then.
        CacheError: if the system refuses.
    """
    line = to_json_line(value)
    try:
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line  # fence off a torn line, or it would swallow this one
            file.write(line)
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON lines of a file that `append_line` wrote; torn ones are left out, a missing file has none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def sweep_partials(root: Path) -> None:
    """Remove what a killed writer left half written below a folder, and attempts that were never committed.

    Only the one writer may call this, when nothing that it still counts on is uncommitted. A process that was given up
    and still writes there finds its file gone, and nobody waits for it.
    """
    for partial in list(root.rglob(f".*{PARTIAL}")):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
