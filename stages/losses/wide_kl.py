"""KL between a teacher's and a student's softmax over similarities, in blocks, with an exact backward.

    t = factor · cos(teacher_rows, teacher_columns)      s = factor · cos(student_rows, student_columns)

    along a row:     KL(softmax(t) ‖ softmax(s)) = Σ p·(t - s) - log Σ exp t + log Σ exp s
    its gradient:    d KL / d s = q - p

All three sums are updated block by block. Where every softmax is complete within a block, the gradient is computed at
once: three products, as a plain implementation has. Where one is not, backward computes the logits again: five.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .online_softmax import SoftmaxState
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
    return _kl(teacher_rows, student_rows, teacher_columns, student_columns, factor, weights, block, log_weights)


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
    return _kl(teacher_rows, student_rows, teacher_columns, student_columns, factor, weights, block, log_weights)


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
    dtype = dtype_of(rows, columns)
    cosines = Cosines(Side(rows, dtype), Side(columns, dtype), factor, log_weights)
    shape = block or block_shape(*cosines.size, cosines.rows.width, cosines.device, both_ways=False)
    entropies = []
    before: tuple[Tensor, Tensor, Tensor] | None = None
    with torch.no_grad(), full_precision(cosines.device):
        for at, over in blocks(*cosines.size, shape):
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
            if over.stop == cosines.size[1]:
                entropies.append(total.log() - sharpness / total)
                before = None
    return torch.cat(entropies)


@dataclass
class _Matrix:
    """One matrix of similarities, and what is wanted of it."""

    teacher: Cosines
    student: Cosines
    weights: _Weights
    shape: Shape  # of a block
    wanted: tuple[bool, bool]  # gradients of the student's rows and columns
    states: dict[tuple[int, int], SoftmaxState] = field(default_factory=dict)  # by axis and first row (or column)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that backward reads."""
        sides = (self.teacher.rows, self.teacher.columns, self.student.rows, self.student.columns)
        weights = [weight for weight in self.weights.values() if isinstance(weight, Tensor)]
        logs = () if self.teacher.log_weights is None else self.teacher.log_weights.tensors()
        return (*(part for side in sides for part in side.parts), *weights, *logs)

    def is_whole(self, axis: int) -> bool:
        """Whether every block has all that this axis' softmax runs over."""
        return self.shape[axis] >= self.teacher.size[axis]

    def forward(self) -> tuple[Tensor, _Gradients | None]:
        """The weighted sum of all KL, and its gradients if these can be had already."""
        at_once = all(self.is_whole(axis) for axis in self.weights)
        gradients = self._zeros() if at_once else None
        loss = self._pass(gradients)
        for (axis, first), state in self.states.items():
            kl = state.kl()
            loss += _weighted_sum(self._weight(axis, first, kl.numel()), kl)
        return loss, gradients

    def backward(self) -> _Gradients:
        """The gradients, after `forward`: every block's logits are computed again."""
        gradients = self._zeros()
        self._pass(gradients, again=True)
        return gradients

    def _pass(self, gradients: _Gradients | None, *, again: bool = False) -> Tensor:
        """Go over all blocks, adding to `gradients`; returns the weighted sum of KL of the whole axes."""
        loss = torch.zeros((), dtype=self.teacher.rows.dtype, device=self.teacher.device)
        for rows, columns in blocks(*self.teacher.size, self.shape):
            slopes = []
            for axis, weight, state, p, q in self._softmaxes(rows, columns, again):
                if self.is_whole(axis):
                    loss += _weighted_sum(weight, state.kl())
                if gradients is not None and any(self.wanted):
                    slopes.append(state.gradient(p, q, weight))
                del p, q
            if gradients is not None and slopes:
                self._add(gradients, slopes, rows, columns)
        self.teacher.forget()
        self.student.forget()
        return loss

    def _softmaxes(
        self, rows: range, columns: range, again: bool
    ) -> Iterator[tuple[int, float | Tensor, SoftmaxState, Tensor, Tensor]]:
        """Each axis of a block with its weight, its state after the block, and the exponentials of its logits."""
        teacher, student = self.teacher.block(rows, columns), self.student.block(rows, columns)
        for turn, axis in enumerate(self.weights, start=1):
            in_place = turn == len(self.weights)  # nobody else needs the logits then
            lines = columns if axis == _OVER_ROWS else rows
            key, weight = (axis, lines.start), self._weight(axis, lines.start, len(lines))
            if again and not self.is_whole(axis):
                state = self.states[key]
                p, q = state.exponentials(teacher, student, in_place=in_place)
            else:
                before = self.states.pop(key, None)
                state, p, q = SoftmaxState.update(before, teacher, student, axis, in_place=in_place)
                if not self.is_whole(axis):
                    self.states[key] = state
            yield axis, weight, state, p, q
            del p, q

    def _weight(self, axis: int, first: int, num: int) -> float | Tensor:
        """Of `num` softmaxes along an axis: one number, or one for each, shaped to stand beside a block."""
        weight = self.weights[axis]
        if not isinstance(weight, Tensor):
            return weight
        return weight[first : first + num].unsqueeze(axis)

    def _zeros(self) -> _Gradients:
        sides = self.student.rows, self.student.columns
        to_rows, to_columns = (
            torch.zeros_like(side.parts[0]) if wanted else None for side, wanted in zip(sides, self.wanted)
        )
        return to_rows, to_columns

    def _add(self, gradients: _Gradients, slopes: list[Tensor], rows: range, columns: range) -> None:
        """Add a block's share of the gradients, given those of its logits."""
        total = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
        student, (to_rows, to_columns) = self.student, gradients
        if to_rows is not None:
            to_rows[rows.start : rows.stop].addmm_(total, student.columns.take(columns), alpha=student.factor)
        if to_columns is not None:
            to_columns[columns.start : columns.stop].addmm_(total.T, student.rows.take(rows), alpha=student.factor)


