"""What the losses of one step are made from, and the checks that keep a wrong shape from broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

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


@dataclass(frozen=True)
class LossInputs:
    """What the losses of one step are made from: this process's rows, and everybody's in the order of the processes.

    Where there is one process only, the two are the same tensors: `LossInputs.of_one_process`.

    Attributes:
        student_images: (b, D) û of this process, any float dtype, any norm; may be the slice of `all_student_images`.
        teacher_images: (b, D) u of the same images.
        all_student_images: (B, D) û of all processes, gathered so that gradients flow back to where each row came from.
        all_teacher_images: (B, D) u of the same images.
        sentences: (n, D) v of this process; None where `vl` is off.
        all_sentences: (N, D) v of all processes.
        bank_images: (M, D) more teacher images for `pvl` and `icl`, the same in every process, or None.
        first_image: where this process's images begin among everybody's; `icl` wants it where these are more.
        sampling: of this process's sentences and images; None where all sentences are random.
        all_sampling: of everybody's.
        first_sentence: where this process's sentences begin among everybody's; `sampling` wants it.
        other_views: (V, D) teacher embeddings of other cached views of the images, those of all processes, or None.
    """

    student_images: Tensor
    teacher_images: Tensor
    all_student_images: Tensor
    all_teacher_images: Tensor
    sentences: Tensor | None = None
    all_sentences: Tensor | None = None
    bank_images: Tensor | None = None
    first_image: int | None = None
    sampling: SamplingWeights | None = None
    all_sampling: SamplingWeights | None = None
    first_sentence: int = 0
    other_views: Tensor | None = None

    @classmethod
    def of_one_process(
        cls,
        student_images: Tensor,
        teacher_images: Tensor,
        sentences: Tensor | None = None,
        bank_images: Tensor | None = None,
        sampling: SamplingWeights | None = None,
        other_views: Tensor | None = None,
    ) -> LossInputs:
        """A batch that is all there is."""
        return cls(
            student_images,
            teacher_images,
            all_student_images=student_images,
            all_teacher_images=teacher_images,
            sentences=sentences,
            all_sentences=sentences,
            bank_images=bank_images,
            sampling=sampling,
            all_sampling=sampling,
            other_views=other_views,
        )

    def check(self, *, same_width: bool) -> None:
        """Refuse what would broadcast, or fail far from its cause; raises ValueError."""
        _check_images(self.student_images, self.teacher_images, same_width=same_width)
        width = self.teacher_images.shape[1]
        if self.all_student_images is not self.student_images or self.all_teacher_images is not self.teacher_images:
            _check_images(self.all_student_images, self.all_teacher_images, same_width=same_width)
            _check_matrix("all_teacher_images", self.all_teacher_images, width)
        if (self.sentences is None) != (self.all_sentences is None):
            raise ValueError("sentences without all_sentences, or the other way round: wanted both or neither")
        for name, matrix in (
            ("teacher_sentences", self.sentences),
            ("all_sentences", self.all_sentences),
            ("bank_images", self.bank_images),
            ("other_views", self.other_views),
        ):
            if matrix is not None:
                _check_matrix(name, matrix, width)
        if (self.sampling is None) != (self.all_sampling is None):
            raise ValueError("sampling without all_sampling, or the other way round: wanted both or neither")
        if self.sampling is not None:
            _check_sampling(self.sampling, self.teacher_images, self.sentences)
        if self.all_sampling is not None and self.all_sampling is not self.sampling:
            _check_sampling(self.all_sampling, self.all_teacher_images, self.all_sentences)

    def pseudo_sentences(self) -> Rows:
        """(B + M, D) teacher images in the place of sentences: everybody's, then the bank's; cut off from gradients."""
        everybodys = self.all_teacher_images.detach()
        return everybodys if self.bank_images is None else (everybodys, self.bank_images.detach())

    def log_weights(self) -> tuple[LogWeights | None, LogWeights | None]:
        """For logits of this process's images over everybody's sentences, and of its sentences over all images."""
        return log_weights_both_ways(self.sampling, self.all_sampling, self.first_sentence)

    def place(self) -> int:
        """Where this process's images begin among everybody's.

        Raises:
            ValueError: if that was not said, or cannot be.
        """
        spare = len(self.all_teacher_images) - len(self.teacher_images)
        first = 0 if self.first_image is None and spare == 0 else self.first_image
        if first is None or not 0 <= first <= spare:
            raise ValueError(
                f"first_image {first}: wanted the place of these {len(self.teacher_images)} images among the "
                f"{len(self.all_teacher_images)} of all processes"
            )
        return first


def log_weights_both_ways(
    own: SamplingWeights | None, everybodys: SamplingWeights | None, first_sentence: int
) -> tuple[LogWeights | None, LogWeights | None]:
    """For logits of this process's images over everybody's sentences, and of its sentences over everybody's images.

    Args:
        own: this process's.
        everybodys: those of all.
        first_sentence: where this process's sentences begin among everybody's.
    """
    if own is None or everybodys is None:
        return None, None
    over_sentences = LogWeights(everybodys.sentences, own.places, own.values)
    # A sentence's own weight is the same in all logits of its row, and changes no softmax over images.
    places = None if everybodys.places is None else everybodys.places - first_sentence
    return over_sentences, LogWeights(None, places, everybodys.values, along=0)


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


def _check_images(student_images: Tensor, teacher_images: Tensor, *, same_width: bool) -> None:
    _check_matrix("student_images", student_images)
    _check_matrix("teacher_images", teacher_images)
    if len(student_images) != len(teacher_images):
        raise ValueError(f"{len(student_images)} student images against {len(teacher_images)} teacher images")
    if same_width and student_images.shape[1] != teacher_images.shape[1]:
        raise ValueError(f"student embeddings {student_images.shape[1]} wide, the teacher's {teacher_images.shape[1]}")


def _check_sampling(weights: SamplingWeights, images: Tensor, sentences: Tensor | None) -> None:
    num = None if sentences is None else len(sentences)
    if weights.sentences.shape != (num,) or not weights.sentences.is_floating_point():
        found = f"{tuple(weights.sentences.shape)} {weights.sentences.dtype}"
        raise ValueError(f"sentence_log_weights: {found}; wanted a float for each of {num} sentences")
    places, values = weights.places, weights.values
    if places is None and values is None:
        return
    if places is None or values is None or places.shape != values.shape or places.ndim != 2:
        raise ValueError("own_log_weights: wanted places and values of one shape, (images, candidates)")
    if len(places) != len(images) or places.dtype.is_floating_point or not values.is_floating_point():
        raise ValueError(
            f"own_log_weights: {tuple(places.shape)} {places.dtype} and {values.dtype}; wanted int64 places and floats "
            f"for {len(images)} images"
        )


def _check_matrix(name: str, matrix: Tensor, width: int | None = None) -> None:
    if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
        raise ValueError(f"{name}: {tuple(matrix.shape)} {matrix.dtype}; wanted a (rows, width) matrix of floats")
    if width is not None and matrix.shape[1] != width:
        raise ValueError(f"{name}: {matrix.shape[1]} wide, the teacher's images are {width}")
