"""Softmaxes of a teacher's and a student's logits along one axis, taken in block by block.

The online softmax of Milakov and Gimelshein (arXiv 1805.02867): sums relative to the largest logit so far, brought to
the new one whenever it rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftmaxState:
    """Softmaxes along one axis over the blocks so far; one number each for every row (or column) of a block.

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

    @classmethod
    def update(
        cls, before: SoftmaxState | None, teacher: Tensor, student: Tensor, axis: int, *, in_place: bool
    ) -> tuple[SoftmaxState, Tensor, Tensor]:
        """Add another block's logits; returns also exp(t - teacher_max) and exp(s - student_max).

        Args:
            before: the state of the same rows (or columns) so far.
            in_place: whether the logits' memory may be overwritten.
        """
        teacher_max, student_max = teacher.amax(axis, keepdim=True), student.amax(axis, keepdim=True)
        if before is not None:
            teacher_max = torch.maximum(teacher_max, before.teacher_max)
            student_max = torch.maximum(student_max, before.student_max)
        p = torch.sub(teacher, teacher_max, out=teacher if in_place else None)
        q = torch.sub(student, student_max, out=student if in_place else None)
        gap = p - q
        p.exp_()
        q.exp_()
        sums = p.sum(axis, keepdim=True), q.sum(axis, keepdim=True), gap.mul_(p).sum(axis, keepdim=True)
        state = cls(teacher_max, sums[0], student_max, sums[1], sums[2])
        if before is not None:
            teacher_shift, student_shift = before.teacher_max - teacher_max, before.student_max - student_max
            shifted_gap = before.gap + before.teacher_sum * (teacher_shift - student_shift)
            state.gap.add_(shifted_gap * teacher_shift.exp())
            state.teacher_sum.add_(before.teacher_sum * teacher_shift.exp())
            state.student_sum.add_(before.student_sum * student_shift.exp())
        return state, p, q

    def exponentials(self, teacher: Tensor, student: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
        """exp(t - teacher_max) and exp(s - student_max) of a block's logits, once all blocks were added."""
        p = torch.sub(teacher, self.teacher_max, out=teacher if in_place else None)
        q = torch.sub(student, self.student_max, out=student if in_place else None)
        return p.exp_(), q.exp_()

    def kl(self) -> Tensor:
        """KL(softmax(t) ‖ softmax(s)) of each row (or column)."""
        return self.gap / self.teacher_sum + self.student_sum.log() - self.teacher_sum.log()

    def gradient(self, p: Tensor, q: Tensor, weight: float | Tensor) -> Tensor:
        """weight · d KL / d s = weight · (softmax(s) - softmax(t)) from a block's exponentials; overwrites `q`."""
        return q.mul_(weight / self.student_sum).addcmul_(p, weight / self.teacher_sum, value=-1)
