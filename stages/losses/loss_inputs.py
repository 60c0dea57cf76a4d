"""What the losses of one step are made from, and the checks that keep a wrong shape from broadcasting.

The names are the same whichever tower learns. Of an image tower, rows are images and `others` sentences; of a text
tower, rows are texts and `others` images. `local_` is this process's, `global_` that of all processes, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor

from .similarity_blocks import LogWeights, Rows


@dataclass(frozen=True)
class SamplingWeights:
    """Log weights of sentences that were not all drawn at random, and of images beside their own candidates.

    Attributes:
        sentences: (n,) added to all logits of each sentence.
        places: (b, k) int64, of each image some of the step's sentences (of all processes), none twice, -1 for none; or
            None.
        values: (b, k) added to the logits of an image and the sentence at that place.
    """

    sentences: Tensor
    places: Tensor | None = None
    values: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """All that there is."""
        return tuple(part for part in (self.sentences, self.places, self.values) if part is not None)

    def map(self, do: Callable[[Tensor], Tensor]) -> SamplingWeights:
        """The same, each tensor as `do` makes it."""
        return SamplingWeights(*map(do, self.tensors()))


@dataclass(frozen=True, kw_only=True)
class TeacherInputs:
    """The teacher's part of `LossInputs`, the same for every student. No gradient reaches any of it.

    With one process, a local tensor and its global one are the same object.

    Attributes:
        local_teacher: (b, D) teacher embeddings of this process's rows, any float dtype, any norm.
        global_teacher: (B, D) of the rows of all processes.
        local_others: (n, D) of this process's rows of the other modality, paired with nothing; None where no loss wants
            any.
        global_others: (N, D) of all processes.
        bank: (M, D) of more rows of the same modality, the same in every process, or None.
        views: (V, D) of other cached views of the images of all processes, or None.
        first_row: where the local rows begin among the global ones; wanted where these are more.
        first_other: where the local others begin among the global ones; `sampling` wants it.
        local_sampling: weights of the local others and rows; None where all others are drawn at random.
        global_sampling: those of all processes.
    """

    local_teacher: Tensor
    global_teacher: Tensor
    local_others: Tensor | None = None
    global_others: Tensor | None = None
    bank: Tensor | None = None
    views: Tensor | None = None
    first_row: int | None = None
    first_other: int = 0
    local_sampling: SamplingWeights | None = None
    global_sampling: SamplingWeights | None = None

    def with_student(self, local_student: Tensor, global_student: Tensor) -> LossInputs:
        """Beside a student's embeddings."""
        return LossInputs(**vars(self), local_student=local_student, global_student=global_student)

    def need(self, name: Literal["local_others", "global_others", "views"]) -> Tensor:
        """What a loss cannot do without, cut off from gradients.

        Raises:
            ValueError: if it was not drawn.
        """
        rows: Tensor | None = getattr(self, name)
        if rows is None:
            raise ValueError(f"no {name} in this step, but a loss wants them")
        return rows.detach()

    def pseudo_others(self) -> Rows:
        """(B + M, D) teacher's rows in the place of others: the global ones, then the bank; cut off from gradients."""
        rows = self.global_teacher.detach()
        return rows if self.bank is None else (rows, self.bank.detach())

    def log_weights(self) -> tuple[LogWeights | None, LogWeights | None]:
        """For logits of local rows over global others, and of local others over global rows."""
        local, everywhere = self.local_sampling, self.global_sampling
        if local is None or everywhere is None:
            return None, None
        # An other's own weight is the same in all logits of its row, and changes no softmax over rows.
        places = None if everywhere.places is None else everywhere.places - self.first_other
        return (
            LogWeights(everywhere.sentences, local.places, local.values),
            LogWeights(None, places, everywhere.values, along=0),
        )

    def place(self) -> int:
        """Where the local rows begin among the global ones.

        Raises:
            ValueError: if `first_row` is missing or out of range.
        """
        spare = len(self.global_teacher) - len(self.local_teacher)
        first = 0 if self.first_row is None and spare == 0 else self.first_row
        if first is None or not 0 <= first <= spare:
            raise ValueError(
                f"first_row {first}: wanted the place of these {len(self.local_teacher)} rows among the "
                f"{len(self.global_teacher)} of all processes"
            )
        return first


