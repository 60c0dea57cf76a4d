"""In which order rows are drawn: endless passes without replacement, each a permutation that is computed, not stored.

Nothing is shuffled and nothing is saved. The rows of step 1,000,000 cost what those of step 0 cost, in memory that does
not grow with the number of rows, so a resumed run continues exactly where it stopped.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import InputError
from ..counter_random import key_of, mix

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
        views: (batch,) int64, which of the cache's views of each row is taken; None where views are made here.
        cosines: (batch,) float32, of a retrieved sentence to the image that brought it, NaN of others; None where
            nothing is retrieved.
        weights: what makes up for rows that are drawn more often than others; None is nothing.
    """

    rows: NDArray[np.int64]
    passes: NDArray[np.int64]
    views: NDArray[np.int64] | None = None
    cosines: NDArray[np.float32] | None = None
    weights: "DrawnWeights | None" = None

    def part(self, number: int, num_parts: int) -> "Draw":
        """One of equal parts, with all that is said of its rows."""
        arrays = (self.rows, self.passes, self.views, self.cosines)
        rows, passes, views, cosines = (_part(array, number, num_parts) for array in arrays)
        return Draw(rows, passes, views, cosines, self.weights and self.weights.part(number, num_parts))


@dataclass(frozen=True)
class DrawnWeights:
    """What a step's logits of images and sentences lack to be those of a step that was drawn at random, as logarithms.

    Attributes:
        sentences: (N,) float32, for each sentence of the step.
        places: (B, k) int64, for each image of the step where its own candidates stand among the step's sentences,
            those of all processes; -1 where they do not.
        values: (B, k) float32, for an image and such a candidate, beside what the sentence has.
    """

    sentences: NDArray[np.float32]
    places: NDArray[np.int64]
    values: NDArray[np.float32]

    def part(self, number: int, num_parts: int) -> "DrawnWeights":
        """Those of one of equal parts of the images and of the sentences."""
        return DrawnWeights(*(_part(array, number, num_parts) for array in (self.sentences, self.places, self.values)))


class Drawn(Protocol):
    """Anything that says which rows a step takes, as a function of the step alone."""

    def draw(self, step: int) -> Draw:
        """The rows of a step, from 0; as many for each."""


class WholeDrawn(Drawn, Protocol):
    """One that draws for all processes."""

    batch: int
    """Rows of one step."""
    setting: str
    """Full name of the key that says how many."""

    def describe(self) -> dict[str, Any]:
        """All that the order depends on, but the rows themselves, for the record of a run."""


class Stream(WholeDrawn):
    """Endless passes over rows, cut into batches; every pass covers each row exactly once, in an order of its own."""

    def __init__(self, rows: NDArray[np.int64], batch: int, seed: int, name: str) -> None:
        """A stream of batches.

        Args:
            rows: (n,) the rows to draw from, distinct.
            batch: rows of one step.
            seed: of the run.
            name: `images` or `sentences`: streams of other names have other orders.

        Raises:
            InputError: if there are fewer rows than a batch holds.
        """
        if batch > len(rows):
            raise InputError(
                f"distill.batch_{name} = {batch}: the cache has only {len(rows)} usable {name}; lower it to that"
            )
        self.rows, self.batch, self._seed, self._name = rows, batch, seed, name
        self.setting = f"distill.batch_{name}"

    def __len__(self) -> int:
        """Rows of one pass."""
        return len(self.rows)

    def draw(self, step: int) -> Draw:
        return self.at(np.arange(step * self.batch, (step + 1) * self.batch))

    def at(self, places: NDArray[np.int64]) -> Draw:
        """The rows at some places of the endless sequence of passes, from 0."""
        passes, positions = np.divmod(places, len(self))
        rows = np.empty(len(places), dtype=np.int64)
        for number in np.unique(passes):
            here = passes == number
            permutation = KeyedPermutation(len(self), key_of(self._seed, self._name, number))
            rows[here] = self.rows[permutation[positions[here]]]
        return Draw(rows, passes)

    def describe(self) -> dict[str, Any]:
        return {
            "order": "a keyed permutation of the rows for each pass, cut into batches",
            **describe_permutation(self._seed, f"({self._name}, pass)"),
            "rows": len(self),
            "batch": self.batch,
        }


class BankStream(WholeDrawn):
    """More image rows for each step, whose targets alone are wanted; never one of the step's own images."""

    def __init__(self, image_stream: Stream, num_rows: int, seed: int) -> None:
        """Draw `num_rows` of the rows of `image_stream` for each step.

        Raises:
            InputError: if there are too few rows beside a batch.
        """
        spare = len(image_stream) - image_stream.batch
        if num_rows > spare:
            raise InputError(
                f"distill.bank_images = {num_rows}: beside the {image_stream.batch} images of a batch the cache has "
                f"only {spare} usable ones; lower it to that"
            )
        self._images, self.batch, self._seed = image_stream, num_rows, seed
        self.setting = "distill.bank_images"

    def draw(self, step: int) -> Draw:
        """Distinct rows, in memory that grows with the batch alone."""
        own = self._images.draw(step).rows
        permutation = KeyedPermutation(len(self._images), key_of(self._seed, "bank", step))
        some = self._images.rows[permutation[np.arange(self.batch + len(np.unique(own)))]]
        rows = some[~np.isin(some, own)][: self.batch]
        return Draw(rows, np.zeros_like(rows))

    def describe(self) -> dict[str, Any]:
        return {
            "order": "the beginning of a keyed permutation of the images for each step, without the step's own",
            **describe_permutation(self._seed, "(bank, step)"),
            "rows": len(self._images),
            "batch": self.batch,
        }


class Beginning(WholeDrawn):
    """The first rows of every step of a stream, which has at least as many."""

    def __init__(self, stream: Drawn, num_rows: int, setting: str) -> None:
        self._stream, self.batch, self.setting = stream, num_rows, setting

    def draw(self, step: int) -> Draw:
        whole = self._stream.draw(step)
        return Draw(whole.rows[: self.batch], whole.passes[: self.batch])

    def describe(self) -> dict[str, Any]:
        return {"order": "the first of each step's sentences", "batch": self.batch}


class Share(Drawn):
    """One rank's part of every step: of as many equal parts as there are ranks, in order, the one that is its own."""

    def __init__(self, stream: WholeDrawn, rank: int, num_ranks: int) -> None:
        """The part of a rank, from 0.

        Raises:
            InputError: if the rows of a step do not divide evenly.
        """
        if stream.batch % num_ranks:
            raise InputError(
                f"{stream.setting} = {stream.batch}: does not divide evenly among {num_ranks} processes; "
                f"wanted a multiple of {num_ranks}"
            )
        self._stream, self._rank, self._num_ranks = stream, rank, num_ranks

    def draw(self, step: int) -> Draw:
        return self._stream.draw(step).part(self._rank, self._num_ranks)


def _part(array: NDArray[Any] | None, number: int, num_parts: int) -> Any:
    size = 0 if array is None else len(array) // num_parts
    return None if array is None else array[number * size : (number + 1) * size]


def describe_permutation(seed: int, key: str) -> dict[str, Any]:
    """What a keyed permutation depends on."""
    return {
        "permutation": "Feistel network with cycle walking, SplitMix64 finaliser",
        "rounds": _ROUNDS,
        "seed": seed,
        "key": f"BLAKE2b of the seed and {key}",
    }
