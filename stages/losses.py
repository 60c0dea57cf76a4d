"""The losses of DIME-FM (arXiv 2303.18232, section 3), pure functions of embeddings.

Notation of the paper: u teacher images, û student images, v teacher sentences; B images, N sentences, unpaired. With

    K(P ‖ Q; T) = mean over rows of KL(softmax(P / T) ‖ softmax(Q / T))      (no T² factor, the diagonal kept)

every loss compares the teacher's similarities to the student's. All rows are L2-normalised inside. fp16 and bf16 are
promoted to float32, float64 stays; products ignore autocast, TF32 and bf16 shortcuts, forward and backward. No gradient
reaches a teacher embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import LossSettings, TemperatureSettings


def vl_loss(
    student_images: Tensor,
    teacher_images: Tensor,
    teacher_sentences: Tensor,
    temperature: float = 1.0,
    logit_scale: float = 100.0,
) -> Tensor:
    """Vision-language loss: K(s·u·vᵀ ‖ s·û·vᵀ) + K(s·v·uᵀ ‖ s·v·ûᵀ), images over sentences plus sentences over images.

    Args:
        student_images: (B, D) û, any float dtype, any norm.
        teacher_images: (B, D) u of the same images.
        teacher_sentences: (N, D) v, paired with nothing.
        temperature: T, the same for teacher and student.
        logit_scale: s, multiplies cosines.

    Returns:
        Scalar, float32 or, if an input is, float64.

    Raises:
        ValueError: if shapes or dtypes do not fit, or temperature or logit_scale is not positive.
    """
    _check_images(student_images, teacher_images, same_width=True)
    _check_matrix("teacher_sentences", teacher_sentences, width=teacher_images.shape[1])
    with _no_autocast(student_images):
        student, teacher, sentences = _unit_rows(student_images, teacher_images, teacher_sentences)
        factor = _factor(logit_scale, temperature)
        teacher_logits = _products(factor * teacher, sentences)
        student_logits = _products(factor * student, sentences)
        # The second matrix is the first one transposed: its rows are our columns.
        return _kl(teacher_logits, student_logits) + _kl(teacher_logits.T, student_logits.T)


def pvl_loss(
    student_images: Tensor, teacher_images: Tensor, temperature: float = 3.0, logit_scale: float = 100.0
) -> Tensor:
    """Pseudo vision-language loss: 2·K(s·u·uᵀ ‖ s·û·uᵀ), the teacher's image embeddings standing in for sentences.

    Args:
        student_images: (B, D) û, any float dtype, any norm.
        teacher_images: (B, D) u of the same images.
        temperature: T, the same for teacher and student.
        logit_scale: s, multiplies cosines.

    Returns:
        Scalar, float32 or, if an input is, float64.

    Raises:
        ValueError: if shapes or dtypes do not fit, or temperature or logit_scale is not positive.
    """
    _check_images(student_images, teacher_images, same_width=True)
    with _no_autocast(student_images):
        student, teacher = _unit_rows(student_images, teacher_images)
        factor = _factor(logit_scale, temperature)
        return 2 * _kl(_products(factor * teacher, teacher), _products(factor * student, teacher))


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
    _check_images(student_images, teacher_images, same_width=False)
    with _no_autocast(student_images):
        student, teacher = _unit_rows(student_images, teacher_images)
        factor = _factor(logit_scale, temperature)
        return 2 * _kl(_products(factor * teacher, teacher), _products(factor * student, student))


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
    _check_images(student_images, teacher_images, same_width=True)
    with _no_autocast(student_images):
        student, teacher = _unit_rows(student_images, teacher_images)
        return 1 - (student * teacher).sum(dim=1).mean()


def loss_terms(
    student_images: Tensor,
    teacher_images: Tensor,
    teacher_sentences: Tensor | None,
    weights: LossSettings,
    temperature: TemperatureSettings,
    logit_scale: float,
) -> dict[str, Tensor]:
    """The losses that have a weight above 0, by name, not yet weighted.

    Args:
        teacher_sentences: (N, D); may be None where `vl` is off.
        logit_scale: number that replaces `weights.logit_scale`, which may be "teacher".
    """
    terms = {}
    if weights.vl:
        assert teacher_sentences is not None
        terms["vl"] = vl_loss(student_images, teacher_images, teacher_sentences, temperature.vl, logit_scale)
    if weights.pvl:
        terms["pvl"] = pvl_loss(student_images, teacher_images, temperature.pvl, logit_scale)
    if weights.udist:
        terms["udist"] = udist_loss(student_images, teacher_images, temperature.udist, logit_scale)
    if weights.feature:
        terms["feature"] = feature_loss(student_images, teacher_images)
    return terms


def effective_candidates(rows: Tensor, columns: Tensor, temperature: float, logit_scale: float) -> Tensor:
    """How many columns a row's softmax spreads over: exp(entropy), mean over the rows.

    1 says that the target is one-hot, `len(columns)` that it says nothing: either way the loss teaches little.

    Args:
        rows: (B, D) embeddings, any float dtype, any norm.
        columns: (N, D) embeddings that each row is compared to.
        temperature: of the softmax.
        logit_scale: multiplies cosines.

    Returns:
        Scalar between 1 and N.
    """
    with _no_autocast(rows), torch.no_grad():
        unit_rows, unit_columns = _unit_rows(rows, columns)
        log_p = F.log_softmax(_products(_factor(logit_scale, temperature) * unit_rows, unit_columns), dim=1)
        return (-(log_p.exp() * log_p).sum(dim=1)).exp().mean()


def _kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """K(teacher ‖ student) of logits that are already divided by the temperature, averaged over the rows."""
    log_p = F.log_softmax(teacher_logits, dim=1)
    log_q = F.log_softmax(student_logits, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum() / len(teacher_logits)


def _unit_rows(student: Tensor, *targets: Tensor) -> list[Tensor]:
    """L2-normalise rows in one format, at least float32; what is not the student's is cut off from gradients."""
    dtype = torch.float32
    for matrix in (student, *targets):
        dtype = torch.promote_types(dtype, matrix.dtype)
    return [F.normalize(matrix.to(dtype), dim=1) for matrix in (student, *(target.detach() for target in targets))]


