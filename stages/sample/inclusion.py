"""How often steps hold a sentence, and an image and a sentence together, where some are retrieved.

With P_ij the probability that image i, if it is in the step, brings sentence j; B of n images and N of M sentences in
a step; and rho the chance of a sentence that nobody brings to be among the random ones:

    r_j = 1 - prod_i (1 - B/n · P_ij)                    that an image brings it
    e_j = r_j + (1 - r_j) · rho                          that the step holds it      rho = (N - sum r) / (M - sum r)
    e_j|i = 1 - (1 - P_ij) · (1 - e_j without image i)   that it does where image i is there

r_j is exact where images come into a step independently of each other, as they nearly do unless B is near n; rho takes
the number of sentences that are brought for its mean. The e_j of all M sentences add up to N.
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

_ROWS_AT_ONCE = 8_192
_NUMBERS_AT_ONCE = 4_000_000
_STEP = 0.5  # of the logarithm of time; the error is that of Gamma(1 + 4 pi i), about 1e-8
_BEFORE, _AFTER = 21.0, 4.0  # exp(-21) have come earlier, exp(-exp(4)) come later
_SURE = 1 - 1e-9  # what stands for a certainty, whose complement has no logarithm

Choices = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]]
"""Image rows (B,) -> sentence rows (B, k), cosines and logits (B, k), -inf where there is no candidate."""


class SamplingRates:
    """How often steps hold what, as logarithms relative to a sentence that is only ever drawn at random."""

    def __init__(
        self,
        candidates: Choices,
        blocks: Iterable[NDArray[np.int64]],
        per_image: int,
        *,
        images: tuple[int, int],
        sentences: tuple[int, NDArray[np.int64]],
        num_rows: int,
    ) -> None:
        """One pass over the pairs. What is kept is 4 bytes for each sentence, twice as much for the time of the pass.

        Args:
            candidates: what each image may bring.
            blocks: the usable image rows.
            per_image: how many it brings.
            images: (B, n), images of a step and of all.
            sentences: N of a step, and the M usable rows.
            num_rows: sentence rows that there are, usable or not.
        """
        self._share, self._per_image = images[0] / images[1], per_image
        num_step, usable = sentences
        missed = np.zeros(num_rows)
        for block in blocks:
            for start in range(0, len(block), _ROWS_AT_ONCE):
                ids, _, logits = candidates(block[start : start + _ROWS_AT_ONCE])
                chances = inclusion(logits, per_image)
                there = chances > 0
                found, which = np.unique(ids[there], return_inverse=True)
                missed[found] += np.bincount(which, self._log_misses(chances[there]), len(found))
        self._missed = missed.astype(np.float32)  # log of the probability that no image brings it
        expected = -np.expm1(missed[usable]).sum()
        self._random = max((num_step - expected) / max(len(usable) - expected, 1.0), 1e-12)

    def held(self, sentences: NDArray[np.int64]) -> NDArray[np.float64]:
        """Probability that a step holds each of some sentence rows, any shape."""
        return self._held(self._missed[sentences].astype(np.float64))

    def sentence_log_weights(self, sentences: NDArray[np.int64]) -> NDArray[np.float32]:
        """log of rho / e_j, at most 0: what a column's logits lack to stand for the corpus as a random one does.

        Args:
            sentences: (N,) rows.
        """
        return np.asarray(np.log(self._random) - np.log(self.held(sentences)), dtype=np.float32)

    def own_log_weights(self, ids: NDArray[np.int64], logits: NDArray[np.float64]) -> NDArray[np.float32]:
        """log of e_j / e_j|i, at most 0: what an image's own candidates lack beside that, since it brings them itself.

        Args:
            ids: (B, k) sentence rows of each image's candidates.
            logits: (B, k), -inf where there is no candidate.

        Returns:
            (B, k), 0 where there is no candidate.
        """
        chances = inclusion(logits, self._per_image)
        missed = self._missed[np.maximum(ids, 0)].astype(np.float64)
        with_it = 1 - (1 - chances) * (1 - self._held(np.minimum(missed - self._log_misses(chances), 0.0)))
        return np.asarray(np.where(chances > 0, np.log(self._held(missed)) - np.log(with_it), 0), dtype=np.float32)

    def _log_misses(self, chances: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log1p(-np.minimum(self._share * chances, _SURE))

    def _held(self, missed: NDArray[np.float64]) -> NDArray[np.float64]:
        retrieved = -np.expm1(missed)
        return retrieved + (1 - retrieved) * self._random


def inclusion(logits: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """How likely each candidate is among `count` that are drawn one after the other, without replacement, by softmax.

    One and two have formulas. For more: it is the chance that an exponential clock of rate exp(logit) is among the
    first `count` to ring, an integral over the time at which it rings, taken by the trapezoidal rule over the logarithm
    of time; that costs a few hundred times as much.

    Args:
        logits: (B, k), -inf where there is no candidate.
        count: at least 1.

    Returns:
        (B, k) float64; 0 where there is no candidate, 1 for all of a row's if it has no more than `count`.

    >>> inclusion(np.log([[4.0, 1.0, 1.0]]), 2).round(4).tolist()  # 4/6 + 2 · 1/6 · 4/5; 1/6 + 4/6 · 1/2 + 1/6 · 1/5
    [[0.9333, 0.5333, 0.5333]]
    """
    there = np.isfinite(logits)
    chances = there.astype(np.float64)
    crowded = np.flatnonzero(there.sum(axis=1) > count)
    if not len(crowded):
        return chances
    logits = logits[crowded] - logits[crowded].max(axis=1, keepdims=True)
    if count <= 2:
        rates = np.exp(logits)
        first = rates / rates.sum(axis=1, keepdims=True)
        chances[crowded] = first if count == 1 else first + _second(rates, first)
        return chances
    last = -np.sort(logits, axis=1)[:, -count - 1].min() + _AFTER  # by then some `count` others have rung
    times = np.exp(np.arange(-_BEFORE, last + _STEP, _STEP))
    rows = max(1, _NUMBERS_AT_ONCE // (logits.shape[1] * len(times) * count))
    for start in range(0, len(crowded), rows):
        chances[crowded[start : start + rows]] = _among_the_first(logits[start : start + rows], times, count)
    return chances


def _second(rates: NDArray[np.float64], first: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chance to be drawn second: sum over the first ones i of first_i · rate / (sum of the rates but i's)."""
    but_own = 1 - np.eye(rates.shape[1])
    after = first / np.maximum(rates @ but_own, np.finfo(np.float64).tiny)  # added up: a difference would lose digits
    return rates * (after @ but_own)