@dataclass(frozen=True, kw_only=True)
class LossInputs(TeacherInputs):
    """What the losses of one step are made from.

    Attributes:
        local_student: (b, D) student embeddings of this process's rows, any float dtype, any norm; may be the slice of
            `global_student`.
        global_student: (B, D) of all processes, gathered so that gradients flow back to where each row came from.

    The others are those of `TeacherInputs`.
    """

    local_student: Tensor
    global_student: Tensor

    @classmethod
    def of_one_process(
        cls,
        student: Tensor,
        teacher: Tensor,
        others: Tensor | None = None,
        bank: Tensor | None = None,
        sampling: SamplingWeights | None = None,
        views: Tensor | None = None,
    ) -> LossInputs:
        """A batch that is all there is."""
        return cls(
            local_student=student,
            local_teacher=teacher,
            global_student=student,
            global_teacher=teacher,
            local_others=others,
            global_others=others,
            bank=bank,
            views=views,
            local_sampling=sampling,
            global_sampling=sampling,
        )

    def check(self, *, same_width: bool = True) -> None:
        """Refuse what would broadcast, or fail far from its cause; raises ValueError.

        Args:
            same_width: whether the student's embeddings are as wide as the teacher's.
        """
        _check_rows(self.local_student, self.local_teacher, same_width=same_width)
        _check_rows(self.global_student, self.global_teacher, same_width=same_width)
        width = self.local_teacher.shape[1]
        for name in ("global_teacher", "local_others", "global_others", "bank", "views"):
            if (matrix := getattr(self, name)) is not None:
                _check_matrix(name, matrix, width)
        for name in ("others", "sampling"):
            if (getattr(self, f"local_{name}") is None) != (getattr(self, f"global_{name}") is None):
                raise ValueError(f"local_{name} without global_{name}, or the other way round: wanted both or neither")
        if self.local_sampling is not None:
            _check_sampling(self.local_sampling, self.local_teacher, self.local_others)
        if self.global_sampling is not None and self.global_sampling is not self.local_sampling:
            _check_sampling(self.global_sampling, self.global_teacher, self.global_others)


@overload
def logit_factor(logit_scale: float, temperature: float) -> float: ...


@overload
def logit_factor(logit_scale: float, temperature: float | Tensor) -> float | Tensor: ...


def logit_factor(logit_scale: float, temperature: float | Tensor) -> float | Tensor:
    """What cosines are multiplied by: logit scale / temperature; a tensor's value is not looked at (a GPU would wait).

    Raises:
        ValueError: if a number is not positive.
    """
    if not logit_scale > 0 or (not isinstance(temperature, Tensor) and not temperature > 0):
        raise ValueError(f"logit_scale {logit_scale} and temperature {temperature}: wanted both above 0")
    return logit_scale / temperature


def _check_rows(student: Tensor, teacher: Tensor, *, same_width: bool) -> None:
    _check_matrix("student", student)
    _check_matrix("teacher", teacher)
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} rows of the student's against {len(teacher)} of the teacher's")
    if same_width and student.shape[1] != teacher.shape[1]:
        raise ValueError(f"student embeddings {student.shape[1]} wide, the teacher's {teacher.shape[1]}")


def _check_sampling(weights: SamplingWeights, rows: Tensor, others: Tensor | None) -> None:
    num = None if others is None else len(others)
    if weights.sentences.shape != (num,) or not weights.sentences.is_floating_point():
        found = f"{tuple(weights.sentences.shape)} {weights.sentences.dtype}"
        raise ValueError(f"sentence_log_weights: {found}; wanted a float for each of {num} sentences")
    places, values = weights.places, weights.values
    if places is None and values is None:
        return
    if places is None or values is None or places.shape != values.shape or places.ndim != 2:
        raise ValueError("own_log_weights: wanted places and values of one shape, (images, candidates)")
    if len(places) != len(rows) or places.dtype.is_floating_point or not values.is_floating_point():
        raise ValueError(
            f"own_log_weights: {tuple(places.shape)} {places.dtype} and {values.dtype}; wanted int64 places and floats "
            f"for {len(rows)} images"
        )


def _check_matrix(name: str, matrix: Tensor, width: int | None = None) -> None:
    if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
        raise ValueError(f"{name}: {tuple(matrix.shape)} {matrix.dtype}; wanted a (rows, width) matrix of floats")
    if width is not None and matrix.shape[1] != width:
        raise ValueError(f"{name}: {matrix.shape[1]} wide, the teacher's embeddings are {width}")
