"""What an image's crop has to do with the other crops of its batch: a relational loss over cached views."""

from __future__ import annotations

from torch import Tensor

from .diagnostics import effective_candidates
from .loss_inputs import LossInputs, TeacherInputs, logit_factor
from .wide_kl import kl_rows


def view_relation_loss(
    student_images: Tensor,
    teacher_images: Tensor,
    other_views: Tensor,
    temperature: float = 3.0,
    logit_scale: float = 100.0,
) -> Tensor:
    """View relation loss: 2·K(s·u·wᵀ ‖ s·û·wᵀ), w the teacher's embeddings of the batch's *other* views.

    Each image is in the batch in one of its cached views. Its similarities to all the other cached views of all the
    batch's images, its own among them, are to be the teacher's: the student learns what a crop has in common with
    other crops of the same photo, and with those of others. The form is SEED's (Fang et al., ICLR 2021, arXiv
    2101.04731), similarities to a fixed set under a softmax; that the set is made of views is ours, as in ReSSL (Zheng
    et al., NeurIPS 2021, arXiv 2107.09282) it is made of weakly augmented images. It costs no pass through the student:
    the other views come from the cache.

    Args:
        student_images: (B, D) û of the view that the student saw, any float dtype, any norm.
        teacher_images: (B, D) u of the same view.
        other_views: (M, D) w, teacher embeddings of the images' other views.
        temperature: T, the same for teacher and student.
        logit_scale: s, multiplies cosines.

    Returns:
        Scalar, float32 or, if an input is, float64.

    Raises:
        ValueError: if shapes or dtypes do not fit, or temperature or logit_scale is not positive.
    """
    inputs = LossInputs.of_one_process(student_images, teacher_images, views=other_views)
    return views_share(inputs, logit_factor(logit_scale, temperature))


def views_share(inputs: LossInputs, factor: float) -> Tensor:
    """This process's share of `view_relation_loss`: its own rows, the other views of all processes."""
    inputs.check()
    views = inputs.need("views")
    total = kl_rows(inputs.local_teacher, inputs.local_student, views, views, factor)
    return 2 * total / len(inputs.global_teacher)


def views_diagnostics(inputs: TeacherInputs, factor: float) -> dict[str, Tensor]:
    """How many other views a row's softmax spreads over."""
    return {"candidates": effective_candidates(inputs.local_teacher, inputs.need("views"), 1.0, factor)}
