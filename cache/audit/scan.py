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
_MINE = local()


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
            for found in pool.map(lambda item: scan_file(*item), files):
                done += max(0, found.num_bytes)
                if progress:
                    progress(done)
                yield found
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def scan_file(piece: Piece, path: Path) -> Scanned:
    """Read one file."""
    state, looker = xxhash.xxh3_128(), _Looker(piece)
    step = max(1, BLOCK_BYTES // piece.row_bytes) * piece.row_bytes if piece.row_bytes else BLOCK_BYTES
    buffer = _buffer(step)
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            while count := _fill(file, buffer):
                state.update(buffer[:count])
                looker.look(buffer[:count])
                done += count
    except FileNotFoundError:
        return Scanned(piece, -1)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EISDIR, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG):
            raise
        return Scanned(piece, done, problem=error.strerror or str(error))
    if done != piece.num_bytes:
        return Scanned(piece, done, state.hexdigest())
    return Scanned(piece, done, state.hexdigest(), "", *looker.found())


class _Looker:
    """Looks through the rows of a chunk file, block by block."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._done = 0
        self._not_finite: list[NDArray[np.int64]] = []
        self._zero: list[NDArray[np.int64]] = []
        self._ids: list[int] = []

    def look(self, block: memoryview) -> None:
        piece = self._piece
        if piece.content not in ("embeddings", "head", "ids") or len(block) % piece.row_bytes:
            return
        rows = len(block) // piece.row_bytes
        if piece.content != "head":
            rows = min(rows, piece.num_rows - self._done)
        if rows <= 0:
            return
        used = block[: rows * piece.row_bytes]
        if piece.content == "ids":
            ids = np.frombuffer(used, dtype="<i8")
            self._ids += [int(ids.min()), int(ids.max())]
        else:
            # The exponent of a NaN or an infinity is all ones; as whole numbers these are the largest without a sign.
            self._look_at_rows(np.frombuffer(used, dtype="<u2" if piece.content == "embeddings" else "<u4"), rows)
        self._done += rows

    def _look_at_rows(self, numbers: NDArray[Any], rows: int) -> None:
        """Floats as whole numbers: but for the sign, NaN and infinity, their exponents all ones, are the largest."""
        sign = 1 << (8 * numbers.itemsize - 1)
        limit = 0x7C00 if numbers.itemsize == 2 else 0x7F800000
        by_row, first = numbers.reshape(rows, -1), self._piece.first + self._done
        # Two passes over the block tell that it is good, as nearly all are; rows are looked at where it is not.
        if numbers.max() >= sign | limit or numbers.view(numbers.dtype.str.replace("u", "i")).max() >= limit:
            largest = (by_row & (sign - 1)).max(axis=1)
            self._not_finite.append(first + np.flatnonzero(largest >= limit))
        starts_with_zero = np.flatnonzero(by_row[:, 0] & (sign - 1) == 0)
        if starts_with_zero.size:
            largest = (by_row[starts_with_zero] & (sign - 1)).max(axis=1)
            self._zero.append(first + starts_with_zero[largest == 0])

    def found(self) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[int, int]]:
        ids = (min(self._ids), max(self._ids)) if self._ids else (-1, -1)
        return _joined(self._not_finite), _joined(self._zero), ids


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts) if parts else _NONE


def _buffer(size: int) -> memoryview:
    """This thread's own, kept from file to file."""
    if len(getattr(_MINE, "buffer", b"")) < size:
        _MINE.buffer = bytearray(size)
    return memoryview(_MINE.buffer)[:size]


def _fill(file: object, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done
