"""InfoNCE of the student's images against the teacher's, in blocks, with an exact gradient.

    z_ij = factor · cos(û_i, c_j)        loss_i = log(exp z_i+ + Σ_negatives exp z_ij) - z_i+
    d loss_i / d û_i = factor · (Σ_j q_ij·c_j - c_+)         q = softmax over the positive and the negatives

The sums run on while blocks of columns come and go, Σ q·c among them, so one pass has both loss and gradient: two
products, three where a threshold compares the columns with the positive.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .similarity_blocks import Rows, Shape, Side, block_shape, blocks, dtype_of, full_precision, no_autocast


def info_nce_rows(
    student_rows: Tensor,
    teacher_rows: Tensor,
    columns: Rows,
    first: int,
    factor: float | Tensor,
    threshold: float | None = None,
    block: Shape | None = None,
) -> Tensor:
    """Sum over the rows of -log softmax(factor · cosines) at each row's positive.

    Memory beyond the inputs is that of one block and of two more copies of the rows, however many columns there are.
    Gradients reach `student_rows` and `factor`, nothing of the teacher's; they cannot be differentiated again.

    Args:
        student_rows: (R, D) anchors, any float dtype, any norm; every row is L2-normalised here.
        teacher_rows: (R, D) the positives.
        columns: (C, D) what is contrasted; row i's positive is column `first` + i.
        first: where the positives stand among the columns.
        factor: multiplies cosines, logit scale / temperature; a scalar tensor may want a gradient.
        threshold: a column whose cosine with a row's positive reaches this is no negative of that row. None: all are.
        block: rows and columns that are computed at once; None lets size and device decide.

    Returns:
        Scalar, float32 or, if an input is, float64.
    """
    device, dtype = student_rows.device, dtype_of(student_rows, teacher_rows, columns)
    contrast = _Contrast.of(teacher_rows, columns, first, threshold, dtype, block)
    with no_autocast(device):
        unit = F.normalize(student_rows.to(dtype), dim=1)
    if not isinstance(factor, Tensor):
        factor = torch.full((), factor, dtype=dtype, device=device)  # filled on the device: nothing waits for a copy
    loss: Tensor = _InfoNCE.apply(contrast, unit, factor.to(device, dtype))
    return loss


def masked_share(
    teacher_rows: Tensor, columns: Rows, first: int, threshold: float, block: Shape | None = None
) -> Tensor:
    """Share of each row's other columns that `threshold` keeps from being negatives, mean over the rows; no gradient.

    Args as in `info_nce_rows`. Returns a scalar between 0 and 1.
    """
    dtype = dtype_of(teacher_rows, columns)
    contrast = _Contrast.of(teacher_rows, columns, first, threshold, dtype, block)
    num_rows, num_others = contrast.size[0], contrast.size[1] - 1
    count = torch.zeros((), dtype=dtype, device=teacher_rows.device)
    with torch.no_grad(), full_precision(teacher_rows.device):
        for at, over in blocks(*contrast.size, contrast.shape):
            count += contrast.excluded(at, over).sum()
    return (count - num_rows) / (num_rows * max(1, num_others))  # a row's own column is no negative either


@dataclass(frozen=True)
class _Contrast:
    """The teacher's part: positives, columns, and which of them are a row's negatives."""

    positives: Side
    columns: Side
    first: int
    threshold: float | None
    size: Shape
    shape: Shape  # of a block

    @classmethod
    def of(
        cls,
        teacher_rows: Tensor,
        columns: Rows,
        first: int,
        threshold: float | None,
        dtype: torch.dtype,
        block: Shape | None,
    ) -> "_Contrast":
        positives, side = Side(teacher_rows, dtype), Side(columns, dtype)
        size = len(positives), len(side)
        shape = block or block_shape(*size, positives.width, teacher_rows.device, both_ways=False)
        return cls(positives, side, first, threshold, size, shape)

    def excluded(self, rows: range, columns: range) -> Tensor:
        """(rows, columns) bool: not a negative: a row's own column, or one too like it for the teacher."""
        device = self.positives.parts[0].device
        own = torch.arange(rows.start, rows.stop, device=device) + self.first
        excluded = own[:, None] == torch.arange(columns.start, columns.stop, device=device)
        if self.threshold is not None:
            excluded |= self.positives.take(rows) @ self.columns.take(columns).T >= self.threshold
        return excluded

    def by_rows(self) -> Iterator[tuple[range, list[range]]]:
        """Each range of rows with the ranges of columns that it is computed with."""
        over = [columns for _, columns in blocks(1, self.size[1], (1, self.shape[1]))]
        for rows, _ in blocks(self.size[0], 1, (self.shape[0], 1)):
            yield rows, over

    def forget(self) -> None:
        self.positives.forget()
        self.columns.forget()


def _loss_and_pull(contrast: _Contrast, unit: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss, and (R, D) Σ_j q_ij·c_j - c_+ of each row."""
    loss, pull = torch.zeros_like(factor), torch.empty_like(unit)
    for rows, all_columns in contrast.by_rows():
        anchors, positives = unit[rows.start : rows.stop], contrast.positives.take(rows)
        wanted = factor * (anchors * positives).sum(1, keepdim=True)
        top, total, weighted = wanted, torch.zeros_like(wanted), torch.zeros_like(anchors)  # over the negatives
        for columns in all_columns:
            others = contrast.columns.take(columns)
            logits = (factor * anchors) @ others.T
            logits.masked_fill_(contrast.excluded(rows, columns), -torch.inf)
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            weights, shift = logits.sub_(higher).exp_(), (top - higher).exp()
            total = total * shift + weights.sum(1, keepdim=True)
            weighted = weighted.mul_(shift).addmm_(weights, others)
            top = higher
        beside = (wanted - top).exp()
        # log(beside + total) keeps its digits where the positive is nearly all there is.
        loss += (top - wanted + torch.log1p(torch.expm1(wanted - top) + total)).sum()
        pull[rows.start : rows.stop] = (weighted - total * positives) / (beside + total)
    contrast.forget()
    return loss, pull


class _InfoNCE(torch.autograd.Function):
    """`_loss_and_pull` as a function of the student's unit rows and the factor."""

    @staticmethod
    def forward(ctx: Any, contrast: _Contrast, unit: Tensor, factor: Tensor) -> Tensor:
        with full_precision(unit.device):
            loss, pull = _loss_and_pull(contrast, unit, factor)
        ctx.save_for_backward(unit, factor, pull)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():  # `once_differentiable` would pass the loss's own gradient off as a constant
            raise RuntimeError("this loss cannot be differentiated twice; call backward without create_graph")
        unit, factor, pull = ctx.saved_tensors
        to_rows = gradient * factor * pull if ctx.needs_input_grad[1] else None
        to_factor = gradient * (unit * pull).sum() if ctx.needs_input_grad[2] else None
        return None, to_rows, to_factor