class _Products(torch.autograd.Function):
    """rows @ columns.T, in full precision backward too: there the caller's precision flags would rule again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        with _full_precision():
            return rows @ columns.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        rows, columns = ctx.saved_tensors
        with _no_autocast(gradient), _full_precision():
            to_rows = gradient @ columns if ctx.needs_input_grad[0] else None
            to_columns = gradient.T @ rows if ctx.needs_input_grad[1] else None
        return to_rows, to_columns


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    product: Tensor = _Products.apply(rows, columns)
    return product


def _no_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep float32 products from being rounded to TF32 (GPU) or bf16 (CPU), whatever the process is set to."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later: a setting for each backend
        places: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
        before = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, value in zip(places, before):
                place.fp32_precision = value
    else:
        setting = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(setting)


def _factor(logit_scale: float, temperature: float) -> float:
    if not logit_scale > 0 or not temperature > 0:
        raise ValueError(f"logit_scale {logit_scale} and temperature {temperature}: wanted both above 0")
    return logit_scale / temperature


def _check_images(student_images: Tensor, teacher_images: Tensor, *, same_width: bool) -> None:
    _check_matrix("student_images", student_images)
    _check_matrix("teacher_images", teacher_images)
    if len(student_images) != len(teacher_images):
        raise ValueError(f"{len(student_images)} student images against {len(teacher_images)} teacher images")
    if same_width and student_images.shape[1] != teacher_images.shape[1]:
        raise ValueError(f"student embeddings {student_images.shape[1]} wide, the teacher's {teacher_images.shape[1]}")


def _check_matrix(name: str, matrix: Tensor, width: int | None = None) -> None:
    if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
        raise ValueError(f"{name}: {tuple(matrix.shape)} {matrix.dtype}; wanted a (rows, width) matrix of floats")
    if width is not None and matrix.shape[1] != width:
        raise ValueError(f"{name}: {matrix.shape[1]} wide, the teacher's images are {width}")
