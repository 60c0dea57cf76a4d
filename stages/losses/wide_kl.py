"""KL between a teacher's and a student's softmax over similarities, in blocks, with an exact backward.

    t = factor · cos(teacher_rows, teacher_columns)      s = factor · cos(student_rows, student_columns)

    along a row:     KL(softmax(t) ‖ softmax(s)) = Σ p·(t - s) - log Σ exp t + log Σ exp s
    its gradient:    d KL / d s = q - p

All three sums run on while blocks come and go. Where every softmax is complete within a block, the gradient is taken at
once: three products, as a plain implementation has. Where one is not, backward makes the logits again: five products.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .online_softmax import Seen, see, slope
from .similarity_blocks import (
    Cosines,
    LogWeights,
    Rows,
    Shape,
    Side,
    block_shape,
    blocks,
    dtype_of,
    full_precision,
    no_autocast,
)

_Gradients = tuple[Tensor | None, Tensor | None]  # of the student's rows and columns
_Weights = dict[int, float | Tensor]  # by the axis that a softmax runs along; a tensor has one for each softmax

_OVER_COLUMNS, _OVER_ROWS = 1, 0  # the axis of a matrix of logits that a softmax runs along


def kl_rows(
    teacher_rows: Rows,
    student_rows: Rows,
    teacher_columns: Rows,
    student_columns: Rows,
    factor: float,
    block: Shape | None = None,
    *,
    log_weights: LogWeights | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Sum over the rows of KL(softmax(factor · teacher's cosines) ‖ softmax(factor · student's cosines)).

    Memory beyond the inputs is that of one block and a few numbers for each row, however many columns there are.
    Gradients reach `student_rows` and `student_columns` where these require them, never the teacher's. They cannot be
    differentiated again: backward with `create_graph` raises RuntimeError.

    Args:
        teacher_rows: (R, D), any float dtype, any norm; every row is L2-normalised here.
        student_rows: (R, width); the same object as `teacher_rows` where the teacher's own stand in.
        teacher_columns: (C, D).
        student_columns: (C, width of the student's rows); the same object as `teacher_columns` where these stand in.
        factor: multiplies cosines: logit scale / temperature.
        block: rows and columns that are computed at once; None lets size and device decide.
        log_weights: added to the logits of both before their softmax; no gradient reaches them.
        row_weights: (R,) what each row's KL is multiplied by, or None; no gradient reaches them.

    Returns:
        Scalar, float32 or, if an input is, float64.
    """
    weights: _Weights = {_OVER_COLUMNS: 1.0 if row_weights is None else row_weights}
    return _apply(teacher_rows, student_rows, teacher_columns, student_columns, factor, weights, block, log_weights)


def kl_both_ways(
    teacher_rows: Rows,
    student_rows: Rows,
    teacher_columns: Rows,
    student_columns: Rows,
    factor: float,
    row_weight: float,
    column_weight: float | Tensor,
    block: Shape | None = None,
    *,
    log_weights: LogWeights | None = None,
) -> Tensor:
    """`row_weight` · KL of rows over columns + `column_weight` · KL of columns over rows, each summed, products shared.

    The weights go in because one gradient then serves both. Otherwise as `kl_rows`; where neither side fits into a
    block, a few numbers are kept for each column too. A tensor of `column_weight` has one for each column, (C,).
    """
    weights: _Weights = {_OVER_COLUMNS: row_weight, _OVER_ROWS: column_weight}
    return _apply(teacher_rows, student_rows, teacher_columns, student_columns, factor, weights, block, log_weights)


def row_entropies(
    rows: Rows, columns: Rows, factor: float, block: Shape | None = None, log_weights: LogWeights | None = None
) -> Tensor:
    """(R,) entropy in nats of every row's softmax(factor · cosine) over the columns. No gradient; memory of one block.

    Args:
        rows: (R, D), any float dtype, any norm.
        columns: (C, D).
        factor: multiplies cosines.
        block, log_weights: as in `kl_rows`.
    """
    dtype, device = dtype_of(rows, columns), _device(rows)
    cosines = Cosines(Side(rows, dtype), Side(columns, dtype), factor, log_weights)
    size = len(cosines.rows), len(cosines.columns)
    shape = block or block_shape(*size, cosines.rows.width, device, both_ways=False)
    entropies = []
    before = None
    with torch.no_grad(), full_precision(device):
        for at, over in blocks(*size, shape):
            logits = cosines.block(at, over)
            top = logits.amax(1)
            if before is not None:
                top = torch.maximum(top, before[0])
            logits -= top[:, None]
            weights = logits.exp()
            total, sharpness = weights.sum(1), weights.mul_(logits).sum(1)  # Σ e and Σ e·log e
            if before is not None:
                shift = before[0] - top
                sharpness += shift.exp() * (before[2] + shift * before[1])
                total += shift.exp() * before[1]
            before = top, total, sharpness
            if over.stop == size[1]:
                entropies.append(total.log() - sharpness / total)
                before = None
    return torch.cat(entropies)


