"""Cosine logits between two sets of rows, a block at a time: what is read when, how large a block is, how precise.

Nothing here keeps a whole side in another format, or a whole matrix of logits: cached fp16 rows are promoted and
normalised as their range comes up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Tensor | tuple[Tensor, ...]
"""Embeddings, (rows, D); a tuple is read as if its parts were stacked, but they are never copied together."""

Shape = tuple[int, int]
"""Rows and columns of a block."""

# In numbers: logits of a block and the normalised copies of its rows and columns. Some five matrices of logits live at
# once. A matrix up to the first size is computed in one piece, which saves making its logits twice; a larger one in
# pieces that stay in a CPU's caches or, on a GPU, need few launches (the last number is not measured).
_WHOLE = 16 * 2**20
_CPU_BLOCK = 2 * 2**20
_GPU_BLOCK = 16 * 2**20
# With fewer rows than this a block that spans all columns makes a poor product.
_FEW_ROWS = 128


class Side:
    """Rows of a similarity matrix, or its columns: read a range at a time, as unit rows in one format."""

    def __init__(self, rows: Rows, dtype: torch.dtype, unit: bool = False) -> None:
        """Read `rows` as `dtype`; `unit` says that they are in that format and normalised already."""
        self.parts = tuple(part.detach() for part in (rows if isinstance(rows, tuple) else (rows,)))
        self.dtype, self._unit = dtype, unit
        self._last: tuple[range, Tensor] | None = None

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]

    def take(self, rows: range) -> Tensor:
        """(len(rows), D) unit rows. The last range is remembered: teacher and student often share a side."""
        if self._last is None or self._last[0] != rows:
            self._last = None  # let go of the old range before there is a new one
            self._last = rows, self._read(rows)
        return self._last[1]

    def forget(self) -> None:
        """Let go of the range that was read last."""
        self._last = None

    def _read(self, rows: range) -> Tensor:
        if self._unit:
            return self.parts[0][rows.start : rows.stop]
        pieces, offset = [], 0
        for part in self.parts:
            piece = part[max(0, rows.start - offset) : max(0, rows.stop - offset)]
            if len(piece):
                pieces.append(piece)
            offset += len(part)
        unit = pieces[0].to(self.dtype, copy=True) if len(pieces) == 1 else torch.cat(pieces).to(self.dtype)
        return F.normalize(unit, dim=1, out=unit)


@dataclass(frozen=True)
class LogWeights:
    """What is added to logits before a softmax, in place of drawing columns or cells more or less often.

    Attributes:
        columns: (C,) for every column, or None.
        places: (L, k) int64, of some single cells: `along` 1 names for each of L rows its columns, 0 for each of L
            columns its rows, none twice. Places that do not exist (-1) are passed over. None is no such cell.
        values: (L, k) for the cells at those places, beside what their columns have.
        along: 1 or 0.
    """

    columns: Tensor | None = None
    places: Tensor | None = None
    values: Tensor | None = None
    along: int = 1

    def tensors(self) -> tuple[Tensor, ...]:
        """All that there is."""
        return tuple(part for part in (self.columns, self.places, self.values) if part is not None)

    def add_to(self, logits: Tensor, rows: range, columns: range) -> None:
        """Add them to a block of logits, in place; nothing here makes the host wait for a GPU."""
        if self.columns is not None:
            logits += self.columns[columns.start : columns.stop].to(logits.dtype)
        if self.places is not None and self.values is not None:
            lines, others = (rows, columns) if self.along else (columns, rows)
            at = self.places[lines.start : lines.stop] - others.start
            values = self.values[lines.start : lines.stop].to(logits.dtype)
            values = values.masked_fill((at < 0) | (at >= len(others)), 0.0)  # those cells are of another block
            at = at.clamp(0, len(others) - 1)
            logits.scatter_add_(self.along, at if self.along else at.T, values if self.along else values.T)


@dataclass(frozen=True)
class Cosines:
    """The matrix of factor x cosine + log weight between two sides, which never exists as a whole."""

    rows: Side
    columns: Side
    factor: float
    log_weights: LogWeights | None = None

    @property
    def size(self) -> Shape:
        return len(self.rows), len(self.columns)

    @property
    def device(self) -> torch.device:
        return self.rows.parts[0].device

    def block(self, rows: range, columns: range) -> Tensor:
        """(len(rows), len(columns)) logits, a tensor of the caller's own. Call it within `full_precision`."""
        logits = (self.factor * self.rows.take(rows)) @ self.columns.take(columns).T
        if self.log_weights is not None:
            self.log_weights.add_to(logits, rows, columns)
        return logits

    def forget(self) -> None:
        """Let go of what was read last."""
        self.rows.forget()
        self.columns.forget()


def block_shape(num_rows: int, num_columns: int, width: int, device: torch.device, *, both_ways: bool) -> Shape:
    """Rows and columns of a block, so that it and the copies of its sides stay within a fixed number of numbers.

    Everything in one block, if it fits. Otherwise whole rows, if the softmax runs along rows alone and enough of them
    fit: it is then complete within a block. Otherwise as much of the narrow side as makes good products, and of the
    wide side what fits beside it.
    """

    def fits(rows: int, columns: int) -> bool:
        return rows * columns + (rows + columns) * width <= _WHOLE

    if fits(num_rows, num_columns):
        return num_rows, num_columns
    numbers = _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK
    if not both_ways and fits(_FEW_ROWS, num_columns):
        return min(num_rows, max(_FEW_ROWS, numbers // (num_columns + width))), num_columns
    narrow = max(1, min(num_rows, num_columns, isqrt(numbers) // 2, numbers // (2 * width)))
    wide = max(1, (numbers - narrow * width) // (narrow + width))
    return (narrow, min(wide, num_columns)) if num_rows <= num_columns else (min(wide, num_rows), narrow)


def blocks(num_rows: int, num_columns: int, shape: Shape) -> Iterator[tuple[range, range]]:
    """Ranges of rows and columns that cover a matrix, row by row of blocks."""
    for top in range(0, num_rows, shape[0]):
        for left in range(0, num_columns, shape[1]):
            yield range(top, min(top + shape[0], num_rows)), range(left, min(left + shape[1], num_columns))


def dtype_of(*sides: Rows) -> torch.dtype:
    """The one format to compute in: float32, or float64 if anything comes in as that."""
    dtype = torch.float32
    for side in sides:
        for part in side if isinstance(side, tuple) else (side,):
            dtype = torch.promote_types(dtype, part.dtype)
    return dtype


def unit_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the one format, every row normalised; no gradient reaches the teacher's."""
    dtype = dtype_of(student, teacher)
    with no_autocast(student.device):
        return F.normalize(student.to(dtype), dim=1), F.normalize(teacher.detach().to(dtype), dim=1)


def no_autocast(device: torch.device) -> torch.autocast:
    """Compute in the formats that tensors have."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep float32 products from autocast, TF32 (GPU) and bf16 (CPU), whatever the process is set to."""
    with no_autocast(device):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later: a setting for each backend
            places: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            before = [place.fp32_precision for place in places]
            try:
                for place in places:
                    place.fp32_precision = "ieee"
                yield
            finally:
                for place, value in zip(places, before):
                    place.fp32_precision = value
        else:
            setting = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(setting)
