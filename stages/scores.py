"""What is said of a student on a labelled set, from embeddings alone: zero-shot, by neighbours, by a linear probe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import InputError
from ..cache.feature_cache import EvaluateSet
from .bootstrap import LEVEL, RESAMPLES, SEED, Interval, bootstrap_means, interval
from .metrics import (
    Labels,
    agreement,
    mean_class_accuracy,
    mean_cosine,
    per_class_accuracy,
    retention,
    top_k_hits,
    unit_rows,
)
from .probe import NEIGHBOUR_TEMPERATURE, NEIGHBOURS, FittedProbes, knn_scores

NEAR_DUPLICATE = 0.999
"""Cosine between the teacher's embeddings above which two images are taken for the same one."""

Hits = NDArray[np.bool_]


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


def zero_shot_scores(embedded: EmbeddedSet) -> dict[str, Any]:
    """Zero-shot scores of student and teacher on a labelled set, as JSON values. docs/scores.md says what each means.

    Returns:
        `n`, `unreadable`; of `student` and `teacher` each `_top1`, `_top5`, their `_interval`, and `_class_mean`;
        `student_top1_teacher_text` with its interval, of a student with class vectors of its own;
        `retention` with its interval; `agreement` and `cosine`; `per_class`; `bootstrap`, how intervals were made.
        None where there is no such number, for want of a readable image or because the teacher is never right.
    """
    student, teacher = embedded.logits()
    labels, num_classes = embedded.labels, len(embedded.class_ids)
    first = _compared(top_k_hits(student, labels, 1), top_k_hits(teacher, labels, 1), "top1")
    fifth = _compared(top_k_hits(student, labels, 5), top_k_hits(teacher, labels, 5), "top5")
    by_class = {}
    for name, logits in (("student", student), ("teacher", teacher)):
        hits = top_k_hits(logits, labels, 1)
        first[f"{name}_class_mean"] = mean_class_accuracy(hits, labels, num_classes)
        by_class[f"{name}_top1"] = per_class_accuracy(hits, labels, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    return {
        "n": len(labels),
        "unreadable": int((~embedded.readable).sum()),
        **first,
        **{key: value for key, value in fifth.items() if not key.startswith("retention")},
        **_with_teachers_text(embedded),
        "agreement": _number(agreement(student, teacher)),
        "cosine": _number(mean_cosine(embedded.student, embedded.teacher)),
        "per_class": {
            class_id: {"n": int(counts[i]), **{key: _number(float(of[i])) for key, of in by_class.items()}}
            for i, class_id in enumerate(embedded.class_ids)
        },
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "seed": SEED},
    }


def student_scores(embedded: EmbeddedSet) -> dict[str, Any]:
    """Of `zero_shot_scores` those that say how a student in training fares: no interval, no class by itself.

    Returns:
        `student_top1`, `student_top5`, `agreement` and `cosine`.
    """
    student, teacher = embedded.logits()
    hits = {k: top_k_hits(student, embedded.labels, k) for k in (1, 5)}
    return {
        **{f"student_top{k}": float(hit.mean()) for k, hit in hits.items()},
        "agreement": _number(agreement(student, teacher)),
        "cosine": _number(mean_cosine(embedded.student, embedded.teacher)),
    }


