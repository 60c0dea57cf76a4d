"""Zero-shot scores of a student and its teacher on a labelled set, from embeddings alone."""

from typing import Any

import numpy as np

from .bootstrap import LEVEL, RESAMPLES, SEED, compared, mean_interval, number
from .embedded_set import EmbeddedSet
from .metrics import agreement, mean_cosine, per_class_accuracy, top_k_hits, unit_rows
from .score_inputs import ScoreInputs

_SIDES = ("student", "teacher")


def zero_shot(inputs: ScoreInputs) -> dict[str, Any]:
    """The score of the table: `zero_shot_scores` of the set."""
    return zero_shot_scores(inputs.set)


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
    first, fifth = ([top_k_hits(logits, labels, k) for logits in (student, teacher)] for k in (1, 5))
    by_class = {side: per_class_accuracy(hits, labels, num_classes) for side, hits in zip(_SIDES, first)}
    counts = np.bincount(labels, minlength=num_classes)
    return {
        "n": len(labels),
        "unreadable": int((~embedded.readable).sum()),
        **compared("top1", *first),
        # The mean over the classes that have images: each counts the same, however many it has.
        **{f"{side}_class_mean": float(np.nanmean(accuracy)) for side, accuracy in by_class.items()},
        **{key: value for key, value in compared("top5", *fifth).items() if not key.startswith("retention")},
        **_with_teachers_text(embedded),
        "agreement": number(agreement(student, teacher)),
        "cosine": number(mean_cosine(embedded.student, embedded.teacher)),
        "per_class": {
            class_id: {"n": int(counts[i]), **{f"{side}_top1": number(float(of[i])) for side, of in by_class.items()}}
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
        "agreement": number(agreement(student, teacher)),
        "cosine": number(mean_cosine(embedded.student, embedded.teacher)),
    }


def _with_teachers_text(embedded: EmbeddedSet) -> dict[str, Any]:
    """What a student's images alone are worth, where its class vectors are its own too: top-1 with the teacher's."""
    if embedded.student_head is None:
        return {}
    hits = top_k_hits(unit_rows(embedded.student) @ embedded.head.T, embedded.labels, 1)
    key = "student_top1_teacher_text"
    return {key: float(hits.mean()), f"{key}_interval": list(mean_interval(hits))}
