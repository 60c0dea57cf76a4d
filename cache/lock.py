"""One writer at a time. The kernel drops the lock with its process, so a dead writer never blocks the next.

Whoever gets the lock first puts in order what a killed writer left.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from .durable import make_folder, sweep_partials
from .errors import CacheError
from .layout import Layout
from .versions import complete_change


@contextmanager
def writer_lock(layout: Layout) -> Iterator[None]:
    """Hold the right to write a cache: no half-written file in it, no change that was decided and not finished.

    Raises:
        CacheError: at once, naming the holder, if another process writes.
    """
    make_folder(layout.lock.parent)
    with layout.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise CacheError(f"{layout.root}: is being written by {holder}; wait for it or stop it") from error
        except OSError as error:
            raise CacheError(
                f"{layout.lock}: this disk gives no locks ({error.strerror}); wanted one that does, so that no two "
                "processes write a cache at once: choose another cache.dir"
            ) from error
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        sweep_partials(layout.root)
        complete_change(layout)
        yield
