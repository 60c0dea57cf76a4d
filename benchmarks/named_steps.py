"""Names for the moments at which a writer of a cache can be killed: before and after each change of what is on disk.

That is every fsync, rename, new folder or link, and every removal. Between two of them only the bytes of a file under a
temporary name, or of a line at the end of a log, change.
"""

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dimefm.cache.disk.durable import PARTIAL

KINDS = {
    r"log/shards\.jsonl": "journal",
    r"log/.*": "log",
    r"teacher\.zarr/.*/c(/\d+)*": "embeddings",
    r"pairs[^/]*\.zarr/.*/c(/\d+)*": "pairs",
    r".*zarr\.json": "zarr.json",
    r"pixels(/.*)?": "pixels",
    r"[^/]+\.zarr(/.*)?": "folder of a store",
    r"rows(/.*)?": "rows",
    r"index(/.*)?": "index",
    r"text_tower.*": "text tower",
    r"(plan[-\d]*|growing)\.json": "plan",
}
"""What a file is, by its name in the cache; others are called by their names."""


CHANGES = {
    "unlink": (0, "removal"),
    "rmdir": (0, "removal"),
    "mkdir": (0, "new"),
    "link": (1, "link"),
    "symlink": (1, "link"),
}
"""Functions of `os` that change one name on disk: which argument that is, and what the step is called."""


class Steps:
    """Names every moment before and after such a change, counts them, and kills at one of them."""

    def __init__(self, root: Path, kill_at: tuple[str, int] | None = None) -> None:
        self.names: list[str] = []
        self._root, self._kill_at = root, kill_at
        self._counts: Counter[str] = Counter()
        self._here, self._lock = threading.local(), threading.Lock()
        self._fsync, self._replace = os.fsync, os.replace
        os.fsync, os.replace = self.fsync, self.replace  # type: ignore[assignment]
        os.rename = self.replace  # type: ignore[assignment]
        for function, (position, what) in CHANGES.items():
            setattr(os, function, self._counted(getattr(os, function), position, what))

    def fsync(self, handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        name = f"folder of {getattr(self._here, 'last', 'new folders')}" if path.is_dir() else self._kind(path)
        self._step(f"{name}, before fsync")
        self._fsync(handle)
        self._step(f"{name}, after fsync")

    def replace(self, source: Path, target: Path) -> None:
        before, after = (self._kind(Path(path)).partition(" ")[0] for path in (source, target))
        moved = f" out of {before}" if before in ("next", "mend") and before != after else ""
        self._here.last = name = self._kind(Path(target)) + moved
        self._step(f"{name}, before rename")
        self._replace(source, target)
        self._step(f"{name}, after rename")

    def _counted(self, change: Callable[..., None], position: int, what: str) -> Callable[..., None]:
        """One of `os`'s functions with a step before and after it, where it concerns the cache."""

        def counted(*names: Any, dir_fd: int | None = None, **options: Any) -> None:
            if dir_fd is not None:
                options["dir_fd"] = dir_fd
            folder = Path(f"/proc/self/fd/{dir_fd}").readlink() if dir_fd is not None else Path()
            path = folder / os.fsdecode(names[position])
            if not path.is_relative_to(self._root):
                change(*names, **options)
                return
            self._step(f"{self._kind(path)}, before {what}")
            change(*names, **options)
            self._step(f"{self._kind(path)}, after {what}")

        return counted

    def _kind(self, path: Path) -> str:
        name = path.relative_to(self._root).as_posix() if path.is_relative_to(self._root) else path.name
        name = re.sub(rf"(^|/)\.([^/]+)\.[0-9a-f]{{12}}{re.escape(PARTIAL)}", r"\1\2", name)
        stage, _, below = name.partition("/")
        staged, name = (f"{stage} ", below) if stage in ("next", "mend") and below else ("", name)
        return staged + next((kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, name)), name)

    def _step(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            self._counts[name] += 1
            if self._kill_at == (name, self._counts[name]):
                os.kill(os.getpid(), signal.SIGKILL)
