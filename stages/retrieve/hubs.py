"""Hubs: sentences that are near to everything and crowd the others out of retrieval. What they do, and two corrections.

Numpy alone, over the pairs that the cache holds both ways, a block of image rows at a time: 40 million images of eight
neighbours need what is said for each function, never a matrix of images and sentences.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from ...cache.disk.mapped import MappedArray
from ...cache.errors import InputError
from ...cache.reader.feature_cache import EmbeddingSet, FeatureCache, Pairs

Ranking = Literal["cosine", "csls", "inverted_softmax"]

BLOCK_ROWS = 65_536
"""Image rows that are looked at together."""

_PRUNE_ENTRIES = 4_000_000
"""Candidates of crowded sentences that wait before the worse ones of them are thrown out."""


@dataclass(frozen=True, eq=False)
class PairScores:
    """The sentences that each image retrieves, in the order of a score that may take account of hubs.

    With x an image, y a sentence, both among the cached nearest of the other side:

    - `cosine`: cos(x, y), as the cache has it.
    - `csls`: 2 cos(x, y) - r(x) - r(y), r the mean cosine to the cached nearest of the other side (Conneau et al. 2018,
      arXiv 1710.04087).
    - `inverted_softmax`: log of exp(beta cos(x, y)) / sum over x' of exp(beta cos(x', y)), beta the logit scale (Smith
      et al. 2017, arXiv 1702.03859). The sum is truncated: x' are the sentence's cached nearest images and no others.
      Images far away would add little at the scale of a CLIP; at a small scale the truncation is felt.

    Both corrections know the neighbours that stage one found among all rows, whatever mask is chosen now.

    Attributes:
        ids: (N, k) int64 sentence rows of each image, -1 where there is none.
        cosines: (N, k) float32, NaN where there is none.
        ranking: which score orders them.
        logit_scale: beta of the inverted softmax.
        usable_images: (N,) bool, images with an embedding, in the mask if there is one.
        usable_sentences: (M,) bool, likewise; other sentences are no candidates.
        correction: (M,) float32, what a sentence's score is lowered by; None for `cosine`.
    """

    ids: MappedArray
    cosines: MappedArray
    ranking: Ranking
    logit_scale: float
    usable_images: NDArray[np.bool_]
    usable_sentences: NDArray[np.bool_]
    correction: NDArray[np.float32] | None

    @classmethod
    def of(cls, cache: FeatureCache, ranking: Ranking, logit_scale: float) -> "PairScores":
        """Read what a ranking needs to know about each sentence: 5 bytes each, and 1 byte for each image.

        Args:
            cache: its masks choose images and sentences.
            logit_scale: beta of the inverted softmax; the other rankings do not look at it.

        Raises:
            InputError: if the cache has no pairs.
            CacheError: if they are missing or damaged.
        """
        found, back = cache.pairs("image_to_sentence"), cache.pairs("sentence_to_image")
        if found is None or back is None:
            raise InputError(
                f"{cache.layout.root}: has no pseudo-pairs (pairs.k = 0); set pairs.k and run `dimefm cache-teacher`, "
                "which finds them without the teacher"
            )
        correction = None if ranking == "cosine" else _correction(back, ranking, logit_scale)
        return cls(
            found.ids,
            found.scores,
            ranking,
            logit_scale,
            _as_bools(cache.images),
            _as_bools(cache.sentences),
            correction,
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    @property
    def k(self) -> int:
        """Candidates of an image."""
        return self.ids.shape[1]

    def rank(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """The candidates of some images, the best by the corrected score first, the lower sentence first among equals.

        Args:
            rows: (B,) image rows.

        Returns:
            ids (B, k) int64, cosines (B, k) float32 and scores (B, k) float32 (the cosine itself, a CSLS, or a log of
            an inverted softmax). Candidates that are not there, or whose sentence is not usable, are -1 and NaN, last.
        """
        ids, cosines = self.ids[rows].astype(np.int64, copy=False), self.cosines[rows].astype(np.float32, copy=False)
        there = (ids >= 0) & np.isfinite(cosines)
        there &= self.usable_sentences[np.where(there, ids, 0)]
        scores = cosines.astype(np.float64)
        if self.correction is not None:
            lowered = self.correction[np.where(there, ids, 0)]
            if self.ranking == "csls":
                scores = 2 * scores - _mean(cosines)[:, None] - lowered
            else:
                scores = self.logit_scale * scores - lowered
        corrected = np.where(there, scores, np.nan).astype(np.float32)
        ids = np.where(there, ids, -1)
        order = np.lexsort((ids, np.where(there, -corrected, np.inf)), axis=1)
        cosines = np.where(there, cosines, np.float32(np.nan))
        return (
            np.take_along_axis(ids, order, axis=1),
            np.take_along_axis(cosines, order, axis=1),
            np.take_along_axis(corrected, order, axis=1),
        )

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """The usable image rows, ascending, a block at a time."""
        for start in range(0, len(self), BLOCK_ROWS):
            rows = start + np.flatnonzero(self.usable_images[start : start + BLOCK_ROWS])
            if len(rows):
                yield rows.astype(np.int64)


def allowed(
    pairs: PairScores, cap: int, first: int | None = None, min_cosine: float | None = None
) -> NDArray[np.bool_]:
    """A cap for each sentence: of all images that retrieve it, the `cap` with the best corrected scores keep it.

    Exact, in two passes over the pairs. Memory: the answer, one byte for each pair (40 million images of 8: 320 MB); 8
    bytes for each sentence; and 20 bytes for each of at most `cap` pairs of every sentence that has more, up to three
    times over for a moment, or those of 4 million pairs if that is more.

    Args:
        cap: at least 1. Among equal scores the image of the lower row keeps the sentence.
        first: candidates of an image that it may keep, the best by the ranking; None is all of them.
        min_cosine: least cosine of a candidate that may be kept.

    Returns:
        (N, k) bool in the order of `pairs.rank`: whether the image keeps its first, second, ... candidate. False where
        there is no candidate, and for images that are not usable.
    """
    if cap < 1:
        raise ValueError(f"cap = {cap}: wanted at least 1")
    keep = np.zeros((len(pairs), pairs.k), dtype=np.bool_)
    crowded = in_degrees(pairs, first, min_cosine) > cap
    waiting: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]] = []
    num_best = 0
    for rows in pairs.blocks():
        ids, cosines, scores = pairs.rank(rows)
        there = counts(ids, cosines, first, min_cosine)
        contested = there & crowded[np.where(there, ids, 0)]
        keep[rows] = there & ~contested
        row, place = np.nonzero(contested)
        waiting.append((ids[row, place], scores[row, place], rows[row] * pairs.k + place))
        if sum(len(part[0]) for part in waiting) > max(_PRUNE_ENTRIES, 2 * num_best):
            waiting = [_best(waiting, cap)]
            num_best = len(waiting[0][0])
    if waiting:
        keep.reshape(-1)[_best(waiting, cap)[2]] = True
    return keep


def counts(
    ids: NDArray[np.int64], cosines: NDArray[np.float32], first: int | None, min_cosine: float | None
) -> NDArray[np.bool_]:
    """Which of some images' ranked candidates are among their first and near enough.

    Args:
        ids, cosines: (B, k) from `PairScores.rank`.

    Returns:
        (B, k) bool.
    """
    there = ids >= 0
    if first is not None:
        there[:, first:] = False
    return there if min_cosine is None else there & (np.nan_to_num(cosines, nan=-np.inf) >= min_cosine)


def in_degrees(pairs: PairScores, first: int | None = None, min_cosine: float | None = None) -> NDArray[np.int64]:
    """How many usable images retrieve each sentence: the k-occurrences of Radovanovic et al. (JMLR 11, 2010).

    Args:
        first: candidates of an image that count, the best by the ranking; None counts all of them, whose number no
            ranking changes.
        min_cosine: least cosine of a candidate that counts.

    Returns:
        (M,) int64; 0 for sentences that are not usable.
    """
    degrees = np.zeros(len(pairs.usable_sentences), dtype=np.int64)
    for rows in pairs.blocks():
        ids, cosines, _ = pairs.rank(rows)
        found, times = np.unique(ids[counts(ids, cosines, first, min_cosine)], return_counts=True)
        degrees[found] += times
    return degrees


def largest_hubs(degrees: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """The sentences that are retrieved most often, the lower row first among equals; none that never is.

    >>> largest_hubs(np.array([0, 4, 1, 4]), 3).tolist()
    [1, 3, 2]
    """
    order = np.argsort(-degrees, kind="stable")[:num]
    return order[degrees[order] > 0].astype(np.int64)


def _best(
    parts: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]], cap: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Of pairs (ids, scores, positions) the best `cap` of each id, the lower position first among equals."""
    ids, scores, positions = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((positions, -scores, ids))
    begins = np.flatnonzero(np.diff(ids[order], prepend=-1))
    lengths = np.diff(begins, append=len(ids))
    order = order[np.arange(len(ids)) - np.repeat(begins, lengths) < cap]
    return ids[order], scores[order], positions[order]


def _as_bools(rows: EmbeddingSet) -> NDArray[np.bool_]:
    usable = np.zeros(len(rows), dtype=np.bool_)
    usable[rows.usable] = True
    return usable


def _correction(back: Pairs, ranking: Ranking, logit_scale: float) -> NDArray[np.float32]:
    """For each sentence its r(y), or the log of its sum over images; 0 where it has no neighbours."""
    correction = np.zeros(len(back.scores), dtype=np.float32)
    for start, cosines in back.scores.blocks():
        if ranking == "csls":
            lowered = _mean(cosines)
        else:
            logits = np.where(np.isfinite(cosines), logit_scale * cosines.astype(np.float64), -np.inf)
            lowered = logsumexp(logits, axis=1)
            lowered[~np.isfinite(lowered)] = 0.0
        correction[start : start + len(cosines)] = lowered
    return correction


def _mean(cosines: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean of each row's finite numbers; 0 where it has none."""
    there = np.isfinite(cosines)
    total = np.where(there, cosines, 0).sum(axis=1, dtype=np.float64)
    return np.asarray(total / np.maximum(there.sum(axis=1), 1))