def probe_scores(
    scored: EmbeddedSet, fitted_on: EmbeddedSet, name: str, fit_name: str, probes: FittedProbes
) -> dict[str, Any]:
    """Scores on one labelled set of nearest neighbours and of a linear probe that know another one, as JSON values.

    Args:
        scored: the set whose images are classified; nothing is chosen on it.
        fitted_on: the set whose labels are used, unreadable images left out.
        name, fit_name: what the two are called, for errors.
        probes: those that were fitted before; new ones join.

    Returns:
        `fitted_on`, `fit_images`; `near_duplicates`, scored images that are nearly among them; `knn` and `linear`,
        each with the top-1 accuracy of student and teacher, intervals and retention, and how it was made.

    Raises:
        InputError: if the sets have different classes, or the labelled images are too few to fit on.
    """
    require_same_classes(scored.class_ids, fitted_on.class_ids, name, fit_name)
    usable, num_classes = fitted_on.readable, len(scored.class_ids)
    labels = fitted_on.labels[usable]
    knn: dict[str, Hits] = {}
    linear: dict[str, Hits] = {}
    made: dict[str, float | bool] = {}
    try:
        for side in ("student", "teacher"):
            fitting, queries = getattr(fitted_on, side)[usable], getattr(scored, side)
            probe = probes.fit(fitting, labels, num_classes)
            made |= {f"{side}_c": probe.c, f"{side}_converged": probe.converged}
            linear[side] = top_k_hits(probe.scores(queries), scored.labels, 1)
            knn[side] = top_k_hits(knn_scores(fitting, labels, queries, num_classes), scored.labels, 1)
    except ValueError as error:
        raise InputError(f"evaluate.{name}.probe: {fit_name} has {len(labels)} readable images: {error}") from error
    nearest = _nearest_cosines(scored.teacher[scored.readable], fitted_on.teacher[usable])
    made_knn = {"k": min(NEIGHBOURS, len(labels)), "temperature": NEIGHBOUR_TEMPERATURE}
    return {
        "fitted_on": fit_name,
        "fit_images": len(labels),
        "near_duplicates": int((nearest >= NEAR_DUPLICATE).sum()),
        "knn": {**_compared(knn["student"], knn["teacher"], "top1"), **made_knn},
        "linear": {**_compared(linear["student"], linear["teacher"], "top1"), **made},
    }


def require_same_classes(scored: Sequence[str], fitted_on: Sequence[str], name: str, fit_name: str) -> None:
    """Refuse to fit a probe on other classes than it is scored on.

    Raises:
        InputError: naming a class that one set has and the other has not.
    """
    if list(scored) == list(fitted_on):
        return
    odd = sorted(set(scored) ^ set(fitted_on))[0]
    where = name if odd in scored else fit_name
    raise InputError(
        f"evaluate.{name}.probe = {fit_name!r}: class {odd!r} is in {where} alone; wanted a set of the same classes"
    )


def _compared(student: Hits, teacher: Hits, key: str) -> dict[str, Any]:
    """Accuracy of both, and what the student retains, each with its interval, from the same draws."""
    means = bootstrap_means(np.stack([student, teacher], axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means[:, 0] / means[:, 1]
    return {
        f"student_{key}": float(student.mean()),
        f"student_{key}_interval": _pair(interval(means[:, 0])),
        f"teacher_{key}": float(teacher.mean()),
        f"teacher_{key}_interval": _pair(interval(means[:, 1])),
        "retention": _number(retention(float(student.mean()), float(teacher.mean()))),
        "retention_interval": _pair(interval(ratios)),
    }


def _with_teachers_text(embedded: EmbeddedSet) -> dict[str, Any]:
    """What a student's images alone are worth, where its class vectors are its own too: top-1 with the teacher's."""
    if embedded.student_head is None:
        return {}
    hits = top_k_hits(unit_rows(embedded.student) @ embedded.head.T, embedded.labels, 1)
    key = "student_top1_teacher_text"
    return {key: float(hits.mean()), f"{key}_interval": _pair(interval(bootstrap_means(hits[:, None])[:, 0]))}


def _nearest_cosines(queries: NDArray[np.float32], bank: NDArray[np.float32]) -> NDArray[np.float32]:
    rows, others = unit_rows(queries), unit_rows(bank)
    blocks = [rows[first : first + 1024] @ others.T for first in range(0, len(rows), 1024)]
    return np.concatenate([block.max(axis=1) for block in blocks]) if blocks else np.zeros(0, np.float32)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _pair(bounds: Interval) -> list[float] | None:
    return None if math.isnan(bounds[0]) else list(bounds)
