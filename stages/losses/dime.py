"""The losses of DIME-FM (arXiv 2303.18232, section 3), pure functions of embeddings.

Notation of the paper: u teacher images, û student images, v teacher sentences; B images, N sentences, unpaired. With

    K(P ‖ Q; T) = mean over rows of KL(softmax(P / T) ‖ softmax(Q / T))      (no T² factor, the diagonal kept)

every loss compares the teacher's similarities to the student's. All rows are L2-normalised inside. fp16 and bf16 are
promoted to float32, float64 stays; products ignore autocast, TF32 and bf16 shortcuts, forward and backward. No gradient
reaches a teacher embedding. However many sentences or bank images there are, memory beyond them is that of one block.
"""

from __future__ import annotations

from torch import Tensor

from .diagnostics import effective_candidates
from .loss_inputs import LossInputs, SamplingWeights, TeacherInputs, logit_factor
from .similarity_blocks import dtype_of, no_autocast, unit_rows
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
    inputs = LossInputs.of_one_process(student_images, teacher_images, others=teacher_sentences, sampling=sampling)
    return vl_share(inputs, logit_factor(logit_scale, temperature))


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
    inputs = LossInputs.of_one_process(student_images, teacher_images, bank=bank_images)
    return pvl_share(inputs, logit_factor(logit_scale, temperature))


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
    return udist_share(
        LossInputs.of_one_process(student_images, teacher_images), logit_factor(logit_scale, temperature)
    )


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
    return feature_share(LossInputs.of_one_process(student_images, teacher_images))


def vl_share(inputs: LossInputs, factor: float) -> Tensor:
    """This process's share of `vl_loss`, as docs/losses.md describes shares; so are the others below."""
    inputs.check()
    teacher, student, global_student = inputs.local_teacher, inputs.local_student, inputs.global_student
    others, global_others = inputs.need("local_others"), inputs.need("global_others")
    num_rows, num_others = len(global_student), len(global_others)
    over_others, over_rows = inputs.log_weights()
    weights = _other_weights(inputs)
    if inputs.global_others is inputs.local_others and global_student is student:
        # The second matrix is the first one transposed: its rows are our columns.
        return kl_both_ways(
            *(teacher, student, others, others, factor),
            row_weight=1 / num_rows,
            column_weight=1 / num_others if weights is None else weights,
            log_weights=over_others,
        )
    kl_of_rows = kl_rows(teacher, student, global_others, global_others, factor, log_weights=over_others)
    sides = others, others, inputs.global_teacher, global_student
    kl_of_others = kl_rows(*sides, factor, log_weights=over_rows, row_weights=weights)
    return kl_of_rows / num_rows + (kl_of_others / num_others if weights is None else kl_of_others)


def pvl_share(inputs: LossInputs, factor: float) -> Tensor:
    inputs.check()
    columns = inputs.pseudo_others()
    total = kl_rows(inputs.local_teacher, inputs.local_student, columns, columns, factor)
    return 2 * total / len(inputs.global_teacher)


def udist_share(inputs: LossInputs, factor: float) -> Tensor:
    inputs.check(same_width=False)
    total = kl_rows(inputs.local_teacher, inputs.local_student, inputs.global_teacher, inputs.global_student, factor)
    return 2 * total / len(inputs.global_teacher)


def feature_share(inputs: LossInputs, factor: float = 1.0) -> Tensor:
    """`factor` counts for nothing: cosines are not scaled here."""
    inputs.check()
    student, teacher = unit_rows(inputs.local_student, inputs.local_teacher)
    with no_autocast(student.device):
        return (1 - (student * teacher).sum(dim=1)).sum() / len(inputs.global_student)


def vl_diagnostics(inputs: TeacherInputs, factor: float) -> dict[str, Tensor]:
    """How many columns each of the two softmaxes spreads over."""
    over_others, over_rows = inputs.log_weights()
    others, global_others = inputs.need("local_others"), inputs.need("global_others")
    return {
        "candidates": effective_candidates(inputs.local_teacher, global_others, 1.0, factor, over_others),
        "candidates_others": effective_candidates(others, inputs.global_teacher, 1.0, factor, over_rows),
    }


def pvl_diagnostics(inputs: TeacherInputs, factor: float) -> dict[str, Tensor]:
    return {"candidates": effective_candidates(inputs.local_teacher, inputs.pseudo_others(), 1.0, factor)}


def udist_diagnostics(inputs: TeacherInputs, factor: float) -> dict[str, Tensor]:
    return {"candidates": effective_candidates(inputs.local_teacher, inputs.global_teacher, 1.0, factor)}


def _other_weights(inputs: LossInputs) -> Tensor | None:
    """(n,) what each of the local others counts in the mean over the global ones; None: all alike."""
    if inputs.local_sampling is None or inputs.global_sampling is None:
        return None
    dtype = dtype_of(inputs.local_student, inputs.local_sampling.sentences)
    local, everywhere = inputs.local_sampling.sentences.to(dtype), inputs.global_sampling.sentences.to(dtype)
    return (local - everywhere.logsumexp(0)).exp()
