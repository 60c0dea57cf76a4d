"""Exact cosines over rows that need not fit in memory: what an index is built from and measured against."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 64 * 2**20
"""float32 rows in flight while an index is built or checked."""

TIE = 1e-6
"""Cosines closer than this are equal when recall is counted: which of two equal rows is returned is no mistake."""


class Rows(Protocol):
    """A (N, D) array that slices and row numbers gather from (`MappedArray`, ndarray)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> NDArray[Any]: ...


def unit_rows(block: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Rows at length 1, and which of them have a direction at all.

    Args:
        block: (n, D) embeddings, any float dtype, any norm.

    Returns:
        (n, D) float32 and (n,) bool: False, and the row all zero, where it was zero or not finite.
    """
    wide = np.asarray(block, dtype=np.promote_types(block.dtype, np.float32))
    with np.errstate(invalid="ignore", divide="ignore"):
        if block.dtype != np.float16:  # squares of wider formats can overflow or vanish
            wide = wide / np.abs(wide).max(axis=1, keepdims=True, initial=0)
        norm = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
        good = (np.isfinite(norm) & (norm > 0))[:, 0]
        unit = (wide / norm).astype(np.float32, copy=False)
    unit[~good] = 0
    return unit, good


def cosines(unit: NDArray[np.float32], ids: NDArray[np.int64], embeddings: Rows) -> NDArray[np.float32]:
    """Exact cosine between each query and the rows proposed for it.

    The sum runs over one pair at a time and never through BLAS, so a pair's cosine does not depend on its neighbours.

    Args:
        unit: (n, D) float32 unit rows.
        ids: (n, k) row numbers into `embeddings`, -1 where there is none.

    Returns:
        (n, k) float32 in [-1, 1], NaN where the id is -1.
    """
    scores = np.full(ids.shape, np.nan, dtype=np.float32)
    for part in _slices(len(ids), max(1, ids.shape[1]) * unit.shape[1]):
        wanted = ids[part]
        rows, position = np.unique(wanted[wanted >= 0], return_inverse=True)
        targets, _ = unit_rows(embeddings[rows])
        queries = np.nonzero(wanted >= 0)[0]
        found = (unit[part][queries] * targets[position]).sum(axis=1)
        scores[part][wanted >= 0] = np.clip(found, -1, 1)
    return scores


def unit_blocks(embeddings: Rows, usable: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Row numbers and unit rows of all usable rows that have a direction, block by block."""
    for part in _slices(len(usable), embeddings.shape[1]):
        rows = usable[part]
        unit, good = unit_rows(embeddings[rows])
        if good.any():
            yield rows[good], unit[good]


def best_cosines(
    unit: NDArray[np.float32], embeddings: Rows, usable: NDArray[np.int64], k: int
) -> list[NDArray[np.float32]]:
    """Each query's k highest cosines over all usable rows (fewer where there are fewer), by blocked matrix products.

    Args:
        unit: (n, D) float32 unit rows, the queries.
        embeddings: (N, D), any float dtype, any norm.
        usable: row numbers, ascending.
    """
    best = np.full((len(unit), k), -np.inf, dtype=np.float32)
    for _, block in unit_blocks(embeddings, usable) if len(unit) else ():
        for part in _slices(len(block), len(unit)):
            scores = unit @ block[part].T
            if scores.shape[1] > k:
                scores = np.partition(scores, -k, axis=1)[:, -k:]
            best = np.partition(np.hstack((best, scores)), -k, axis=1)[:, -k:]
    return [row[np.isfinite(row)] for row in best]


def recall(
    ids: NDArray[np.int64], unit: NDArray[np.float32], embeddings: Rows, exact: list[NDArray[np.float32]]
) -> float | None:
    """Share of the true nearest rows that were found; None when there are no queries or no rows.

    A row that is as near as the last of the true ones counts, whichever of the two an index returns.

    Args:
        ids: (n, k) rows that were found, -1 where there is none.
        unit: (n, D) float32 unit rows, the queries.
        exact: the queries' best cosines, from `best_cosines` with the same k.
    """
    wanted = sum(len(row) for row in exact)
    if not wanted:
        return None
    least = np.array([row.min() for row in exact], dtype=np.float32)[:, None]
    hits = cosines(unit, ids, embeddings) >= least - TIE  # False for NaN, where there is none
    return float(np.count_nonzero(hits) / wanted)


def _slices(length: int, numbers_each: int) -> Iterator[slice]:
    """Slices of at most `BLOCK_BYTES` of float32."""
    step = max(1, BLOCK_BYTES // (4 * max(1, numbers_each)))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
