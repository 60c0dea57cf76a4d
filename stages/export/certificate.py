"""May a student stand in for its teacher before a vector database? Shares of the top k that its queries keep.

Two ways: the student's queries search the teacher's vectors, as where a database is full of them; and the teacher's
queries search the student's vectors, as where it is filled anew. Beside each stands what rounding the teacher's own
vectors to 16 bits costs, which is the most that can be asked for, and chance.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.cosine import unit_rows
from ..score.bootstrap import LEVEL, RESAMPLES, mean_interval
from ..score.bootstrap import SEED as BOOTSTRAP_SEED

KS = (1, 10, 100)
Ids = NDArray[np.int64]
Vectors = NDArray[np.floating[Any]]
Search = Callable[[Vectors, int], Ids]
"""(n, D) queries and k to (n, k) row numbers, best first, -1 where there is none."""


@dataclass(frozen=True)
class Queries:
    """Rows that ask: the same images or sentences by student and by teacher.

    Attributes:
        student, teacher: (n, D).
        rows: (n,) their row numbers, where the rows that are searched are of the same side: a row never finds itself.
    """

    student: Vectors
    teacher: Vectors
    rows: Ids | None = None


def kept_share(found: Ids, wanted: Ids) -> NDArray[np.float64]:
    """(n,) share of each query's wanted rows that were found; the order within the k counts for nothing.

    >>> kept_share(np.array([[3, 1], [5, 6]]), np.array([[1, 2], [6, 5]])).tolist()
    [0.5, 1.0]
    """
    hits = ((found[:, :, None] == wanted[:, None, :]) & (wanted >= 0)[:, None, :]).any(axis=1).sum(axis=1)
    shares: NDArray[np.float64] = hits / np.maximum((wanted >= 0).sum(axis=1), 1)
    return shares


def against_teacher_vectors(queries: Queries, search: Search, num_rows: int) -> dict[str, Any]:
    """The student's queries over the teacher's vectors: which share of the teacher's own results do they keep?

    Args:
        search: over the cache's index of the teacher's vectors.
        num_rows: that are in it.
    """
    asked = {"student": queries.student, "teacher_fp16": rounded(queries.teacher), "teacher": queries.teacher}
    return _kept(asked, search, search, search, queries.rows, num_rows)


def against_student_vectors(queries: Queries, vectors: Queries) -> dict[str, Any]:
    """The teacher's queries over the student's vectors of some rows, against its queries over its own of those rows.

    Args:
        vectors: the rows that are searched; their `rows` and those of `queries` are of the same side, or None.
    """
    asked = dict.fromkeys(("student", "teacher_fp16", "teacher"), queries.teacher)
    searches = (exact(vectors.student), exact(rounded(vectors.teacher)), exact(vectors.teacher))
    own = None
    if queries.rows is not None and vectors.rows is not None:  # where each query lies among the searched rows
        place = {int(row): i for i, row in enumerate(vectors.rows)}
        own = np.array([place.get(int(row), -1) for row in queries.rows], dtype=np.int64)
    return _kept(asked, *searches, own, len(vectors.teacher))


def exact(vectors: Vectors) -> Search:
    """Exact search by cosine; of equal cosines the lower row comes first."""
    unit, _ = unit_rows(vectors)

    def search(queries: Vectors, k: int) -> Ids:
        k = min(k, len(unit))
        found = np.empty((len(queries), k), dtype=np.int64)
        for first in range(0, len(queries), 256):
            scores = unit_rows(queries[first : first + 256])[0] @ unit.T
            found[first : first + 256] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return found

    return search


def rounded(vectors: Vectors) -> NDArray[np.float16]:
    """Unit vectors in half precision: what a database of 16-bit numbers would hold."""
    return unit_rows(vectors)[0].astype(np.float16)


def certificate(found: Mapping[str, Mapping[str, Any]], num_queries: Mapping[str, int]) -> dict[str, Any]:
    """The document: `certificate.json`."""
    return {
        "k": list(KS),
        "queries": dict(num_queries),
        "comparisons": {name: dict(of) for name, of in found.items()},
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "seed": BOOTSTRAP_SEED},
    }


def _kept(
    asked: Mapping[str, Vectors], student: Search, half: Search, teacher: Search, own: Ids | None, num_rows: int
) -> dict[str, Any]:
    """Shares kept for each k that there are rows for: `student` and `teacher_fp16`, with intervals, and `chance`."""
    left = num_rows - (own is not None)
    ks = [k for k in KS if k <= left]
    document: dict[str, Any] = {"rows": num_rows, "queries": len(asked["teacher"]), "student": {}, "teacher_fp16": {}}
    document["chance"] = {str(k): k / left for k in ks}
    if not ks:
        return document
    most = max(ks) + (own is not None)
    ids = {
        name: _without(search(asked[name], most), own)
        for name, search in (("student", student), ("teacher_fp16", half), ("teacher", teacher))
    }
    for name in ("student", "teacher_fp16"):
        for k in ks:
            shares = kept_share(ids[name][:, :k], ids["teacher"][:, :k])
            document[name][str(k)] = {"kept": float(shares.mean()), "interval": list(mean_interval(shares))}
    return document


def _without(ids: Ids, own: Ids | None) -> Ids:
    """Each query's results without its own row, one fewer."""
    if own is None:
        return ids
    keep = ids != own[:, None]
    keep[keep.all(axis=1), -1] = False  # it did not find itself: the last result goes
    return ids[keep].reshape(len(ids), -1)
