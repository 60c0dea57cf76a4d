"""Reading every byte of a cache once: the checksum of each file and, on the way, what its rows hold.

Several threads read: both the reads and XXH3 over blocks of this size let go of the interpreter.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..disk.cores import usable_cores
from .inventory import Piece

BLOCK_BYTES = 2**21
"""What is read at a time: little enough for a core's cache while it is hashed and looked through, and so much that
threads seldom meet at the interpreter's lock: with a quarter of it two of them are half as fast."""

MAX_THREADS = 16

_NONE = np.empty(0, dtype=np.int64)
_THREAD = local()


@dataclass(frozen=True)
class Scanned:
    """What is in one file.

    Attributes:
        piece: what the manifest says of it.
        num_bytes: its size; -1 where it is missing.
        digest: XXH3-128 of its bytes; empty where it could not be read.
        problem: why it could not be read.
        not_finite: of embeddings, rows with a NaN or an infinity in them.
        zero: of embeddings, rows that are all zero.
        ids: of ids, the smallest and the largest.
    """

    piece: Piece
    num_bytes: int
    digest: str = ""
    problem: str = ""
    not_finite: NDArray[np.int64] = field(default_factory=lambda: _NONE)
    zero: NDArray[np.int64] = field(default_factory=lambda: _NONE)
    ids: tuple[int, int] = (-1, -1)

    @property
    def sound(self) -> bool:
        """Whether every byte is as it was written."""
        return self.digest == self.piece.digest


def scan(files: Sequence[tuple[Piece, Path]], progress: Callable[[int], None] | None = None) -> Iterator[Scanned]:
    """Read files, several at a time, and yield what is in each, in the order given.

    Args:
        progress: called with the bytes read so far.

    Raises:
        OSError: where the machine refuses (rights, file handles), which is not the file's damage.
    """
    done = 0
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores()), thread_name_prefix="scan") as pool:
        try:
            for found in pool.map(scan_file, *zip(*files, strict=True)) if files else ():
                done += max(0, found.num_bytes)
                if progress:
                    progress(done)
                yield found
        finally:
            pool.shutdown(cancel_futures=True)


def scan_file(piece: Piece, path: Path) -> Scanned:
    """Read one file."""
    state, rows = xxhash.xxh3_128(), _RowScan(piece)
    step = max(1, BLOCK_BYTES // piece.row_bytes) * piece.row_bytes if piece.row_bytes else BLOCK_BYTES
    buffer = _buffer(step)
    done = 0
    try:
        with path.open("rb") as file:
            while count := file.readinto(buffer):  # full but for the last one
                state.update(buffer[:count])
                rows.update(buffer[:count])
                done += count
    except FileNotFoundError:
        return Scanned(piece, -1)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EISDIR, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG):
            raise
        return Scanned(piece, done, problem=error.strerror or str(error))
    if done != piece.num_bytes:
        return Scanned(piece, done, state.hexdigest())
    not_finite, zero = np.concatenate(rows.not_finite), np.concatenate(rows.zero)
    return Scanned(piece, done, state.hexdigest(), "", not_finite, zero, rows.ids)


class _RowScan:
    """Rows of a chunk file that are not finite or zero, and the range of its ids; fed block by block."""

    def __init__(self, piece: Piece) -> None:
        self._piece, self._done = piece, 0
        self.not_finite, self.zero, self.ids = [_NONE], [_NONE], (-1, -1)

    def update(self, block: memoryview) -> None:
        piece = self._piece
        if piece.content not in ("embeddings", "head", "ids") or len(block) % piece.row_bytes:
            return
        rows = len(block) // piece.row_bytes
        if piece.content != "head":  # what follows the rows is padding
            rows = min(rows, piece.num_rows - self._done)
        if rows <= 0:
            return
        used = block[: rows * piece.row_bytes]
        if piece.content == "ids":
            ids = np.frombuffer(used, dtype="<i8")
            low, high = self.ids if self._done else (ids[0], ids[0])
            self.ids = min(int(ids.min()), int(low)), max(int(ids.max()), int(high))
        else:
            self._look_at_floats(np.frombuffer(used, dtype="<u2" if piece.content == "embeddings" else "<u4"), rows)
        self._done += rows

    def _look_at_floats(self, numbers: NDArray[Any], rows: int) -> None:
        """Floats as whole numbers: but for the sign, NaN and infinity, their exponents all ones, are the largest."""
        sign = 1 << (8 * numbers.itemsize - 1)
        limit = 0x7C00 if numbers.itemsize == 2 else 0x7F800000
        by_row, first = numbers.reshape(rows, -1), self._piece.first + self._done
        # Two passes over the block tell that it is good, as nearly all are; rows are looked at where it is not.
        if numbers.max() >= sign | limit or numbers.view(numbers.dtype.str.replace("u", "i")).max() >= limit:
            largest = (by_row & (sign - 1)).max(axis=1)
            self.not_finite.append(first + np.flatnonzero(largest >= limit))
        starts_with_zero = np.flatnonzero(by_row[:, 0] & (sign - 1) == 0)
        if starts_with_zero.size:
            largest = (by_row[starts_with_zero] & (sign - 1)).max(axis=1)
            self.zero.append(first + starts_with_zero[largest == 0])


def _buffer(size: int) -> memoryview:
    """This thread's own, kept from file to file."""
    if len(getattr(_THREAD, "buffer", b"")) < size:
        _THREAD.buffer = bytearray(size)
    return memoryview(_THREAD.buffer)[:size]
