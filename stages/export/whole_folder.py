"""A folder that is there whole or not at all, whenever its writer is killed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...cache.disk.durable import cannot_write, make_folder, sync_file, sync_folder
from ...cache.errors import InputError
from ...cache.version.lock import held

MARK = "export.json"
"""Written into each export: a folder without it is somebody else's."""


def require_free(path: Path) -> None:
    """Refuse a path that holds anything but an export of before.

    Raises:
        InputError: if it does.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"--out {path}: there is a file; wanted a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not (path / MARK).is_file():
        raise InputError(
            f"--out {path}: a folder that is no export of dimefm (no {MARK}); wanted one that does not exist yet"
        )


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path`, on failure it is removed.

    An export that is there already goes once the new one is whole; killed between the two, none is there.

    Raises:
        InputError: as `require_free`.
        CacheError: if another process writes the same export, or the system refuses.
    """
    path = path.absolute()
    unfinished, before = (path.with_name(f".{path.name}.{part}") for part in ("new", "before"))
    lock = path.with_name(f".{path.name}.lock")
    with held(lock, path, "choose another --out"):
        try:
            require_free(path)
            for leftover in (unfinished, before):  # a killed run's
                shutil.rmtree(leftover, ignore_errors=True)
            make_folder(unfinished)
            yield unfinished
            try:
                for file in unfinished.rglob("*"):
                    if file.is_file():
                        sync_file(file)
                sync_folder(unfinished)
                if path.exists():
                    path.rename(before)
                unfinished.rename(path)
            except OSError as error:
                raise cannot_write(path, error) from error
            sync_folder(path.parent)
        finally:
            if before.exists() and not path.exists():  # the last step failed: what was there stays
                before.rename(path)
            for leftover in (unfinished, before):
                shutil.rmtree(leftover, ignore_errors=True)
            lock.unlink(missing_ok=True)
