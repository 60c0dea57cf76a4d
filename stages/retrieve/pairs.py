"""Pseudo-pairs: for every image the sentences that the teacher finds nearest, and for every sentence the images.

Nobody paired these images and sentences; the teacher's shared space does. An index proposes, the embeddings decide:
stored scores are exact cosines, whatever the index approximates.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.cosine import BLOCK_BYTES, Rows, cosines, nearest_rows, unit_rows
from ...cache.disk.index import Index, build_index
from ...cache.disk.mapped import MappedArray
from ...cache.reader.feature_cache import EmbeddingSet
from ..settings.cache import PairsSettings

RECALL_QUERIES = 512
"""Queries that an index's recall is measured on: at recall@8 of 0.95 its standard error is about 0.5 %."""

MOST_CANDIDATES = 2048
"""Most neighbours that an index is asked for, FAISS's limit on a GPU. Where more rows than these are equally near, all
rows are looked at."""


def build_side(
    targets: EmbeddingSet, queries: EmbeddingSet, settings: PairsSettings, seed: int = 0
) -> tuple[Index, dict[str, Any]]:
    """Build the index of one side, its recall measured with rows of the other side, as they will be searched for.

    Args:
        targets: what will be found.
        queries: what will be searched for.

    Returns:
        The index, and what the manifest says about it (see `build_index`).
    """
    return build_index(
        targets.embeddings,
        targets.usable,
        sample_queries(queries.embeddings, queries.usable, seed),
        settings.k,
        kind=settings.index,
        min_recall=settings.min_recall,
        seed=seed,
    )


def sample_queries(embeddings: Rows, rows: NDArray[np.int64], seed: int = 0) -> NDArray[Any]:
    """(n, D) embeddings of at most `RECALL_QUERIES` of some rows."""
    chosen = np.random.default_rng(seed).choice(rows, size=min(RECALL_QUERIES, len(rows)), replace=False)
    return embeddings[np.sort(chosen)]


def retrieve(
    queries: MappedArray, targets: MappedArray, index: Index, k: int, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest targets of query rows start to stop, by the teacher's cosine.

    Args:
        queries: (N, D) embeddings, NaN in rows without one.
        targets: (M, D) embeddings that the index was built over.

    Returns:
        ids (stop - start, k) int64 and scores (stop - start, k) float32 cosines; best first, the lower id first among
        equals; -1 and NaN last, where there is none. A row without an embedding has none.

    Raises:
        ValueError: if the index is of another width or array.
    """
    return nearest_targets(queries[start:stop], targets, index, k)


def nearest_targets(
    block: NDArray[Any], targets: MappedArray, index: Index, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """As `retrieve`, for (n, D) embeddings.

    An index keeps any of equally near rows, and its scores are rounded. So it is asked for more than k, until the last
    one that it names is so far that no row it has not named can belong to the k; where that takes too many, all rows
    are looked at. Rows that an IVF index does not probe are missed as ever.
    """
    if targets.shape != (index.num_rows, index.width):
        raise ValueError(f"targets {targets.shape}: the index is over ({index.num_rows}, {index.width})")
    unit, good = unit_rows(block)
    ids = np.full((len(block), k), -1, dtype=np.int64)
    scores = np.full((len(block), k), np.nan, dtype=np.float32)
    pending, wanted = np.flatnonzero(good), max(2 * k, k + 8)
    if k < MOST_CANDIDATES:
        wanted = min(wanted, MOST_CANDIDATES)
    while len(pending) and wanted <= MOST_CANDIDATES and not index.is_plain:
        is_open = np.zeros(len(pending), dtype=np.bool_)
        step = max(1, BLOCK_BYTES // (32 * wanted))  # about that many bytes for a candidate
        for start in range(0, len(pending), step):
            rows = pending[start : start + step]
            found, about = index.search(block[rows], wanted)
            # Whatever is farther than the k-th by more than twice the error is none of the k.
            found[about < about[:, k - 1 : k] - 2 * index.error] = -1
            exact = cosines(unit[rows], found, targets)
            order = np.lexsort((found, np.where(found >= 0, -exact, np.inf)))[:, :k]
            ids[rows] = np.take_along_axis(found, order, axis=1)
            scores[rows] = np.take_along_axis(exact, order, axis=1)
            # False for NaN: there are no more.
            is_open[start : start + step] = about[:, -1] + index.error >= scores[rows, -1]
        pending, wanted = pending[is_open & (wanted < len(index))], 4 * wanted
    if len(pending):
        ids[pending], scores[pending] = nearest_rows(unit[pending], targets, index.rows(), k)
    return ids, scores