@dataclass
class _Work:
    """One matrix of similarities and what is asked about it."""

    teacher: Cosines
    student: Cosines
    weights: _Weights
    size: Shape
    shape: Shape  # of a block
    wanted: tuple[bool, bool]  # gradients of the student's rows and columns
    seen: dict[tuple[int, int], Seen] = field(default_factory=dict)  # by axis and first row (or column)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the work reads."""
        sides = (self.teacher.rows, self.teacher.columns, self.student.rows, self.student.columns)
        weights = [weight for weight in self.weights.values() if isinstance(weight, Tensor)]
        logs = () if self.teacher.log_weights is None else self.teacher.log_weights.tensors()
        return (*(part for side in sides for part in side.parts), *weights, *logs)

    def whole(self, axis: int) -> bool:
        """Whether every block has all that this axis' softmax runs over."""
        return self.shape[axis] >= self.size[axis]

    def loss_and_gradients(self) -> tuple[Tensor, _Gradients | None]:
        """The weighted sum, and the gradients if they can be had already."""
        at_once = all(self.whole(axis) for axis in self.weights)
        gradients = self._no_gradients() if at_once else (None, None)
        loss = torch.zeros((), dtype=self.teacher.rows.dtype, device=_device(self.teacher.rows.parts))
        for rows, columns in blocks(*self.size, self.shape):
            teacher, student = self.teacher.block(rows, columns), self.student.block(rows, columns)
            slopes = []
            for turn, axis in enumerate(self.weights, start=1):
                spend = turn == len(self.weights)
                lines = columns if axis == _OVER_ROWS else rows
                key, weight = (axis, lines.start), self._weight(axis, lines.start, len(lines))
                seen, p, q = see(self.seen.pop(key, None), teacher, student, axis, spend=spend)
                if self.whole(axis):
                    loss += _weighted_sum(weight, seen.kl())
                else:
                    self.seen[key] = seen
                if at_once and any(self.wanted):
                    slopes.append(slope(seen, p, q, weight))
                del p, q
            if slopes:
                self._add(gradients, slopes, rows, columns)
        for (axis, first), seen in self.seen.items():
            kl = seen.kl()
            loss += _weighted_sum(self._weight(axis, first, kl.numel()), kl)
        self._forget()
        return loss, gradients if at_once else None

    def gradients(self) -> _Gradients:
        """Gradients of the weighted sum, once all was seen: every block's logits are made again."""
        gradients = self._no_gradients()
        for rows, columns in blocks(*self.size, self.shape):
            teacher, student = self.teacher.block(rows, columns), self.student.block(rows, columns)
            slopes = []
            for turn, axis in enumerate(self.weights, start=1):
                spend = turn == len(self.weights)
                lines = columns if axis == _OVER_ROWS else rows
                if self.whole(axis):
                    seen, p, q = see(None, teacher, student, axis, spend=spend)
                else:
                    seen = self.seen[axis, lines.start]
                    p = torch.sub(teacher, seen.teacher_max, out=teacher if spend else None).exp_()
                    q = torch.sub(student, seen.student_max, out=student if spend else None).exp_()
                slopes.append(slope(seen, p, q, self._weight(axis, lines.start, len(lines))))
                del p, q
            self._add(gradients, slopes, rows, columns)
        self._forget()
        return gradients

    def _weight(self, axis: int, first: int, num: int) -> float | Tensor:
        """Of `num` softmaxes along an axis: one number, or one for each, shaped to stand beside a block."""
        weight = self.weights[axis]
        if not isinstance(weight, Tensor):
            return weight
        return weight[first : first + num].unsqueeze(axis)

    def _no_gradients(self) -> _Gradients:
        sides = self.student.rows, self.student.columns
        to_rows, to_columns = (
            torch.zeros_like(side.parts[0]) if wanted else None for side, wanted in zip(sides, self.wanted)
        )
        return to_rows, to_columns

    def _add(self, gradients: _Gradients, slopes: list[Tensor], rows: range, columns: range) -> None:
        """Take a block's share of the gradients from the loss's slopes along its logits."""
        total = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
        to_rows, to_columns = gradients
        if to_rows is not None:
            to_rows[rows.start : rows.stop].addmm_(total, self.student.columns.take(columns), alpha=self.student.factor)
        if to_columns is not None:
            to_columns[columns.start : columns.stop].addmm_(
                total.T, self.student.rows.take(rows), alpha=self.student.factor
            )

    def _forget(self) -> None:
        self.teacher.forget()
        self.student.forget()


