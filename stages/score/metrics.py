"""What a score is: pure functions from logits, embeddings and labels to numbers. NumPy alone.

A row of NaN is an image that could not be read: it is wrong wherever right and wrong are counted, and left out where
two models are held against each other.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]
Hits = NDArray[np.bool_]


def unit_rows(embeddings: Matrix, dtype: type[np.floating[Any]] = np.float32) -> NDArray[Any]:
    """Rows of length 1, computed in `dtype`; rows of zeros stay, rows with NaN stay NaN."""
    rows = embeddings.astype(dtype)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def top_k_hits(logits: Matrix, labels: Labels, k: int) -> Hits:
    """(N,) whether an image's label is among the k classes of highest logit.

    Args:
        logits: (N, C). Of equal logits the class that comes first wins; a row of NaN is wrong for every k.
        labels: (N,) classes.

    >>> top_k_hits(np.array([[3.0, 1.0], [2.0, 5.0], [4.0, 0.0]]), np.array([0, 0, 1]), k=1).tolist()
    [True, False, False]
    """
    of_label = np.take_along_axis(logits, labels[:, None], axis=1)
    before = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > of_label) | ((logits == of_label) & before)).sum(axis=1)
    hits: Hits = (rank < k) & ~np.isnan(logits).any(axis=1)
    return hits


def per_class_accuracy(hits: Hits, labels: Labels, num_classes: int) -> NDArray[np.float64]:
    """(num_classes,) share of each class's images that are hits, its recall; NaN for a class without images.

    Args:
        hits: (N,) which images are right.
        labels: (N,) classes.

    >>> per_class_accuracy(np.array([True, False, True]), np.array([0, 0, 1]), num_classes=3).tolist()
    [0.5, 1.0, nan]
    """
    counts = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels, weights=hits, minlength=num_classes)
    return np.where(counts > 0, right / np.maximum(counts, 1), np.nan)


def agreement(first: Matrix, second: Matrix) -> float:
    """Share of images for which two models choose the same class, right or wrong; NaN where there is no image.

    Args:
        first, second: (N, C) logits; images that one of them could not read are left out.

    >>> agreement(np.array([[3.0, 1.0], [2.0, 5.0]]), np.array([[0.2, 0.1], [0.9, 0.3]]))
    0.5
    """
    both = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
    return float(np.mean(first[both].argmax(axis=1) == second[both].argmax(axis=1))) if both.any() else float("nan")


def mean_cosine(first: Matrix, second: Matrix) -> float:
    """Mean cosine between rows of two models, over the images that both could read; NaN where there is none.

    Args:
        first, second: (N, D) embeddings of any norm.

    >>> mean_cosine(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [3.0, 0.0]]))
    0.5
    """
    cosines = (unit_rows(first) * unit_rows(second)).sum(axis=1)
    cosines = cosines[np.isfinite(cosines)]
    return float(cosines.mean()) if len(cosines) else float("nan")
