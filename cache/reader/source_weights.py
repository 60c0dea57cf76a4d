"""Which source each row comes from, and how often a run draws the rows of a source relative to others."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..disk.row_tables import RowTable
from ..errors import InputError

HERE = "."
"""Source of images that lie in no folder below `images.source`."""
OTHERS = -1
NAMES_SHOWN = 12


@dataclass(frozen=True, eq=False)
class Mixture:
    """Weights of some sources of one side; rows of all others have weight 1.

    Attributes:
        weights: source -> how often one of its rows is drawn relative to a row of weight 1; none of them is 1.
        source: (N,) int32, position in `weights` of the source of each row, -1 for all others.
    """

    weights: Mapping[str, float]
    source: NDArray[np.int32]

    @property
    def drawn(self) -> NDArray[np.bool_]:
        """(N,) rows whose weight is above 0."""
        return np.array([*self.weights.values(), 1.0])[self.source] > 0


def mixture_of(rows: RowTable, side: str, weights: Mapping[str, float]) -> Mixture | None:
    """Look up the sources of rows: an image's is the first folder of its path, a sentence's its file or `prompts`.

    One pass over the table, a batch at a time; 4 bytes for each row stay.

    Args:
        side: `images` or `sentences`.
        weights: source -> weight, 0 or more. Those of 1 change nothing.

    Returns:
        None where no weight changes anything.

    Raises:
        InputError: if there is no such source; it names those that there are.
    """
    column = "source" if side == "images" else "origin"
    changing = {name: float(weight) for name, weight in sorted(weights.items()) if weight != 1}
    if not weights:
        return None
    wanted, there, codes = pa.array(list(changing), pa.string()), set[str](), []
    for values in rows.batches(column) if rows.has(column) else ():
        names = _folders(values) if side == "images" else pc.fill_null(values, "")
        there.update(pc.unique(names).to_pylist())
        codes.append(np.asarray(pc.fill_null(pc.index_in(names, wanted), OTHERS), dtype=np.int32))
    for name in weights:
        if name not in there:
            raise InputError(f"{side}.weights.{name}: no {side} come from there; there is: {_shown(there)}")
    return Mixture(changing, np.concatenate(codes)) if changing else None


def _folders(paths: pa.Array) -> pa.Array:
    first = pc.list_element(pc.split_pattern(paths, "/", max_splits=1), 0)
    return pc.if_else(pc.match_substring(paths, "/"), first, HERE)


def _shown(names: set[str]) -> str:
    some = ", ".join(sorted(names)[:NAMES_SHOWN]) or "nothing that is recorded"
    return some + (f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else "")
