"""What an export is worth beside the student that it was made from: on labelled sets, rows of the cache, texts."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...cache.disk.cosine import unit_rows
from ...cache.reader.feature_cache import FeatureCache
from ..score.bootstrap import mean_interval, number
from ..score.embedded_set import EmbeddedSet
from ..score.zero_shot import zero_shot_scores
from .training_pictures import TrainingPictures

Embeddings = NDArray[np.float32]
BATCH = 64
SENTENCES = 20_000
"""Sentences, at most, among which the nearest one of an image is looked for."""
TEXTS = 256
"""Sentences, at most, that a text tower is tried on."""
SEED = 0


def labelled_proof(exported: EmbeddedSet, student: EmbeddedSet) -> dict[str, Any]:
    """Scores of what was exported on a labelled set, and its agreement with the student, as JSON values.

    Returns:
        As `zero_shot_scores`, whose `student_…` are of the export, without `per_class`; and of the student
        `unexported`: its `top1`, `agreement` and `cosine` with the export, each with an interval.
    """
    scores = {key: value for key, value in zero_shot_scores(exported).items() if key != "per_class"}
    mine, before = exported.logits()[0], student.logits()[0]
    both = np.isfinite(mine).all(axis=1) & np.isfinite(before).all(axis=1)
    same = mine[both].argmax(axis=1) == before[both].argmax(axis=1)
    right = before[both].argmax(axis=1) == exported.labels[both]
    return {
        **scores,
        "unexported": {
            "top1": float(right.sum() / max(1, len(exported.labels))),
            **_mean("agreement", same),
            **_mean("cosine", _cosines(exported.student[both], student.student[both])),
        },
    }


def unlabelled_proof(
    exported: Embeddings, student: Embeddings, cache: FeatureCache, rows: NDArray[np.int64]
) -> dict[str, Any]:
    """Agreement with student and teacher on training rows of the cache, as JSON values.

    Args:
        exported, student: (n, D), of these rows.

    Returns:
        `rows`; cosines of the export with student and teacher, of the student with the teacher; and the share of rows
        whose nearest sentence, among `sentences` of the cache, is the same as the student's and as the teacher's.
    """
    teacher = cache.images.embeddings[rows].astype(np.float32)
    usable = cache.sentences.usable
    chosen = np.sort(np.random.default_rng(SEED).permutation(usable)[:SENTENCES])
    sentences, _ = unit_rows(cache.sentences.embeddings[chosen])
    nearest = [(unit_rows(side)[0] @ sentences.T).argmax(axis=1) for side in (exported, student, teacher)]
    return {
        "rows": len(rows),
        "sentences": len(chosen),
        **_mean("cosine_with_student", _cosines(exported, student)),
        **_mean("cosine_with_teacher", _cosines(exported, teacher)),
        **_mean("student_cosine_with_teacher", _cosines(student, teacher)),
        **_mean("agreement_with_student", nearest[0] == nearest[1]),
        **_mean("agreement_with_teacher", nearest[0] == nearest[2]),
        **_mean("student_agreement_with_teacher", nearest[1] == nearest[2]),
    }


def sample_sentences(cache: FeatureCache, count: int, *, seed: int = SEED) -> tuple[NDArray[np.int64], list[str]]:
    """Some usable sentences of the cache: their rows, ascending, and their texts."""
    rows = np.sort(np.random.default_rng(seed).permutation(cache.sentences.usable)[:count])
    return rows, cache.sentences.rows.column("text").take(rows).to_pylist()


def text_proof(exported: Embeddings, tower: Embeddings, teacher: Embeddings) -> dict[str, Any]:
    """Cosines of sentences by an exported text tower with those by the tower in float32, and by the teacher."""
    return {
        "sentences": len(exported),
        **_mean("cosine_with_tower", _cosines(exported, tower)),
        **_mean("cosine_with_teacher", _cosines(exported, teacher)),
    }


@torch.inference_mode()
def embed_rows(module: nn.Module, pictures: TrainingPictures, decoded: Tensor, device: torch.device) -> Embeddings:
    """(n, D) embeddings of decoded training pictures."""
    module = module.to(device)
    blocks = [
        module(pictures.normalise(batch.to(device))).float().cpu().numpy() for batch in torch.split(decoded, BATCH)
    ]
    return np.concatenate(blocks).astype(np.float32)


def _cosines(first: Embeddings, second: Embeddings) -> NDArray[np.float32]:
    cosines: NDArray[np.float32] = (unit_rows(first)[0] * unit_rows(second)[0]).sum(axis=1)
    return cosines


def _mean(key: str, values: NDArray[Any]) -> dict[str, Any]:
    if not len(values):
        return {key: None, f"{key}_interval": None}
    return {key: number(float(values.mean())), f"{key}_interval": list(mean_interval(values))}
