"""A trained student on a labelled set: embedded by it, and held against its teacher and the cached class vectors."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..cache.errors import InputError
from ..cache.feature_cache import EvaluateSet, FeatureCache
from .best_weights import BEST, load_best
from .checkpoint import load_checkpoint, load_weights, weights_to_use
from .devices import resolve_device
from .labelled_pictures import LabelledPictures
from .run_record import CHECKPOINT, read_run_record
from .scores import EmbeddedSet, zero_shot_scores
from .settings import StudentSettings
from .students import build_student
from .text_student import TextStudent, build_text_student, text_tokenizer

Which = Literal["best", "last"]


def load_student(run_dir: Path, which: Which | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a student from its run, with averaged weights where it kept some; needs no teacher, cache or network.

    Args:
        which: `best`, the step that scored best on the run's dev set, or `last`, its checkpoint; None: the best where
            the run keeps one.

    Returns:
        The student, from (B, 3, S, S) to (B, embed_dim), in eval mode, on the CPU; and its `run.json`, with the number
        of steps that the weights have behind them as `step`, which they are, `ema` or `model`, as `weights`, `best` or
        `last` as `checkpoint`, and as `chosen_on` the set that the best was chosen on, else None.

    Raises:
        InputError: if the folder holds no run, it has no such checkpoint yet, or a file is damaged.
    """
    record = read_run_record(run_dir)
    student = student_of(record)
    state, path = chosen_state(run_dir, which)
    key = weights_to_use(state)  # of `best.pt`, `model`: it holds no others
    load_weights(student, state, path, key)
    is_best = path.name == BEST
    facts = {
        "step": state["step"],
        "weights": state["weights"] if is_best else key,
        "checkpoint": "best" if is_best else "last",
        "chosen_on": state["scores"]["set"] if is_best else None,
    }
    return student.eval(), {**record, **facts}


def chosen_state(run_dir: Path, which: Which | None = None) -> tuple[dict[str, Any], Path]:
    """What `load_student` takes a student's weights from, and the file; arguments and errors are the same."""
    if which == "best" or (which is None and (run_dir / BEST).exists()):
        return load_best(run_dir), run_dir / BEST
    return load_checkpoint(run_dir / CHECKPOINT), run_dir / CHECKPOINT


def student_of(record: dict[str, Any]) -> nn.Module:
    """The student that a `run.json` is about, with random weights."""
    settings = record["student"][record["name"]]
    return build_student(settings["model"], record["embed_dim"], settings["image_size"])


def load_text_student(run_dir: Path, device: str = "auto", *, which: Which | None = None) -> TextStudent | None:
    """Rebuild a student's own text tower from its run; None for a student that uses the teacher's.

    The weights are of the step that `load_student` takes, averaged ones where it takes averaged ones. Arguments and
    errors are those of `load_student`.
    """
    student = text_student_of(read_run_record(run_dir), resolve_device(device))
    if student is not None:
        state, path = chosen_state(run_dir, which)
        load_weights(student.tower, state, path, f"text_{weights_to_use(state)}")
    return student


def text_student_of(record: dict[str, Any], device: torch.device) -> TextStudent | None:
    """The own text tower of the student that a `run.json` is about, with random weights; None if it has none."""
    spec = StudentSettings.model_validate(record["student"][record["name"]]).own_text
    if spec is None:
        return None
    return TextStudent(build_text_student(spec, record["embed_dim"]), text_tokenizer(spec), device)


def evaluate_student(
    student: nn.Module,
    record: dict[str, Any],
    cache: FeatureCache,
    name: str,
    images_root: Path,
    *,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
    student_head: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Zero-shot scores of a student and, from the cache, its teacher on one labelled set.

    Other arguments and errors are those of `embed_set`.

    Args:
        student_head: (classes, D) class vectors of the student's own text tower, unit rows; None: the teacher's.

    Returns:
        As `zero_shot_scores`; and `weights`, `ema` where they are averages, else `model`.
    """
    embedded = embed_set(
        student, record, cache, name, images_root, batch_size=batch_size, device=device, workers=workers
    )
    embedded = dataclasses.replace(embedded, student_head=student_head)
    return {**zero_shot_scores(embedded), "weights": record.get("weights", "model")}


def embed_set(
    student: nn.Module,
    record: dict[str, Any],
    cache: FeatureCache,
    name: str,
    images_root: Path,
    *,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
) -> EmbeddedSet:
    """A labelled set's images as a student sees them and, from the cache, as its teacher did. No teacher is loaded.

    The student sees images as the teacher does (resize mode, filter, mean and std), at its own size. An image that
    stage one or the student cannot read counts as wrong for both.

    Args:
        student, record: from `load_student`.
        name: of the evaluation set, as in `[evaluate.NAME]`.
        images_root: folder that the set's rows are relative to.
        workers: threads that decode; 0 takes one for each core.

    Raises:
        InputError: if the cache has no such set or another teacher's embeddings, or the folder is missing.
    """
    teacher = {key: cache.teacher.get(key) for key in record["teacher"]}
    if teacher != record["teacher"]:
        raise InputError(
            f"{cache.layout.root}: embeddings of {teacher}, but the student learned from {record['teacher']}; "
            "evaluate it with the cache of its own teacher"
        )
    labelled = labelled_set(cache, name)
    require_images(images_root, name)
    image_size = record["student"][record["name"]]["image_size"]
    pictures = LabelledPictures(
        labelled, images_root, record["preprocess"], image_size, batch_size=batch_size, workers=workers
    )
    return embed_pictures(student, labelled, pictures, resolve_device(device))


def embed_pictures(
    student: nn.Module, labelled: EvaluateSet, pictures: LabelledPictures, device: torch.device
) -> EmbeddedSet:
    """The same, of pictures that are at hand."""
    embeddings = np.full(labelled.images.embeddings.shape, np.nan, dtype=np.float32)
    student = student.to(device).eval()
    with torch.inference_mode():
        for rows, batch in pictures:
            embeddings[rows] = student(pictures.normalise(batch.to(device))).float().cpu().numpy()
    return EmbeddedSet.of(embeddings, labelled)


def labelled_set(cache: FeatureCache, name: str) -> EvaluateSet:
    """A labelled set of a cache.

    Raises:
        InputError: if the cache has no such set.
    """
    if name not in cache.evaluate:
        there = ", ".join(sorted(cache.evaluate)) or "none"
        raise InputError(
            f"{cache.layout.root}: no evaluation set {name!r}, there is {there}; `dimefm cache append` takes one in"
        )
    return cache.evaluate[name]


def require_images(images_root: Path, name: str) -> None:
    """Raises InputError if the folder of a labelled set is missing."""
    if not images_root.is_dir():
        raise InputError(f"{images_root}: no such folder; wanted the images of evaluate.{name}")
