"""A labelled set embedded by a trained student; what its teacher said of it comes from the cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...cache.errors import InputError
from ...cache.reader.feature_cache import EvaluateSet, FeatureCache
from ..devices import resolve_device
from ..inputs.image_source import ImageSource, require_at_hand
from ..inputs.open_source import open_source
from .embedded_set import EmbeddedSet
from .labelled_pictures import LabelledPictures


class Stopped(Exception):  # noqa: N818 - no error
    """Embedding a set was asked to stop; nothing of it is kept."""


def embed_set(
    student: nn.Module,
    record: dict[str, Any],
    cache: FeatureCache,
    name: str,
    images_root: str | Path | ImageSource,
    *,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
) -> EmbeddedSet:
    """A labelled set's images as a student sees them and, from the cache, as its teacher did. No teacher is loaded.

    The student sees images as the teacher does (resize mode, filter, mean and std), at its own size. An image that
    stage one or the student cannot read counts as wrong for both.

    Args:
        student, record: from `load_student`.
        name: of the evaluation set, as in `[evaluate.NAME]`.
        images_root: where the set's images are: a folder, or what else `open_source` opens.
        workers: threads that decode; 0 takes one for each core.

    Raises:
        InputError: if the cache has no such set or another teacher's embeddings, or the folder is missing.
    """
    teacher = {key: cache.teacher.get(key) for key in record["teacher"]}
    if teacher != record["teacher"]:
        raise InputError(
            f"{cache.layout.root}: embeddings of {teacher}, but the student learned from {record['teacher']}; "
            "evaluate it with the cache of its own teacher"
        )
    labelled = labelled_set(cache, name)
    require_images(images_root, name)
    image_size = record["student"][record["name"]]["image_size"]
    pictures = LabelledPictures(
        labelled, images_root, record["preprocess"], image_size, batch_size=batch_size, workers=workers
    )
    return embed_pictures(student, labelled, pictures, resolve_device(device))


def embed_pictures(
    student: nn.Module,
    labelled: EvaluateSet,
    pictures: LabelledPictures,
    device: torch.device,
    stopped: Callable[[], bool] | None = None,
) -> EmbeddedSet:
    """The same, of pictures that are at hand; raises Stopped if `stopped`, asked before each batch, says so."""
    embeddings = np.full(labelled.images.embeddings.shape, np.nan, dtype=np.float32)
    student = student.to(device).eval()
    with torch.inference_mode():
        for rows, batch in pictures:
            if stopped is not None and stopped():
                raise Stopped
            emitted = student(pictures.normalise(batch.to(device)))
            if not isinstance(emitted, Tensor) or emitted.shape != (len(rows), embeddings.shape[1]):
                found = tuple(emitted.shape) if isinstance(emitted, Tensor) else f"a {type(emitted).__name__}"
                raise InputError(
                    f"the student emits {found} for {len(rows)} images; wanted ({len(rows)}, {embeddings.shape[1]}), "
                    "the width of the teacher's embeddings"
                )
            embeddings[rows] = emitted.float().cpu().numpy()
    return EmbeddedSet.of(embeddings, labelled)


def labelled_set(cache: FeatureCache, name: str) -> EvaluateSet:
    """A labelled set of a cache; InputError if it has no such set."""
    if name not in cache.evaluate:
        there = ", ".join(sorted(cache.evaluate)) or "none"
        raise InputError(
            f"{cache.layout.root}: no evaluation set {name!r}, there is {there}; `dimefm cache append` takes one in"
        )
    return cache.evaluate[name]


def require_images(images_root: str | Path | ImageSource, name: str) -> None:
    """Raises InputError if the folder of a labelled set is missing."""
    require_at_hand(open_source(images_root), f"wanted the images of evaluate.{name}")
