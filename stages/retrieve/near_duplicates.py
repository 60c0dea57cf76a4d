"""Rows that are nearly the same as others, found by the teacher's cosine among embeddings that are already there."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...cache.disk.cosine import TIE, Rows, cosines, unit_rows
from ...cache.disk.index import Index, build_index
from .pairs import RECALL_QUERIES

FIRST_NEIGHBOURS = 16
"""Neighbours asked for at first; four times as many again for rows that have no fewer near ones."""

MAX_NEIGHBOURS = 1024
"""Most neighbours looked at for one row. Below FAISS's limit on a GPU."""

INDEX_ERROR = 0.002
"""How far an index's own reading of a cosine may be off: it may hold its rows in float16."""

MAX_COPIES = 256
"""Copies of one embedding, byte for byte, above which an index without copies is worth building."""

QUERY_ROWS = 4096
"""Rows that are searched for at a time."""

Progress = Callable[[int], None]
"""Told after every block how many rows have been searched for."""


@dataclass(frozen=True)
class Links:
    """Pairs of rows whose cosine reaches a threshold.

    Attributes:
        queries: (L,) int64 rows that were searched for.
        targets: (L,) int64 rows that were found.
        scores: (L,) float32 exact cosines.
        num_cut: rows with at least `MAX_NEIGHBOURS` near ones, of which the farther were not looked at.
    """

    queries: NDArray[np.int64]
    targets: NDArray[np.int64]
    scores: NDArray[np.float32]
    num_cut: int


@dataclass(frozen=True)
class Duplicates:
    """Rows that repeat an earlier one.

    Attributes:
        rows: (n,) int64 rows to leave out, ascending.
        kept: (n,) int64 the row that stays for each of them, the lowest of its group.
        scores: (n,) float32 cosine between the two. In a group that hangs together by rows in between it can be
            below the threshold.
        num_identical: those among them whose embedding equals an earlier one's byte for byte.
        num_cut: see `Links`.
    """

    rows: NDArray[np.int64]
    kept: NDArray[np.int64]
    scores: NDArray[np.float32]
    num_identical: int
    num_cut: int


def find_duplicates(
    embeddings: Rows, rows: NDArray[np.int64], index: Index, threshold: float, progress: Progress | None = None
) -> Duplicates:
    """Group rows that are linked by a cosine of at least the threshold; of each group the lowest row stays.

    Args:
        embeddings: (N, D), any float dtype, any norm.
        rows: row numbers to compare, ascending; others are neither searched for nor found.
        index: over at least these rows.
        threshold: least cosine of two rows that count as the same.
    """
    first = first_identical(embeddings, rows)
    own = rows[first == rows]
    if np.unique(first, return_counts=True)[1].max(initial=0) > MAX_COPIES:
        index = own_index(embeddings, own)  # its copies would be all that is found near a row
    links = find_links(embeddings, own, embeddings, rows, index, threshold, same=True, progress=progress)
    lowest = lowest_linked(
        index.num_rows, np.concatenate([rows, links.queries]), np.concatenate([first, links.targets])
    )
    dropped = rows[lowest[rows] != rows]
    kept = lowest[dropped]
    scores = np.empty(len(dropped), np.float32)
    for start in range(0, len(dropped), QUERY_ROWS):
        part = slice(start, start + QUERY_ROWS)
        scores[part] = cosines(unit_rows(embeddings[dropped[part]])[0], kept[part, None], embeddings)[:, 0]
    return Duplicates(dropped, kept, scores, int(np.count_nonzero(first != rows)), links.num_cut)


def nearest_leak(
    evaluate: Rows,
    evaluate_rows: NDArray[np.int64],
    images: Rows,
    rows: NDArray[np.int64],
    index: Index,
    threshold: float,
    progress: Progress | None = None,
) -> Links:
    """Training images whose cosine to an image of an evaluation set reaches the threshold.

    Args:
        evaluate: (E, D) embeddings of the set; `evaluate_rows` of them are searched for.
        images: (N, D) embeddings of the training images; `rows` of them may be found.
        index: over `images`.

    Returns:
        One link for each training image: to the evaluation image that it is nearest to. The highest score first.
    """
    links = find_links(evaluate, evaluate_rows, images, rows, index, threshold, same=False, progress=progress)
    order = np.lexsort((links.queries, -links.scores, links.targets))
    _, first = np.unique(links.targets[order], return_index=True)
    best = order[first]
    best = best[np.lexsort((links.targets[best], -links.scores[best]))]
    return Links(links.queries[best], links.targets[best], links.scores[best], links.num_cut)


