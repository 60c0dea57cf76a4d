"""Pseudo-pairs: for every image the sentences that the teacher finds nearest, and for every sentence the images.

Nobody paired these images and sentences; the teacher's shared space does. An index proposes, the embeddings decide:
stored scores are exact cosines, whatever the index approximates.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.cosine import cosines, unit_rows
from ...cache.disk.index import Index, build_index
from ...cache.disk.mapped import MappedArray
from ...cache.reader.feature_cache import EmbeddingSet
from ..settings.cache import PairsSettings

RECALL_QUERIES = 512
"""Queries that an index's recall is measured on: at recall@8 of 0.95 its standard error is about 0.5 %."""


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
    rng = np.random.default_rng(seed)
    rows = rng.choice(queries.usable, size=min(RECALL_QUERIES, len(queries.usable)), replace=False)
    return build_index(
        targets.embeddings,
        targets.usable,
        queries.embeddings[np.sort(rows)],
        settings.k,
        kind=settings.index,
        min_recall=settings.min_recall,
        seed=seed,
    )


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
    if targets.shape != (index.num_rows, index.width):
        raise ValueError(f"targets {targets.shape}: the index is over ({index.num_rows}, {index.width})")
    block = queries[start:stop]
    ids, _ = index.search(block, k)
    unit, _ = unit_rows(block)
    scores = cosines(unit, ids, targets)
    order = np.lexsort((ids, np.where(ids >= 0, -scores, np.inf)))
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
