"""Orders in which some sources are drawn more often than others, still computed and never stored.

A row of weight 2 is drawn twice as often as one of weight 1. So a source's share of everything that is drawn is weight
times rows, over the sum of that for all sources; every source has passes of its own.
"""

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import InputError
from ...cache.reader.feature_cache import EmbeddingSet
from ...cache.reader.source_weights import OTHERS, Mixture
from ..counter_random import key_of
from .order import Draw, KeyedPermutation, Stream

THE_OTHERS = "(others)"
"""In a record: the sources that no weight names, which are one."""


def row_stream(rows: EmbeddingSet, batch: int, seed: int, name: str) -> Stream:
    """A `Stream` of the usable rows of one side, or a `MixtureStream` where they have weights."""
    if rows.mixture is None:
        return Stream(rows.usable, batch, seed, name)
    return MixtureStream(rows.usable, batch, seed, name, rows.mixture)


class MixtureStream(Stream):
    """Batches to which each source gives its share, exact in the long run.

    Of the first n rows drawn, the largest source has n times its share, rounded; of those left the next largest has n'
    times its share among the rest, rounded; and so on. These counts never fall, so a step takes from every source the
    next rows of its own passes, each a permutation like those of a `Stream`; and they are never further from the exact
    shares than (1 + H) / 2 rows, H the harmonic number of the sources less one: 1 row for two sources, 2 for ten.

    A batch has no row twice unless a source's pass ends within it. Its rows are shuffled, so that its parts are mixed.
    """

    def __init__(self, rows: NDArray[np.int64], batch: int, seed: int, name: str, mixture: Mixture) -> None:
        """As a `Stream`; rows of weight 0 are left out.

        Raises:
            InputError: if there are fewer rows than a batch holds, or of one source fewer than its share of a batch.
        """
        rows = rows[mixture.drawn[rows]]
        if not len(rows):
            raise InputError(f"{name}.weights: no usable row has a weight above 0; raise one of them")
        super().__init__(rows, batch, seed, name)
        source, sources = mixture.source[rows], []
        for code, (of, weight) in [(OTHERS, (THE_OTHERS, 1.0)), *enumerate(mixture.weights.items())]:
            own = rows[source == code]
            if len(own):
                # Named by what it is, not by its place: another source's weight leaves this one's order as it is.
                key = f"{name}, others" if code == OTHERS else f"{name}, source {of}"
                sources.append((Fraction(weight) * len(own), of, Stream(own, 1, seed, key)))
        self._sources = sorted(sources, key=lambda item: (-item[0], item[1]))
        self._total = left = sum(mass for mass, _, _ in self._sources)
        self._shares = []
        for mass, of, stream in self._sources:
            self._shares.append(mass / left)
            left -= mass
            taken = batch * mass / self._total
            if taken > len(stream):
                raise InputError(
                    f"{name}.weights: {of} would give {float(taken):,.0f} rows to each batch of {batch} but has only "
                    f"{len(stream)}; lower its weight, raise the others' or lower {self.setting}"
                )

    def draw(self, step: int) -> Draw:
        before, after = self._taken(step * self.batch), self._taken((step + 1) * self.batch)
        parts = [
            stream.at(np.arange(first, end))
            for (_, _, stream), first, end in zip(self._sources, before, after, strict=True)
        ]
        mixed = KeyedPermutation(self.batch, key_of(self._seed, f"{self._name}, mixture", step))
        places = mixed[np.arange(self.batch)]
        rows = np.concatenate([part.rows for part in parts])
        return Draw(rows[places], np.concatenate([part.passes for part in parts])[places])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "order": "a keyed permutation of the rows of each source for each of its passes; counts of the sources by "
            "nested rounding of their shares, the largest first; each batch shuffled by a keyed permutation",
            "key": f'BLAKE2b of the seed and ("{self._name}, source NAME" or "{self._name}, others", pass); of a '
            f'batch ("{self._name}, mixture", step)',
            "sources": {
                of: {"rows": len(stream), "share": float(mass / self._total)} for mass, of, stream in self._sources
            },
        }

    def _taken(self, drawn: int) -> list[int]:
        """How many of the first `drawn` rows are each source's; exact, whatever their number."""
        counts, left = [], drawn
        for share in self._shares:
            counts.append((2 * left * share.numerator + share.denominator) // (2 * share.denominator))
            left -= counts[-1]
        return counts
