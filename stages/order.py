"""In which order rows are drawn: endless passes without replacement, each a permutation that is computed, not stored.

Nothing is shuffled and nothing is saved. The rows of step 1,000,000 cost what those of step 0 cost, in memory that does
not grow with the number of rows, so a resumed run continues exactly where it stopped.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import InputError
from .counter_random import key_of, mix

_ROUNDS = 8


class KeyedPermutation:
    """A permutation of 0 … n-1 chosen by a key, evaluated where it is asked.

    A Feistel network permutes the smallest power of four that holds n; values that fall outside are encrypted again
    until they are inside ("cycle walking", Black and Rogaway, CT-RSA 2002), at most four times on average.
    """

    def __init__(self, n: int, key: int) -> None:
        self._n = np.uint64(n)
        self._half_bits = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
        self._half_mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        self._round_keys = [np.uint64(key_of(key, number)) for number in range(_ROUNDS)]

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each position goes.

        Args:
            positions: (B,) in 0 … n-1.

        Returns:
            (B,) int64 in 0 … n-1, distinct for distinct positions.
        """
        values = self._encrypt(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self._n)
        while len(outside):
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self._n]
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._half_mask
        for round_key in self._round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & self._half_mask)
        return (left << self._half_bits) | right


@dataclass(frozen=True)
class Draw:
    """The rows of one step.

    Attributes:
        rows: (batch,) int64 row numbers. Distinct, unless the batch straddles the end of a pass.
        passes: (batch,) int64, how many whole passes came before each row: a row's view changes with it.
    """

    rows: NDArray[np.int64]
    passes: NDArray[np.int64]


class Stream:
    """Endless passes over rows, cut into batches; every pass covers each row exactly once, in an order of its own."""

    def __init__(self, rows: NDArray[np.int64], batch: int, seed: int, name: str) -> None:
        """A stream of batches.

        Args:
            rows: (n,) the rows to draw from, distinct.
            batch: rows of one step.
            seed: seed of the run.
            name: `images` or `sentences`: streams of other names have other orders.

        Raises:
            InputError: if there are fewer rows than a batch holds.
        """
        if batch > len(rows):
            raise InputError(
                f"distill.batch_{name} = {batch}: the cache has only {len(rows)} usable {name}; lower it to that"
            )
        self._rows, self.batch, self._seed, self._name = rows, batch, seed, name

    def __len__(self) -> int:
        """Rows of one pass."""
        return len(self._rows)

    def draw(self, step: int) -> Draw:
        """The rows of a step; a function of the step alone.

        Args:
            step: from 0.
        """
        passes, positions = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), len(self))
        rows = np.empty(self.batch, dtype=np.int64)
        for number in np.unique(passes):
            here = passes == number
            permutation = KeyedPermutation(len(self), key_of(self._seed, self._name, number))
            rows[here] = self._rows[permutation[positions[here]]]
        return Draw(rows, passes)
