"""A look at the teacher before it is asked a million times: wrong weights and precisions show in a few embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.errors import InputError
from ..devices import memory_errors_as
from .teacher import Teacher, out_of_memory

CONSTANT_COSINE = 1e-4
"""Embeddings that are all nearer to each other than this say nothing about what was embedded."""


@dataclass(frozen=True)
class Spread:
    """Smallest value, mean and largest value."""

    low: float
    mean: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}, mean {self.mean:.3f}"


@dataclass(frozen=True)
class TeacherCheck:
    """What a teacher makes of a few images and sentences.

    Attributes:
        image_norms: L2 norms of the image embeddings, before normalisation.
        sentence_norms: likewise of the sentences.
        cosines: every image against every sentence.
        image_std: standard deviation of the unit image embeddings over the rows, mean over the dimensions.
        sentence_std: likewise of the sentences.
    """

    num_images: int
    num_sentences: int
    embed_dim: int
    logit_scale: float
    image_norms: Spread
    sentence_norms: Spread
    cosines: Spread
    image_std: float
    sentence_std: float

    def lines(self) -> list[str]:
        """What to show a user, a line for each finding."""
        return [
            f"teacher: {self.embed_dim} dimensions, logit scale {self.logit_scale:.2f}",
            f"{self.num_images} images: norm {self.image_norms}; std over rows {self.image_std:.4f}",
            f"{self.num_sentences} sentences: norm {self.sentence_norms}; std over rows {self.sentence_std:.4f}",
            f"cosine of image and sentence: {self.cosines}",
        ]


def check_teacher(teacher: Teacher, crops: Sequence[np.ndarray], sentences: Sequence[str]) -> TeacherCheck:
    """Embed a few images and sentences and refuse a teacher that cannot be one.

    Args:
        crops: (H, W, 3) uint8 crops of images that differ from each other, as `teacher.crop` makes them, at least one.
        sentences: sentences that differ from each other, at least one.

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
    return TeacherCheck(
        num_images=len(crops),
        num_sentences=len(sentences),
        embed_dim=teacher.embed_dim,
        logit_scale=teacher.logit_scale,
        image_norms=_spread(np.linalg.norm(image_rows, axis=1)),
        sentence_norms=_spread(np.linalg.norm(sentence_rows, axis=1)),
        cosines=_spread(image_units @ sentence_units.T),
        image_std=float(image_units.std(axis=0).mean()),
        sentence_std=float(sentence_units.std(axis=0).mean()),
    )


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
    if len(units) > 1 and (units @ units[0]).min() > 1 - CONSTANT_COSINE:
        raise InputError(
            f"{where}: the same for all {len(units)} of them; wanted them to differ: check that the weights belong to "
            "this model config and that the inputs are not copies of one"
        )
    return np.asarray(units)


def _spread(values: np.ndarray) -> Spread:
    return Spread(float(values.min()), float(values.mean()), float(values.max()))
