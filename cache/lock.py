"""One writer at a time. The kernel drops the lock with its process, so a dead writer never blocks the next."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from .durable import make_folder
from .errors import CacheError
from .layout import Layout


@contextmanager
def writer_lock(layout: Layout) -> Iterator[None]:
    """Hold the right to write a cache.

    Raises:
        CacheError: at once, naming the holder, if another process writes.
    """
    make_folder(layout.lock.parent)
    with layout.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise CacheError(f"{layout.root}: is being written by {holder}; wait for it or stop it") from error
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield
