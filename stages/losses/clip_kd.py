"""Losses that hold a student's image embedding against the teacher's of the same image, after CLIP-KD.

CLIP-KD: Yang et al., CVPR 2024, arXiv 2307.12732, as the code released with it computes it (`KDClipLoss`). There images
and texts come in pairs and the student has both towers; here the student is the image tower alone, its images are
paired with nothing, and only that half of each loss is left. All rows are L2-normalised inside; fp16 and bf16 are
promoted to float32, float64 stays, whatever autocast and TF32 say; no gradient reaches a teacher embedding.
"""

from __future__ import annotations

from torch import Tensor

from .info_nce import info_nce_rows, masked_share
from .loss_inputs import LossInputs, TeacherInputs, logit_factor
from .similarity_blocks import no_autocast, unit_rows


def mse_loss(student_images: Tensor, teacher_images: Tensor) -> Tensor:
    """Mean squared error between unit embeddings, mean over images and over the D numbers of each.

    CLIP-KD's feature distillation (FD), the image half, scaled as the released code does (`F.mse_loss`, weight 2000),
    so that its weights can be taken over. Between unit rows it is 2/D · (1 - cosine): the feature loss at another
    weight, nothing else.

    Args:
        student_images: (B, D) student embeddings, any float dtype, any norm.
        teacher_images: (B, D) teacher embeddings of the same images.

    Returns:
        Scalar, float32 or, if an input is, float64; from 0 to 4/D.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    return mse_share(LossInputs.of_one_process(student_images, teacher_images))


def icl_loss(
    student_images: Tensor,
    teacher_images: Tensor,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 100.0,
    bank_images: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Interactive contrastive loss: each student image has to find the teacher's embedding of itself among the others.

        mean over i of -log( exp z_ii / (exp z_ii + Σ_negatives exp z_ij) ),    z_ij = s/T · cos(û_i, [u; w]_j)

    CLIP-KD's interactive contrastive learning (ICL) contrasts a student's image with the teacher's texts, its caption
    being the positive. **Adapted**: without captions the teacher's own embedding of the image is the positive and its
    embeddings of other images, of the batch and of a bank w, are the negatives. Nor does its code mask
    likely false negatives.

    Args:
        student_images: (B, D) û, any float dtype, any norm.
        teacher_images: (B, D) u of the same images.
        temperature: T; a scalar tensor gets a gradient.
        logit_scale: s, multiplies cosines.
        bank_images: (M, D) w, more teacher images, none of them in the batch.
        threshold: an image whose teacher embedding has at least this cosine with u_i is no negative of i (it may show
            the same thing). None: every other image is one.

    Returns:
        Scalar, float32 or, if an input is, float64.

    Raises:
        ValueError: if shapes or dtypes do not fit, or temperature or logit_scale is not positive.
    """
    inputs = LossInputs.of_one_process(student_images, teacher_images, bank=bank_images)
    return icl_share(inputs, logit_factor(logit_scale, temperature), threshold)


def mse_share(inputs: LossInputs, factor: float = 1.0) -> Tensor:
    """This process's share of `mse_loss`; `factor` counts for nothing."""
    inputs.check()
    student, teacher = unit_rows(inputs.local_student, inputs.local_teacher)
    with no_autocast(student.device):
        return (student - teacher).square().sum() / inputs.global_student.numel()


def icl_share(inputs: LossInputs, factor: float | Tensor, threshold: float | None = None) -> Tensor:
    """This process's share of `icl_loss`."""
    inputs.check()
    columns = inputs.pseudo_others()
    total = info_nce_rows(inputs.local_student, inputs.local_teacher, columns, inputs.place(), factor, threshold)
    return total / len(inputs.global_teacher)


def icl_diagnostics(inputs: TeacherInputs, factor: float, threshold: float | None = None) -> dict[str, Tensor]:
    """The share of other rows that are no negatives."""
    if threshold is None:
        return {}
    return {"masked": masked_share(inputs.local_teacher, inputs.pseudo_others(), inputs.place(), threshold)}
