"""Copying rows out of maps: on the spot where their pages are in memory, by threads where a disk has to be waited for.

A thread that touches a page which is not there waits for it, some hundred microseconds each time, and a disk answers
many at once. Whether there is anything to wait for shows in the major page faults of the first rows.
"""

import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = 16
"""At most; they wait rather than work, so it is no matter of cores."""

ITEMS_PER_PIECE = 16
"""What a thread takes at a time."""

LOOKED_AT = 64
"""Items that are touched before it is asked whether there was anything to wait for, from all over: rows in ascending
order may be in memory at their beginning alone."""

_THIS_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)


class Items:
    """Pieces of equal size of mapped chunks, counted through all of them: rows, or views of rows."""

    def __init__(self, chunks: Sequence[NDArray[Any]], joined: NDArray[np.uint8] | None, num_bytes: int) -> None:
        """Args:
        chunks: whole chunks, equally long.
        joined: the bytes of all of them in a row, where they are mapped so.
        num_bytes: of an item.
        """
        # One opaque number for all bytes of an item: it is copied in one go.
        self.dtype = np.dtype((np.void, num_bytes))
        self._chunks = [chunk.reshape(-1).view(self.dtype) for chunk in chunks]
        self._joined = None if joined is None else joined.view(self.dtype)

    def take(self, items: NDArray[np.int64]) -> NDArray[np.void]:
        """Copy items, which must exist, into a new array; lets other threads run meanwhile."""
        if self._joined is not None:
            return self._joined.take(items)
        out = np.empty(len(items), dtype=self.dtype)
        order = np.argsort(items)
        items = items[order]
        in_chunk = len(self._chunks[0]) if self._chunks else 1
        chunk_of = items // in_chunk
        offset = items - chunk_of * in_chunk
        edges = [0, *(np.flatnonzero(np.diff(chunk_of)) + 1).tolist(), len(items)]
        for start, stop in pairwise(edges) if len(items) else []:
            out[order[start:stop]] = self._chunks[chunk_of[start]].take(offset[start:stop])
        return out


def gather(sparse: Items, plain: Items, items: NDArray[np.int64]) -> NDArray[np.void]:
    """Copy items from here and there, in the order asked for, and wait for many pages at once where they are on disk.

    Pages that are missing are brought through a map that brings no others. Everything is copied through a plain one:
    what is read through an advised map does not count as used, and is the first to go when memory is short.

    Args:
        sparse, plain: the same items, of a map advised for random reads and of one without advice.
        items: (n,) numbers that exist.

    Returns:
        (n,) items.
    """
    sample = items[:: max(1, len(items) // LOOKED_AT)]
    for few in (sample[::4], sample):
        waits = _waits()
        sparse.take(few)
        if _waits() > waits and len(items) > ITEMS_PER_PIECE:
            _touch_in_threads(sparse, items)
            break
    # A missing page among many that are there is read with its neighbours: with those of them that are missing, too.
    return plain.take(items)


def _touch_in_threads(source: Items, items: NDArray[np.int64]) -> None:
    pieces = [items[start : start + ITEMS_PER_PIECE] for start in range(0, len(items), ITEMS_PER_PIECE)]
    # Threads of their own each time: they cost less than the pages of one piece, and a fork finds none.
    with ThreadPoolExecutor(min(THREADS, len(pieces)), thread_name_prefix="gather") as pool:
        for _ in pool.map(source.take, pieces):
            pass


def _waits() -> int:
    """Pages that this thread has waited for so far."""
    return resource.getrusage(_THIS_THREAD).ru_majflt