def find_links(
    queries: Rows,
    query_rows: NDArray[np.int64],
    targets: Rows,
    target_rows: NDArray[np.int64],
    index: Index,
    threshold: float,
    *,
    same: bool,
    progress: Progress | None = None,
) -> Links:
    """Every pair of a query and a target whose cosine reaches the threshold, as far as the index finds it.

    The index proposes; the exact cosine decides. A row whose farthest neighbour is still near is asked for more.

    Args:
        queries: (N, D) embeddings; `query_rows` of them are searched for.
        targets: (M, D) embeddings that the index is over; only `target_rows` count as found.
        same: whether queries and targets are one array, so that a row is no neighbour of itself.
    """
    wanted = np.zeros(index.num_rows, dtype=bool)
    wanted[target_rows] = True
    limit = min(MAX_NEIGHBOURS, index.num_rows)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    num_cut = 0
    for start in range(0, len(query_rows), QUERY_ROWS):
        pending, k = query_rows[start : start + QUERY_ROWS], min(FIRST_NEIGHBOURS, limit)
        while len(pending):
            block = queries[pending]
            ids, scores = index.search(block, k)
            near = scores >= threshold - INDEX_ERROR  # False for NaN, where there is none
            more = near[:, -1].copy()
            if k == limit:
                num_cut += int(np.count_nonzero(more)) if limit < index.num_rows else 0
                more = np.zeros(len(pending), dtype=bool)
            near &= wanted[ids] & ~more[:, None]
            if same:
                near &= ids != pending[:, None]
            exact = cosines(unit_rows(block)[0], np.where(near, ids, -1), targets)
            query, column = np.nonzero(exact >= threshold - TIE)
            found.append((pending[query], ids[query, column], exact[query, column]))
            pending, k = pending[more], min(4 * k, limit)
        if progress is not None:
            progress(min(start + QUERY_ROWS, len(query_rows)))
    first, second, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Links(first, second, score, num_cut)


def own_index(embeddings: Rows, rows: NDArray[np.int64]) -> Index:
    """An index to look for rows among their own kind, its recall measured with some of them."""
    sample = rows[:: max(1, len(rows) // RECALL_QUERIES)][:RECALL_QUERIES]
    return build_index(embeddings, rows, embeddings[sample], k=8)[0]


def lowest_linked(num_rows: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lowest row that each row is linked to, over any number of links; itself where there is none.

    >>> lowest_linked(5, np.array([3, 1]), np.array([1, 4])).tolist()
    [0, 1, 2, 1, 1]
    """
    links = coo_array((np.ones(len(first), dtype=np.bool_), (first, second)), shape=(num_rows, num_rows))
    _, group = connected_components(links, directed=False)
    _, lowest = np.unique(group, return_index=True)
    return np.asarray(lowest[group], dtype=np.int64)


def first_identical(embeddings: Rows, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of some rows the first of them whose embedding is the same byte for byte; mostly itself.

    Thousands of copies of one placeholder are found here at once; as neighbours they would hide each other.
    """
    hashes = np.empty(len(rows), np.uint64)
    num_halves = embeddings[rows[:1]].nbytes // 2
    factors = np.random.default_rng(0).integers(0, 2**63, size=num_halves, dtype=np.uint64) * 2 + 1
    for start in range(0, len(rows), QUERY_ROWS):
        block = np.ascontiguousarray(embeddings[rows[start : start + QUERY_ROWS]])
        halves = block.reshape(len(block), -1).view(np.uint16).astype(np.uint64)
        hashes[start : start + len(block)] = ((halves + 1) * factors).sum(axis=1)  # modulo 2 to the 64th
    _, position, group = np.unique(hashes, return_index=True, return_inverse=True)
    first = rows[position[group]]
    suspects = np.flatnonzero(first != rows)
    for start in range(0, len(suspects), QUERY_ROWS):
        part = suspects[start : start + QUERY_ROWS]
        ours, theirs = (np.ascontiguousarray(embeddings[which]) for which in (rows[part], first[part]))
        differ = (ours.view(np.uint16) != theirs.view(np.uint16)).reshape(len(part), -1).any(axis=1)
        first[part[differ]] = rows[part[differ]]
    return first
