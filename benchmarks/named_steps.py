"""Names for the moments at which a writer of a cache can be killed: before and after each fsync and each rename."""

import os
import re
import signal
import threading
from collections import Counter
from pathlib import Path

from dimefm.cache.durable import PARTIAL

KINDS = {
    r"log/shards\.jsonl": "journal",
    r"log/.*": "log",
    r"teacher\.zarr/.*/c(/\d+)*": "embeddings",
    r"pairs[^/]*\.zarr/.*/c(/\d+)*": "pairs",
    r".*zarr\.json": "zarr.json",
    r"pixels(/.*)?": "pixels",
    r"rows/.*": "rows",
    r"index/.*": "index",
    r"text_tower.*": "text tower",
    r"(plan[-\d]*|growing)\.json": "plan",
}
"""What a file is, by its name in the cache; others are called by their names."""


class Steps:
    """Names every moment before and after an fsync and a rename, counts them, and kills at one of them."""

    def __init__(self, root: Path, kill_at: tuple[str, int] | None = None) -> None:
        self.names: list[str] = []
        self._root, self._kill_at = root, kill_at
        self._counts: Counter[str] = Counter()
        self._here, self._lock = threading.local(), threading.Lock()
        self._fsync, self._replace = os.fsync, os.replace
        os.fsync, os.replace = self.fsync, self.replace  # type: ignore[assignment]

    def fsync(self, handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        name = f"folder of {getattr(self._here, 'last', 'new folders')}" if path.is_dir() else self._kind(path)
        self._step(f"{name}, before fsync")
        self._fsync(handle)
        self._step(f"{name}, after fsync")

    def replace(self, source: Path, target: Path) -> None:
        moved = "next/" in str(source) and "next/" not in str(target)
        self._here.last = name = self._kind(Path(target)) + (" out of next" if moved else "")
        self._step(f"{name}, before rename")
        self._replace(source, target)
        self._step(f"{name}, after rename")

    def _kind(self, path: Path) -> str:
        name = path.relative_to(self._root).as_posix() if path.is_relative_to(self._root) else path.name
        name = re.sub(rf"(^|/)\.([^/]+)\.[0-9a-f]{{12}}{re.escape(PARTIAL)}", r"\1\2", name)
        staged, name = ("next ", name.removeprefix("next/")) if name.startswith("next/") else ("", name)
        return staged + next((kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, name)), name)

    def _step(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            self._counts[name] += 1
            if self._kill_at == (name, self._counts[name]):
                os.kill(os.getpid(), signal.SIGKILL)
