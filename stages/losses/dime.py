"""The losses of DIME-FM (arXiv 2303.18232, section 3), pure functions of embeddings.

Notation of the paper: u teacher images, û student images, v teacher sentences; B images, N sentences, unpaired. With

    K(P ‖ Q; T) = mean over rows of KL(softmax(P / T) ‖ softmax(Q / T))      (no T² factor, the diagonal kept)

every loss compares the teacher's similarities to the student's. All rows are L2-normalised inside. fp16 and bf16 are
promoted to float32, float64 stays; products ignore autocast, TF32 and bf16 shortcuts, forward and backward. No gradient
reaches a teacher embedding. However many sentences or bank images there are, memory beyond them is that of one block.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .loss_inputs import LossInputs, SamplingWeights, logit_factor
from .similarity_blocks import dtype_of, no_autocast
from .wide_kl import kl_both_ways, kl_rows


def vl_loss(
    student_images: Tensor,
    teacher_images: Tensor,
    teacher_sentences: Tensor,
    temperature: float = 1.0,
    logit_scale: float = 100.0,
    sentence_log_weights: Tensor | None = None,
    own_log_weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Vision-language loss: K(s·u·vᵀ ‖ s·û·vᵀ) + K(s·v·uᵀ ‖ s·v·ûᵀ), images over sentences plus sentences over images.

    Sentences that were not drawn alike can be weighed: self-normalised importance sampling (Owen, Monte Carlo theory,
    methods and examples, chapter 9), the weight of a cell being one over the probability that a step holds it. Its
    logarithm is added to teacher's and student's logits; the sentences' rows have the mean by their own weights.

    Args:
        student_images: (B, D) û, any float dtype, any norm.
        teacher_images: (B, D) u of the same images.
        teacher_sentences: (N, D) v, paired with nothing.
        temperature: T, the same for teacher and student.
        logit_scale: s, multiplies cosines.
        sentence_log_weights: (N,) float, of each sentence; only their differences count. None: all alike.
        own_log_weights: places (B, k) int64 and values (B, k): for each image some sentences, by their position (none
            twice, -1 for none), that it has another weight with than others have: the difference of the logarithms.

    Returns:
        Scalar, float32 or, if an embedding is, float64.

    Raises:
        ValueError: if shapes or dtypes do not fit, or temperature or logit_scale is not positive.
    """
    sampling = None
    if sentence_log_weights is not None or own_log_weights is not None:
        equal = teacher_sentences.new_zeros(len(teacher_sentences))
        columns = equal if sentence_log_weights is None else sentence_log_weights
        sampling = SamplingWeights(columns, *(own_log_weights or ()))
    inputs = LossInputs.of_one_process(student_images, teacher_images, sentences=teacher_sentences, sampling=sampling)
    return _vl(inputs, logit_factor(logit_scale, temperature))


def pvl_loss(
    student_images: Tensor,
    teacher_images: Tensor,
    temperature: float = 3.0,
    logit_scale: float = 100.0,
    bank_images: Tensor | None = None,
) -> Tensor:
    """Pseudo vision-language loss: 2·K(s·u·uᵀ ‖ s·û·uᵀ), the teacher's image embeddings standing in for sentences.

    With a bank w, its rows stand beside the batch's own as columns on both sides: 2·K(s·u·[u; w]ᵀ ‖ s·û·[u; w]ᵀ).

    Args:
        student_images: (B, D) û, any float dtype, any norm.
        teacher_images: (B, D) u of the same images.
        temperature: T, the same for teacher and student.
        logit_scale: s, multiplies cosines.
        bank_images: (M, D) w, more teacher images, none of them in the batch.

    Returns:
        Scalar, float32 or, if an input is, float64.

    Raises:
        ValueError: if shapes or dtypes do not fit, or temperature or logit_scale is not positive.
    """
    inputs = LossInputs.of_one_process(student_images, teacher_images, bank_images=bank_images)
    return _pvl(inputs, logit_factor(logit_scale, temperature))


