"""One writer at a time. The kernel drops the lock with its process, so a dead writer never blocks the next.

Whoever gets the lock of a cache first puts in order what a killed writer left.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..disk.durable import make_folder, sweep_partials
from ..disk.layout import Layout
from ..errors import CacheError
from .versions import complete_change


@contextmanager
def writer_lock(layout: Layout) -> Iterator[None]:
    """Hold the right to write a cache: no half-written file in it, no change that was decided and not finished.

    Raises:
        CacheError: at once, naming the holder, if another process writes.
    """
    with held(layout.lock, layout.root, "choose another cache.dir"):
        sweep_partials(layout.root)
        complete_change(layout)
        yield


@contextmanager
def held(lock: Path, folder: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file.

    Args:
        folder: what it guards, for messages.
        otherwise: what to do on a disk without locks.

    Raises:
        CacheError: at once, naming the holder, if another process has it.
    """
    make_folder(lock.parent)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise CacheError(f"{folder}: is being written by {holder}; wait for it or stop it") from error
        except OSError as error:
            raise CacheError(
                f"{lock}: this disk gives no locks ({error.strerror}); wanted one that does, so that no two processes "
                f"write there at once: {otherwise}"
            ) from error
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield
