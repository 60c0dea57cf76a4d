"""Which sentences a step takes where some are retrieved for its images: these first, without repeats, then random ones.

Like every order here it is a function of the step alone. Pairs stay on disk, mapped; a step reads those of its images.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ..counter_random import key_of, uniforms
from ..retrieve.hubs import PairScores, allowed
from ..settings.distill import PairSampling
from .inclusion import SamplingRates
from .order import Draw, DrawnWeights, KeyedPermutation, Stream, WholeDrawn, describe_permutation


class PairStream(WholeDrawn):
    """The sentences of each step: what its images retrieve, as many random ones as are then missing, none twice."""

    def __init__(
        self,
        cache: FeatureCache,
        image_stream: Stream,
        sentence_stream: Stream,
        settings: PairSampling,
        seed: int,
        logit_scale: float,
    ) -> None:
        """A stream beside that of the images.

        Args:
            cache: its masks choose images and sentences.
            image_stream: the images of each step, whole.
            sentence_stream: as many random sentences as a step has in all; what is retrieved takes the place of some.
            settings: `per_image` above 0, and no more than fits.
            seed: seed of the run.
            logit_scale: multiplies cosines where an image chooses by score.

        Raises:
            InputError: if the cache has no pairs, or weights of sources are to be corrected as well.
            CacheError: if they are missing or damaged.
        """
        self._images, self._random, self._settings, self._seed = image_stream, sentence_stream, settings, seed
        self._logit_scale, self.pairs = logit_scale, PairScores.of(cache, settings.rank, logit_scale)
        self._keep = None if settings.cap is None else allowed(self.pairs, settings.cap, min_cosine=settings.min_score)
        mixture = cache.sentences.mixture
        self._drawn = None if mixture is None else mixture.drawn
        if settings.correct and (cache.images.mixture is not None or mixture is not None):
            raise InputError(
                "distill.pairs.correct = true: makes up for retrieval among rows that are drawn alike, not for "
                "images.weights or sentences.weights; leave one of them out"
            )
        self.batch, self.setting = sentence_stream.batch, sentence_stream.setting
        self.rates: SamplingRates | None = None
        if settings.correct:
            self.rates = SamplingRates(
                self.candidates,
                self.pairs.blocks(),
                settings.per_image,
                images=(image_stream.batch, len(image_stream)),
                sentences=(self.batch, sentence_stream.rows),
                num_rows=len(cache.sentences),
            )

    def candidates(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
        """The sentences that each of some images may bring along, and how it chooses among them.

        Args:
            rows: (B,) image rows.

        Returns:
            ids (B, k) int64 sentence rows, cosines (B, k) float32 and logits (B, k) float64: an image takes the first
            sentence with probability softmax(logits), the next one likewise among the rest. -inf is no candidate.

            By score, the logits are logit_scale x cosine; half of logit_scale x CSLS, which has the cosine twice; or
            the inverted softmax, which is a logarithm already. They differ by what is taken from popular sentences.
        """
        ids, cosines, scores = self.pairs.rank(rows)
        there = ids >= 0
        if self._settings.min_score is not None:
            there &= cosines >= self._settings.min_score
        if self._keep is not None:
            there &= self._keep[rows]
        if self._drawn is not None:
            there &= self._drawn[ids]  # a source of weight 0 gives no retrieved sentence either
        if self._settings.sampling == "uniform":
            return ids, cosines, np.where(there, 0.0, -np.inf)
        factor = {"cosine": self._logit_scale, "csls": self._logit_scale / 2, "inverted_softmax": 1.0}
        return ids, cosines, np.where(there, factor[self._settings.rank] * scores.astype(np.float64), -np.inf)

    def draw(self, step: int) -> Draw:
        """Distinct rows; retrieved ones spread evenly among the others, so that equal parts have alike."""
        images = self._images.draw(step)
        ids, candidate_cosines, logits = self.candidates(images.rows)
        retrieved, found_cosines = self._retrieve(images, ids, candidate_cosines, logits)
        places = np.arange(len(retrieved)) * self.batch // max(1, len(retrieved))
        rows = np.empty(self.batch, dtype=np.int64)
        cosines = np.full(self.batch, np.nan, dtype=np.float32)
        others = np.setdiff1d(np.arange(self.batch), places)
        rows[places], cosines[places], rows[others] = retrieved, found_cosines, self._fill(step, retrieved)
        weights = None
        if self.rates is not None:
            own = self.rates.own_log_weights(ids, logits)
            weights = DrawnWeights(self.rates.sentence_log_weights(rows), _places(ids, rows), own)
        return Draw(rows, np.zeros_like(rows), cosines=cosines, weights=weights)

    def _retrieve(
        self, images: Draw, ids: NDArray[np.int64], cosines: NDArray[np.float32], logits: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct sentences, each with the cosine to the first image that drew it."""
        numbers = uniforms(key_of(self._seed, "pairs"), images.rows, images.passes, ids.shape[1])
        # The largest of logits + Gumbel noise are a draw without replacement by softmax (Yellott 1977).
        noisy = logits - np.log(-np.log(np.maximum(numbers, 2.0**-54)))
        best = np.argsort(-noisy, axis=1, kind="stable")[:, : self._settings.per_image]
        chosen = np.isfinite(np.take_along_axis(logits, best, axis=1))
        ids, cosines = np.take_along_axis(ids, best, axis=1)[chosen], np.take_along_axis(cosines, best, axis=1)[chosen]
        first = _first_of_each(ids)
        return ids[first], cosines[first]

    def _fill(self, step: int, retrieved: NDArray[np.int64]) -> NDArray[np.int64]:
        """Random sentences for the places that are left."""
        wanted = self.batch - len(retrieved)
        random = self._random.draw(step).rows
        random = random[~np.isin(random, retrieved)]
        random = random[_first_of_each(random)]  # a draw that straddles the end of a pass may repeat itself
        if len(random) < wanted:
            permutation = KeyedPermutation(len(self._random), key_of(self._seed, "pairs", "more", step))
            more = self._random.rows[permutation[np.arange(self.batch)]]
            random = np.concatenate([random, more[~np.isin(more, np.concatenate([retrieved, random]))]])
        return random[:wanted]

    def describe(self) -> dict[str, Any]:
        return {
            "order": "what the step's images retrieve, spread evenly among as many of the random ones as are missing",
            "retrieved": {
                "candidates": self.pairs.k,
                "choice": "the largest of logits + Gumbel noise, from SplitMix64 of (key, image row, pass)",
                "seed": self._seed,
                "key": "BLAKE2b of the seed and pairs",
            },
            "random": self._random.describe(),
            "more": {
                "order": "the beginning of a permutation for each step, where the random ones repeat themselves",
                **describe_permutation(self._seed, "(pairs, more, step)"),
            },
            "rows": len(self._random),
            "batch": self.batch,
        }


def _places(ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each number stands among the distinct `rows`, -1 where it does not."""
    order = np.argsort(rows)
    at = order[np.searchsorted(rows[order], ids).clip(max=len(rows) - 1)]
    return np.where(rows[at] == ids, at, -1)


def _first_of_each(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions at which each number comes up first, ascending."""
    return np.sort(np.unique(rows, return_index=True)[1])