def udist_loss(
    student_images: Tensor, teacher_images: Tensor, temperature: float = 7.0, logit_scale: float = 100.0
) -> Tensor:
    """Uni-modal distance loss: 2·K(s·u·uᵀ ‖ s·û·ûᵀ), with gradient through both sides of û·ûᵀ.

    It compares similarities within one space each, so a rotated student has loss 0 and the widths may differ.

    Args:
        student_images: (B, any width) û, any float dtype, any norm.
        teacher_images: (B, D) u of the same images.
        temperature: T, the same for teacher and student.
        logit_scale: s, multiplies cosines.

    Returns:
        Scalar, float32 or, if an input is, float64.

    Raises:
        ValueError: if shapes or dtypes do not fit, or temperature or logit_scale is not positive.
    """
    return _udist(LossInputs.of_one_process(student_images, teacher_images), logit_factor(logit_scale, temperature))


def feature_loss(student_images: Tensor, teacher_images: Tensor) -> Tensor:
    """1 - cosine, mean over the images: 0 where directions agree, 2 where they oppose.

    Args:
        student_images: (B, D) student embeddings, any float dtype, any norm.
        teacher_images: (B, D) teacher embeddings of the same images.

    Returns:
        Scalar, float32 or, if an input is, float64.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    return _feature(LossInputs.of_one_process(student_images, teacher_images))


def _vl(inputs: LossInputs, factor: float) -> Tensor:
    inputs.check(same_width=True)
    if inputs.sentences is None or inputs.all_sentences is None:
        raise ValueError("no sentences, but vl is on")
    teacher, all_teachers = _targets(inputs)
    sentences, all_sentences = inputs.sentences.detach(), inputs.all_sentences.detach()
    student, all_students = inputs.student_images, inputs.all_student_images
    num_images, num_sentences = len(all_students), len(all_sentences)
    over_sentences, over_images = inputs.log_weights()
    weights = _sentence_weights(inputs)
    if inputs.all_sentences is inputs.sentences and all_students is student:
        # The second matrix is the first one transposed: its rows are our columns.
        return kl_both_ways(
            *(teacher, student, sentences, sentences, factor),
            row_weight=1 / num_images,
            column_weight=1 / num_sentences if weights is None else weights,
            log_weights=over_sentences,
        )
    kl_images = kl_rows(teacher, student, all_sentences, all_sentences, factor, log_weights=over_sentences)
    sides = sentences, sentences, all_teachers, all_students
    kl_sentences = kl_rows(*sides, factor, log_weights=over_images, row_weights=weights)
    return kl_images / num_images + (kl_sentences / num_sentences if weights is None else kl_sentences)


def _sentence_weights(inputs: LossInputs) -> Tensor | None:
    """(n,) what each of this process's sentences counts in the mean over everybody's; None: all alike."""
    if inputs.sampling is None or inputs.all_sampling is None:
        return None
    dtype = dtype_of(inputs.student_images, inputs.sampling.sentences)
    own, everybodys = inputs.sampling.sentences.to(dtype), inputs.all_sampling.sentences.to(dtype)
    return (own - everybodys.logsumexp(0)).exp()


def _pvl(inputs: LossInputs, factor: float) -> Tensor:
    inputs.check(same_width=True)
    teacher, all_teachers = _targets(inputs)
    bank = inputs.bank_images
    columns = all_teachers if bank is None else (all_teachers, bank.detach())
    return 2 * kl_rows(teacher, inputs.student_images, columns, columns, factor) / len(all_teachers)


def _udist(inputs: LossInputs, factor: float) -> Tensor:
    inputs.check(same_width=False)
    teacher, all_teachers = _targets(inputs)
    total = kl_rows(teacher, inputs.student_images, all_teachers, inputs.all_student_images, factor)
    return 2 * total / len(all_teachers)


def _feature(inputs: LossInputs) -> Tensor:
    inputs.check(same_width=True)
    dtype = dtype_of(inputs.student_images, inputs.teacher_images)
    with no_autocast(inputs.student_images.device):
        student = F.normalize(inputs.student_images.to(dtype), dim=1)
        teacher = F.normalize(inputs.teacher_images.detach().to(dtype), dim=1)
        return (1 - (student * teacher).sum(dim=1)).sum() / len(inputs.all_student_images)


def _targets(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """The teacher's images here and everywhere, cut off from gradients; one object where they are one."""
    here = inputs.teacher_images.detach()
    return here, here if inputs.all_teacher_images is inputs.teacher_images else inputs.all_teacher_images.detach()
