"""One labelled set, embedded by student and teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cache.reader.feature_cache import EvaluateSet
from .metrics import Hits, Labels, unit_rows


@dataclass(frozen=True)
class EmbeddedSet:
    """A labelled set as student and teacher see it. An image that one of them could not read is NaN in both.

    Attributes:
        student, teacher: (N, D) float32.
        head: (C, D) float32, the teacher's class vectors, unit rows.
        labels: (N,) int64.
        class_ids: C of them, sorted.
        sources: N paths below the set's folder.
        student_head: (C, D) class vectors by the student's own text tower, unit rows; None where it has none.
    """

    student: NDArray[np.float32]
    teacher: NDArray[np.float32]
    head: NDArray[np.float32]
    labels: Labels
    class_ids: Sequence[str]
    sources: Sequence[str]
    student_head: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, student: NDArray[np.float32], labelled: EvaluateSet) -> "EmbeddedSet":
        """With the student's embeddings of a cached set, NaN where there is none."""
        teacher = labelled.images.embeddings[:].astype(np.float32)
        unreadable = ~np.isfinite(np.concatenate([student, teacher], axis=1)).all(axis=1, keepdims=True)
        student, teacher = (np.where(unreadable, np.float32(np.nan), rows) for rows in (student, teacher))
        sources = labelled.images.rows.column("source").slice(0, len(labelled.images)).to_pylist()
        return cls(student, teacher, labelled.head, labelled.labels, labelled.class_ids, sources)

    @property
    def readable(self) -> Hits:
        """(N,) which images both could read."""
        return np.asarray(np.isfinite(self.student).all(axis=1), dtype=np.bool_)

    def logits(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(N, C) cosines with the class vectors, of the student (its own, where it has some) and of the teacher."""
        own = self.head if self.student_head is None else self.student_head
        return unit_rows(self.student) @ own.T, unit_rows(self.teacher) @ self.head.T
