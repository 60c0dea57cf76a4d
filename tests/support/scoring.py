"""A student on a labelled set of a cache, scored as `dimefm evaluate` scores it."""

import dataclasses

from dimefm.stages.score.embed_set import embed_set
from dimefm.stages.score.zero_shot import zero_shot_scores


def evaluate_student(student, record, cache, name, images_root, *, student_head=None, **options):
    """Zero-shot scores, and which weights they are of; arguments as `embed_set`."""
    embedded = embed_set(student, record, cache, name, images_root, **options)
    scores = zero_shot_scores(dataclasses.replace(embedded, student_head=student_head))
    return {**scores, "weights": record.get("weights", "model")}
