"""Softmaxes of a teacher's and a student's logits along one axis, taken in block by block.

The online softmax of Milakov and Gimelshein (arXiv 1805.02867): sums relative to the largest logit so far, brought to
the new one whenever it rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Softmaxes along one axis, as far as they were seen; one number each for every row (or column) of a block.

    Attributes:
        teacher_max: the teacher's largest logit.
        teacher_sum: Σ exp(t - teacher_max).
        student_max: the student's largest logit.
        student_sum: Σ exp(s - student_max).
        gap: Σ exp(t - teacher_max) · ((t - teacher_max) - (s - student_max)): differences of small numbers, so that a
            student that is nearly right loses no digits to the size of the logits.
    """

    teacher_max: Tensor
    teacher_sum: Tensor
    student_max: Tensor
    student_sum: Tensor
    gap: Tensor

    def kl(self) -> Tensor:
        return self.gap / self.teacher_sum + self.student_sum.log() - self.teacher_sum.log()


def see(
    before: Seen | None, teacher: Tensor, student: Tensor, axis: int, *, spend: bool
) -> tuple[Seen, Tensor, Tensor]:
    """Take in another block's logits; returns also exp(t - teacher_max) and exp(s - student_max), the caller's own.

    Args:
        before: what was seen of the same rows (or columns) so far.
        spend: the logits are wanted by nobody else, so that their memory may be used.
    """
    teacher_max, student_max = teacher.amax(axis, keepdim=True), student.amax(axis, keepdim=True)
    if before is not None:
        teacher_max = torch.maximum(teacher_max, before.teacher_max)
        student_max = torch.maximum(student_max, before.student_max)
    teacher = torch.sub(teacher, teacher_max, out=teacher if spend else None)
    student = torch.sub(student, student_max, out=student if spend else None)
    gap = teacher - student
    teacher.exp_()
    student.exp_()
    seen = Seen(
        teacher_max,
        teacher.sum(axis, keepdim=True),
        student_max,
        student.sum(axis, keepdim=True),
        gap.mul_(teacher).sum(axis, keepdim=True),
    )
    if before is None:
        return seen, teacher, student
    teacher_shift, student_shift = before.teacher_max - teacher_max, before.student_max - student_max
    shifted_gap = before.gap + before.teacher_sum * (teacher_shift - student_shift)
    seen.gap.add_(shifted_gap * teacher_shift.exp())
    seen.teacher_sum.add_(before.teacher_sum * teacher_shift.exp())
    seen.student_sum.add_(before.student_sum * student_shift.exp())
    return seen, teacher, student


def slope(seen: Seen, p: Tensor, q: Tensor, weight: float | Tensor) -> Tensor:
    """weight · (softmax(s) - softmax(t)) from their exponentials; uses up `q`. A tensor has one for each softmax."""
    return q.mul_(weight / seen.student_sum).addcmul_(p, weight / seen.teacher_sum, value=-1)
