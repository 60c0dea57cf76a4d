"""Training images as a student sees labelled ones: the centre, resized as the teacher's were, at its own size."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ...cache.disk.cores import usable_cores
from ...cache.disk.cosine import unit_rows
from ...cache.reader.feature_cache import FeatureCache
from ..images.decode import ImageError, decode_image
from ..inputs.image_source import ImageSource, row_keys
from ..score.labelled_pictures import evaluation_steps

SEED = 0
CALIBRATION_ROWS = 256
PROOF_ROWS = 1000
"""Rows that are drawn, at most, to calibrate int8 and to prove an export."""
SAME_IMAGE = 0.99
"""Teacher cosine from which a training image counts as one of a labelled set."""
EQUAL = 1 - 1e-6
"""Cosine of equal embeddings."""


class TrainingPictures:
    """Pictures of training rows; unreadable ones are left out."""

    def __init__(self, cache: FeatureCache, source: ImageSource, preprocess: dict[str, Any], image_size: int) -> None:
        """Nothing is read yet.

        Args:
            source: the kept pixels of the cache, or the originals.
            preprocess: the teacher's, as the cache records it.
            image_size: S, pixels.
        """
        self.cache, self.source = cache, source
        self._to_picture, self.normalise = evaluation_steps(preprocess, image_size)
        self._keys = row_keys(source, cache.images.rows)
        self._size = image_size

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        """The rows that could be read, and their pictures, (n, 3, S, S) uint8."""
        with ThreadPoolExecutor(usable_cores()) as pool:
            pictures = list(pool.map(self._load, self._keys(rows)))
        good = [i for i, picture in enumerate(pictures) if picture is not None]
        read = [picture for picture in pictures if picture is not None]
        empty = torch.empty(0, 3, self._size, self._size, dtype=torch.uint8)
        return rows[good], torch.stack(read) if read else empty

    def _load(self, key: Any) -> Tensor | None:
        try:
            picture: Tensor = pil_to_tensor(self._to_picture(decode_image(self.source.read(key))))
        except ImageError:
            return None
        return picture


def split_rows(cache: FeatureCache) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Rows to calibrate with and rows to prove on: seeded, disjoint, ascending.

    A row whose image nearly is one of a labelled set calibrates nothing: no scored image may.

    Returns:
        At most `CALIBRATION_ROWS`, a third of what there is, and at most `PROOF_ROWS` others; and how many candidates
        were left out.
    """
    drawn = np.random.default_rng(SEED).permutation(cache.images.usable)
    count = min(CALIBRATION_ROWS, max(1, len(drawn) // 3))
    candidates = drawn[: 2 * count]
    nearest = _nearest_labelled(cache, candidates)
    # A teacher that is as sure of most images does not tell images apart by that cosine: then only repeats count.
    same = SAME_IMAGE if (nearest < SAME_IMAGE).mean() > 0.5 else EQUAL
    labelled = nearest >= same
    calibration = candidates[~labelled][:count]
    proof = drawn[~np.isin(drawn, calibration)][:PROOF_ROWS]
    return np.sort(calibration), np.sort(proof), int(labelled.sum())


def _nearest_labelled(cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n,) largest teacher cosine of each row with an image of a labelled set; -1 where there is none."""
    nearest = np.full(len(rows), -1, dtype=np.float32)
    if not len(rows):
        return nearest
    mine, _ = unit_rows(cache.images.embeddings[rows])
    for labelled in cache.evaluate.values():
        usable = labelled.images.usable
        for first in range(0, len(usable), 4096):
            theirs, _ = unit_rows(labelled.images.embeddings[usable[first : first + 4096]])
            nearest = np.maximum(nearest, (mine @ theirs.T).max(axis=1))
    return nearest