def _among_the_first(logits: NDArray[np.float64], times: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    rung = np.exp(logits)[:, :, None] * times  # (rows, k, times), how often each has rung on average
    silent, density = np.exp(-rung), rung * np.exp(-rung) * _STEP
    # For each candidate, over those before and those after it: the chance that 0, 1, ... count - 1 have rung.
    before, after = _running(silent, count), _running(silent[:, ::-1], count)[::-1]
    chances = np.empty(logits.shape)
    for j, (left, right) in enumerate(zip(before, after)):
        few = (left * np.cumsum(right, axis=-1)[..., ::-1]).sum(axis=-1)
        chances[:, j] = (density[:, j] * few).sum(axis=-1)
    return np.minimum(chances * (count / chances.sum(axis=1, keepdims=True)), 1.0)


def _running(silent: NDArray[np.float64], count: int) -> list[NDArray[np.float64]]:
    """For each candidate (rows, times, count): the chances that 0, 1, ... of those before it have rung."""
    numbers = np.zeros((silent.shape[0], silent.shape[2], count))
    numbers[..., 0] = 1.0
    found = []
    for j in range(silent.shape[1]):
        found.append(numbers)
        still = silent[:, j, :, None]
        following = numbers * still
        following[..., 1:] += numbers[..., :-1] * (1 - still)
        numbers = following
    return found