def _weighted_sum(weight: float | Tensor, kl: Tensor) -> Tensor:
    return (weight * kl).sum() if isinstance(weight, Tensor) else weight * kl.sum()


class _WideKL(torch.autograd.Function):
    """What a `_Matrix` computes, as a function of the student's unit rows and columns."""

    @staticmethod
    def forward(ctx: Any, matrix: _Matrix, student_rows: Tensor | None, student_columns: Tensor | None) -> Tensor:
        with full_precision(matrix.teacher.device):
            loss, ctx.gradients = matrix.forward()
        if ctx.gradients is None:
            ctx.matrix = matrix
            # So that autograd refuses to go back over inputs that were overwritten meanwhile.
            ctx.save_for_backward(*matrix.tensors())
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():  # `once_differentiable` would pass the loss's own gradient off as a constant
            raise RuntimeError("this loss cannot be differentiated twice; call backward without create_graph")
        gradients = ctx.gradients
        if gradients is None:
            _ = ctx.saved_tensors
            with full_precision(gradient.device):
                gradients = ctx.matrix.backward()
        to_rows, to_columns = (None if part is None else gradient * part for part in gradients)
        return None, to_rows, to_columns


def _kl(
    teacher_rows: Rows,
    student_rows: Rows,
    teacher_columns: Rows,
    student_columns: Rows,
    factor: float,
    weights: _Weights,
    block: Shape | None,
    log_weights: LogWeights | None,
) -> Tensor:
    dtype = dtype_of(teacher_rows, student_rows, teacher_columns, student_columns)
    teacher = Cosines(Side(teacher_rows, dtype), Side(teacher_columns, dtype), factor, log_weights)
    with no_autocast(teacher.device):
        unit_rows = _unit_with_gradient(student_rows, dtype)
        unit_columns = unit_rows if student_columns is student_rows else _unit_with_gradient(student_columns, dtype)

    def side(rows: Rows, unit: Tensor | None, of_teacher: Rows, teachers_side: Side) -> Side:
        if unit is not None:
            return Side(unit, dtype, unit=True)
        return teachers_side if rows is of_teacher else Side(rows, dtype)

    student = Cosines(
        side(student_rows, unit_rows, teacher_rows, teacher.rows),
        side(student_columns, unit_columns, teacher_columns, teacher.columns),
        factor,
        log_weights,
    )
    weights = {axis: one.detach().to(dtype) if isinstance(one, Tensor) else one for axis, one in weights.items()}
    width = max(teacher.rows.width, student.rows.width)
    shape = block or block_shape(*teacher.size, width, teacher.device, both_ways=len(weights) > 1)
    matrix = _Matrix(teacher, student, weights, shape, (unit_rows is not None, unit_columns is not None))
    loss: Tensor = _WideKL.apply(matrix, unit_rows, unit_columns)
    return loss


def _unit_with_gradient(rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """Rows that a gradient has to reach, normalised where autograd sees it; None for all others."""
    if isinstance(rows, tuple):
        if any(part.requires_grad for part in rows):
            raise ValueError("no gradient reaches rows in several parts; detach them or stack them first")
        return None
    return F.normalize(rows.to(dtype), dim=1) if rows.requires_grad and torch.is_grad_enabled() else None
