"""A look at the teacher before it is asked a million times: wrong weights and precisions show in a few embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.errors import InputError
from ..devices import memory_errors_as
from .plausible import scale_remark
from .teacher import Teacher, out_of_memory

CONSTANT_COSINE = 1e-4
"""Embeddings that are all nearer to each other than this say nothing about what was embedded."""


def check_teacher(teacher: Teacher, crops: Sequence[np.ndarray], sentences: Sequence[str]) -> list[str]:
    """Embed a few images and sentences and refuse a teacher that cannot be one.

    Args:
        crops: (H, W, 3) uint8 crops of images that differ from each other, as `teacher.crop` makes them, at least one.
        sentences: sentences that differ from each other, at least one.

    Returns:
        What to show a user, a line for each finding: the width and logit scale; of the images and of the sentences the
        L2 norms before normalisation, and the standard deviation of the unit rows, mean over the dimensions; the
        cosines of every image with every sentence; then what is unusual, and the teacher's own `notes`, if any.

    Raises:
        InputError: if a batch does not fit into the device's memory, or if embeddings have another width than the
            teacher's, are not finite, zero, beyond float16, or the same whatever was embedded.
        ValueError: if there is no image or no sentence.
    """
    if not len(crops) or not sentences:
        raise ValueError(f"{len(crops)} images and {len(sentences)} sentences: wanted at least one of each")
    image_rows = _in_batches(
        lambda batch: teacher.encode_images(teacher.normalise(torch.from_numpy(np.stack(batch)))), crops, teacher
    )
    sentence_rows = _in_batches(lambda batch: teacher.encode_tokens(teacher.tokenize(batch)), sentences, teacher)
    image_units = _units(image_rows, "images", teacher)
    sentence_units = _units(sentence_rows, "sentences", teacher)
    key = "distill.loss.logit_scale" if teacher.settings.is_from_outside else "teacher.logit_scale"
    remark = "" if teacher.settings.logit_scale else scale_remark(teacher.logit_scale, key)
    return [
        f"teacher: {teacher.embed_dim} dimensions, logit scale {teacher.logit_scale:.2f}",
        _line(f"{len(crops)} images", image_rows, image_units),
        _line(f"{len(sentences)} sentences", sentence_rows, sentence_units),
        f"cosine of image and sentence: {_spread(image_units @ sentence_units.T)}",
        *([remark] if remark else []),
        *getattr(teacher, "notes", []),
    ]


def _in_batches(encode: Callable[[Any], Tensor], inputs: Sequence[Any], teacher: Teacher) -> np.ndarray:
    """Embeddings in batches no larger than stage one's: what fits into memory there fits here."""
    step = teacher.settings.batch_size
    with memory_errors_as(out_of_memory(teacher, step)):
        return np.concatenate([encode(inputs[i : i + step]).numpy() for i in range(0, len(inputs), step)])


def _units(rows: np.ndarray, what: str, teacher: Teacher) -> np.ndarray:
    """Rows at length one, once it is certain that they have a direction, and not all the same one."""
    where = f"{teacher.settings.model}: embeddings of {what}"
    if rows.shape[1] != teacher.embed_dim:
        raise InputError(f"{where}: {rows.shape[1]} dimensions; the teacher says embed_dim = {teacher.embed_dim}")
    if not np.isfinite(rows).all():
        raise InputError(
            f"{where}: NaN or infinite; wanted numbers: check the weights, or set another teacher.precision"
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise InputError(f"{where}: all zero; wanted directions: check that the weights belong to this model config")
    if np.abs(rows).max() > np.finfo(np.float16).max:
        raise InputError(f"{where}: values up to {np.abs(rows).max():.3g}; the cache holds float16, up to 65504")
    units = rows / norms
    halves = rows.astype(np.float16).astype(np.float64)
    kept = (halves * units).sum(axis=1) / np.maximum(np.linalg.norm(halves, axis=1), np.finfo(np.float64).tiny)
    if kept.min() < 1 - CONSTANT_COSINE:
        raise InputError(
            f"{where}: norms down to {norms.min():.3g}; the cache holds float16, in which they lose their direction "
            f"(cosine {kept.min():.4f}): check the weights"
        )
    if len(units) > 1 and (units @ units[0]).min() > 1 - CONSTANT_COSINE:
        raise InputError(
            f"{where}: the same for all {len(units)} of them; wanted them to differ: check that the weights belong to "
            "this model config and that the inputs are not copies of one"
        )
    return np.asarray(units)


def _line(what: str, rows: np.ndarray, units: np.ndarray) -> str:
    return f"{what}: norm {_spread(np.linalg.norm(rows, axis=1))}; std over rows {units.std(axis=0).mean():.4f}"


def _spread(values: np.ndarray) -> str:
    return f"{values.min():.3f} to {values.max():.3f}, mean {values.mean():.3f}"
