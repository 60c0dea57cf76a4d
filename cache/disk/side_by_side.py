"""Chunk files mapped next to each other into one stretch of memory: a gather is then one copy for each row.

Gathering chunk by chunk costs some microseconds of Python for every chunk that a batch touches, which on thousands of
random rows is as much as the copying. Nothing holds a file open: a map outlives its file handle.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAP_FIXED = 0x10
"""Linux's value; Python's mmap module cannot place a map at an address."""


def advise(mapped: NDArray[Any], advice: int) -> None:
    """Say how the pages of a whole map will be read; nothing changes where the system has no ear for it.

    Unadvised, each page that is not in memory brings megabytes of its neighbours along: right for a scan, and hundreds
    of times too much for a row here and there.

    Args:
        mapped: from the first byte of a map to its last.
        advice: `mmap.MADV_RANDOM`, for example.
    """
    if mapped.nbytes:
        tell = ctypes.CDLL(None).madvise
        tell.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        tell(mapped.ctypes.data, mapped.nbytes, advice)


def map_side_by_side(paths: Sequence[Path], chunk_bytes: int) -> NDArray[np.uint8] | None:
    """Map files of equal size, one behind the other.

    Args:
        paths: files of exactly `chunk_bytes` each, which the caller has checked.

    Returns:
        (files x chunk_bytes,) read-only bytes; None where the system cannot do it: chunks that are not whole pages,
        another system than Linux, or a refused map. The caller then keeps one map for each file.
    """
    if sys.platform != "linux" or not paths or chunk_bytes % mmap.PAGESIZE:
        return None
    # The anonymous map reserves the addresses; unmapping it when the array goes unmaps the files that lie over it too.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        region = mmap.mmap(-1, len(paths) * chunk_bytes, flags=flags, prot=mmap.PROT_READ)
    except OSError:
        return None
    joined = np.frombuffer(region, dtype=np.uint8)
    place = ctypes.CDLL(None, use_errno=True).mmap
    place.restype = ctypes.c_void_p
    place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    for i, path in enumerate(paths):
        address = joined.ctypes.data + i * chunk_bytes
        handle = os.open(path, os.O_RDONLY)
        try:
            placed = place(address, chunk_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, handle, 0)
        finally:
            os.close(handle)
        if placed != address:
            return None
    return joined