def _weighted_sum(weight: float | Tensor, kl: Tensor) -> Tensor:
    return (weight * kl).sum() if isinstance(weight, Tensor) else weight * kl.sum()


class _WideKL(torch.autograd.Function):
    """What a `_Work` computes, as a function of the student's unit rows and columns."""

    @staticmethod
    def forward(ctx: Any, work: _Work, student_rows: Tensor | None, student_columns: Tensor | None) -> Tensor:
        with full_precision(_device(work.teacher.rows.parts)):
            loss, ctx.gradients = work.loss_and_gradients()
        if ctx.gradients is None:
            ctx.work = work
            # So that autograd refuses to go back over inputs that were overwritten meanwhile.
            ctx.save_for_backward(*work.tensors())
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():  # `once_differentiable` would pass the loss's own gradient off as a constant
            raise RuntimeError("this loss cannot be differentiated twice; call backward without create_graph")
        gradients = ctx.gradients
        if gradients is None:
            _ = ctx.saved_tensors
            with full_precision(gradient.device):
                gradients = ctx.work.gradients()
        to_rows, to_columns = (None if part is None else gradient * part for part in gradients)
        return None, to_rows, to_columns


def _apply(
    teacher_rows: Rows,
    student_rows: Rows,
    teacher_columns: Rows,
    student_columns: Rows,
    factor: float,
    weights: _Weights,
    block: Shape | None,
    log_weights: LogWeights | None,
) -> Tensor:
    dtype, device = dtype_of(teacher_rows, student_rows, teacher_columns, student_columns), _device(teacher_rows)
    with no_autocast(device):
        unit_rows = _unit_with_gradient(student_rows, dtype)
        unit_columns = unit_rows if student_columns is student_rows else _unit_with_gradient(student_columns, dtype)

    def side(rows: Rows, unit: Tensor | None, teachers: Rows, teachers_side: Side) -> Side:
        if unit is not None:
            return Side(unit, dtype, unit=True)
        return teachers_side if rows is teachers else Side(rows, dtype)

    teacher = Cosines(Side(teacher_rows, dtype), Side(teacher_columns, dtype), factor, log_weights)
    student = Cosines(
        side(student_rows, unit_rows, teacher_rows, teacher.rows),
        side(student_columns, unit_columns, teacher_columns, teacher.columns),
        factor,
        log_weights,
    )
    weights = {
        axis: weight.detach().to(dtype) if isinstance(weight, Tensor) else weight for axis, weight in weights.items()
    }
    size, width = (len(teacher.rows), len(teacher.columns)), max(teacher.rows.width, student.rows.width)
    shape = block or block_shape(*size, width, device, both_ways=len(weights) > 1)
    work = _Work(teacher, student, weights, size, shape, (unit_rows is not None, unit_columns is not None))
    loss: Tensor = _WideKL.apply(work, unit_rows, unit_columns)
    return loss


def _unit_with_gradient(rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """Rows that a gradient has to reach, normalised where autograd sees it; None for all others."""
    if isinstance(rows, tuple):
        if any(part.requires_grad for part in rows):
            raise ValueError("no gradient reaches rows in several parts; detach them or stack them first")
        return None
    return F.normalize(rows.to(dtype), dim=1) if rows.requires_grad and torch.is_grad_enabled() else None


def _device(rows: Rows) -> torch.device:
    return (rows[0] if isinstance(rows, tuple) else rows).device
