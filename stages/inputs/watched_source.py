"""Images that are looked at while they are read: is each still of the size that stage one embedded it with?

Worker processes import this file: it does without what opens a cache (pyarrow, zarr).
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .image_source import FoundImage, ImageSource


class WatchedSource(ImageSource):
    """Another source, and note of the rows whose image has another size than the row table says.

    It costs no look at a file: the size is that of what was read. All workers of this process note into one piece of
    memory, a byte for each row.
    """

    def __init__(self, source: ImageSource, num_rows: int) -> None:
        """Watch a source.

        Args:
            num_rows: of the row table that keys are made of.
        """
        self.source = source
        self.name, self.location, self.absent = source.name, source.location, source.absent
        self.columns = ("row", "bytes", *source.columns)
        self._changed = multiprocessing.get_context("forkserver").RawArray(ctypes.c_uint8, num_rows)

    @property
    def changed(self) -> NDArray[np.int64]:
        """Rows that were read so far and had another size, ascending."""
        return np.flatnonzero(np.frombuffer(memoryview(self._changed), dtype=np.uint8)).astype(np.int64)

    def at_hand(self) -> bool:
        return self.source.at_hand()

    def list(self) -> Sequence[FoundImage]:
        return self.source.list()

    def read(self, key: Any) -> bytes:
        row, size, *parts = key
        data = self.source.read(self._own(parts))
        if size is not None and len(data) != size:
            self._changed[row] = 1
        return data

    def stat(self, key: Any) -> tuple[int, int]:
        return self.source.stat(self._own(key[2:]))

    def passes_over(self, name: str) -> bool:
        return self.source.passes_over(name)

    def digest(self, key: Any) -> str | None:
        return self.source.digest(self._own(key[2:]))

    def locate(self, key: Any) -> str:
        return self.source.locate(self._own(key[2:]))

    def _own(self, parts: Sequence[Any]) -> Any:
        return parts[0] if len(self.source.columns) == 1 else tuple(parts)
