"""Exact cosines over rows that need not fit in memory: what an index is built from and measured against."""

from collections.abc import Callable, Iterator
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
        scores[part][wanted >= 0] = dots(unit[part][queries], targets[position])
    return scores


def product_error(width: int) -> float:
    """How far a float32 product of two unit rows may be from their cosine, whatever the order of its sum.

    The order, and with it the last bits, depends on where in a block a row lies and on the number of threads.
    """
    return float((width + 16) * 2.0**-23)


def dots(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) cosines of (n, D) unit rows, pair by pair: equal rows give equal bits, wherever they stand."""
    found: NDArray[np.float32] = np.clip((one * other).sum(axis=1), -1, 1)
    return found


def nearest_rows(
    unit: NDArray[np.float32],
    embeddings: Rows,
    rows: NDArray[np.int64],
    k: int,
    best: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Each query's k nearest among some rows: the highest cosine first, the lower row first among equals. Exact.

    Products of blocks propose, `dots` decides. Rows that are the same byte for byte and cannot all be among the k
    nearest are not looked at one by one.

    Args:
        unit: (n, D) float32 unit rows, the queries.
        rows: row numbers into `embeddings`; those without a direction are left out.
        best: (n, k) ids and cosines that were found among other rows and compete with these.

    Returns:
        ids (n, k) int64 and cosines (n, k) float32; -1 and NaN last, where there is none.
    """
    shape = len(unit), k
    ids, scores = best or (np.full(shape, -1, dtype=np.int64), np.full(shape, np.nan, dtype=np.float32))
    for numbers, block in unit_blocks(embeddings, rows) if len(unit) else ():
        for part in _slices(len(block), len(unit)):
            ids, scores = _compete(unit, ids, scores, numbers[part], block[part])
    return ids, scores


def _compete(
    unit: NDArray[np.float32],
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
    numbers: NDArray[np.int64],
    block: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best of what was found so far and of one block."""
    k, error = ids.shape[1], product_error(unit.shape[1])
    products = unit @ block.T
    least = np.where(np.isnan(scores[:, -1]), -np.inf, scores[:, -1] - error)
    if len(block) > k and np.isneginf(least).any():
        least = np.maximum(least, np.partition(products, -k, axis=1)[:, -k] - 2 * error)
    near = products >= least[:, None]
    if np.count_nonzero(near) > 4 * ids.size:
        near &= _number_among_equals(block) < k
    query, column = np.nonzero(near)
    if not len(query):
        return ids, scores
    found = np.empty(len(query), dtype=np.float32)
    for part in _slices(len(query), unit.shape[1]):
        found[part] = dots(unit[query[part]], block[column[part]])
    touched, place = np.unique(query, return_inverse=True)
    owner = np.concatenate([np.repeat(np.arange(len(touched)), k), place])
    candidates = np.concatenate([ids[touched].ravel(), numbers[column]])
    cosine = np.concatenate([scores[touched].ravel(), found])
    order = np.lexsort((candidates, np.where(candidates >= 0, -cosine, np.inf), owner))
    first = np.searchsorted(owner[order], np.arange(len(touched)))
    best = order[first[:, None] + np.arange(k)]
    ids, scores = ids.copy(), scores.copy()
    ids[touched], scores[touched] = candidates[best], cosine[best]
    return ids, scores


def _number_among_equals(block: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) how many of the rows before it are the same as each row, byte for byte."""
    whole = np.ascontiguousarray(block).view(np.dtype((np.void, block.shape[1] * block.itemsize)))[:, 0]
    _, group = np.unique(whole, return_inverse=True)
    order = np.argsort(group, kind="stable")
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    number = np.empty(len(block), dtype=np.int64)
    number[order] = np.arange(len(block)) - np.repeat(begins, np.diff(begins, append=len(block)))
    return number


def unit_blocks(embeddings: Rows, usable: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Row numbers and unit rows of all usable rows that have a direction, block by block."""
    for part in _slices(len(usable), embeddings.shape[1]):
        rows = usable[part]
        unit, good = unit_rows(embeddings[rows])
        if good.all():  # nothing is copied
            yield rows, unit
        elif good.any():
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


def exact_recall(num_rows: int, queries: NDArray[Any], k: int) -> dict[str, Any]:
    """`recall`, `recall_k` and `recall_queries` of exact search among so many rows: there is nothing to measure."""
    num_queries = int(np.count_nonzero(unit_rows(queries)[1]))
    return {"recall": 1.0 if num_queries and num_rows else None, "recall_k": k, "recall_queries": num_queries}


def measured_recall(
    search: Callable[[NDArray[Any], int], tuple[NDArray[np.int64], NDArray[np.float32]]],
    embeddings: Rows,
    usable: NDArray[np.int64],
    queries: NDArray[Any],
    k: int,
) -> dict[str, Any]:
    """The same of a search that may miss some of the usable rows, on a sample of (n, D) queries."""
    unit, good = unit_rows(queries)
    unit = unit[good]
    found = recall(search(unit, k)[0], unit, embeddings, best_cosines(unit, embeddings, usable, k))
    return {"recall": found, "recall_k": k, "recall_queries": len(unit)}


def _slices(length: int, numbers_each: int) -> Iterator[slice]:
    """Slices of at most `BLOCK_BYTES` of float32."""
    step = max(1, BLOCK_BYTES // (4 * max(1, numbers_each)))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
