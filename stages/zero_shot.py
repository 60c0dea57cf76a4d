"""A trained student on a labelled set: embedded by it, and held against its teacher and the cached class vectors."""

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from ..cache.errors import InputError
from ..cache.feature_cache import EvaluateSet, FeatureCache
from .checkpoint import load_checkpoint, load_weights, weights_to_use
from .devices import resolve_device
from .images import ImageError, read_image
from .run_record import CHECKPOINT, read_run_record
from .scores import EmbeddedSet, zero_shot_scores
from .settings import StudentSettings
from .students import build_student
from .text_student import TextStudent, build_text_student, text_tokenizer


def load_student(run_dir: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a student from its run, with averaged weights where it kept some; needs no teacher, cache or network.

    Returns:
        The student, from (B, 3, S, S) to (B, embed_dim), in eval mode, on the CPU; and its `run.json`, with the number
        of steps that the weights have behind them as `step`, and which they are, `ema` or `model`, as `weights`.

    Raises:
        InputError: if the folder holds no run, it has no checkpoint yet, or a file is damaged.
    """
    record = read_run_record(run_dir)
    settings = record["student"][record["name"]]
    student = build_student(settings["model"], record["embed_dim"], settings["image_size"])
    state = load_checkpoint(run_dir / CHECKPOINT)
    weights = weights_to_use(state)
    load_weights(student, state, run_dir / CHECKPOINT, weights)
    return student.eval(), {**record, "step": state["step"], "weights": weights}


def load_text_student(run_dir: Path, device: str = "auto") -> TextStudent | None:
    """Rebuild a student's own text tower from its run; None for a student that uses the teacher's.

    The weights are averaged ones where `load_student` takes averaged ones. Errors are those of `load_student`.
    """
    record = read_run_record(run_dir)
    spec = StudentSettings.model_validate(record["student"][record["name"]]).own_text
    if spec is None:
        return None
    tower = build_text_student(spec, record["embed_dim"])
    state = load_checkpoint(run_dir / CHECKPOINT)
    load_weights(tower, state, run_dir / CHECKPOINT, f"text_{weights_to_use(state)}")
    return TextStudent(tower, text_tokenizer(spec), resolve_device(device))


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
    labelled = _evaluate_set(record, cache, name)
    if not images_root.is_dir():
        raise InputError(f"{images_root}: no such folder; wanted the images of evaluate.{name}")
    embeddings = _embed(student, record, labelled, images_root, batch_size, resolve_device(device), workers)
    return EmbeddedSet.of(embeddings, labelled)


def _evaluate_set(record: dict[str, Any], cache: FeatureCache, name: str) -> EvaluateSet:
    teacher = {key: cache.teacher.get(key) for key in record["teacher"]}
    if teacher != record["teacher"]:
        raise InputError(
            f"{cache.layout.root}: embeddings of {teacher}, but the student learned from {record['teacher']}; "
            "evaluate it with the cache of its own teacher"
        )
    if name not in cache.evaluate:
        there = ", ".join(sorted(cache.evaluate)) or "none"
        raise InputError(
            f"{cache.layout.root}: no evaluation set {name!r}, there is {there}; `dimefm cache append` takes one in"
        )
    return cache.evaluate[name]


def _embed(
    student: nn.Module,
    record: dict[str, Any],
    labelled: EvaluateSet,
    images_root: Path,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> NDArray[np.float32]:
    """(N, D) student embeddings, NaN where stage one or we could not read the image."""
    embeddings = np.full(labelled.images.embeddings.shape, np.nan, dtype=np.float32)
    sources = labelled.images.rows.column("source").to_pylist()
    usable = labelled.images.usable
    image_size = record["student"][record["name"]]["image_size"]
    transform = image_transform_v2(PreprocessCfg(**{**record["preprocess"], "size": image_size}), is_train=False)
    student = student.to(device).eval()

    def load(row: int) -> Tensor | None:
        try:
            tensor: Tensor = transform(read_image(images_root / sources[row]))
        except ImageError:
            return None
        return tensor

    batches = [usable[start : start + batch_size].tolist() for start in range(0, len(usable), batch_size)]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool, torch.inference_mode():
        for rows, images in _a_batch_ahead(pool, load, batches):
            read = {row: image for row, image in zip(rows, images) if image is not None}
            if read:
                inputs = torch.stack(list(read.values())).to(device)
                embeddings[list(read)] = student(inputs).float().cpu().numpy()
    return embeddings


def _a_batch_ahead(
    pool: ThreadPoolExecutor, load: Callable[[int], Tensor | None], batches: Sequence[list[int]]
) -> Iterator[tuple[list[int], list[Tensor | None]]]:
    """Load batches in order, each while the one before it is used."""
    pending: deque[list[Future[Tensor | None]]] = deque()
    for i, rows in enumerate(batches):
        for following in batches[i + len(pending) : i + 2]:
            pending.append([pool.submit(load, row) for row in following])
        yield rows, [future.result() for future in pending.popleft()]
