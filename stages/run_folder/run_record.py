"""`run.json`: what a run trains on and how, written before its first step and checked before any later one."""

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...cache.disk.durable import write_json
from ...cache.disk.text_files import read_json
from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ..images.crops import decoder
from ..inputs.image_source import FILES
from ..sample.replay import OWN
from ..settings.distill import DistillSettings
from ..settings.loss_terms import first_losses
from ..settings.models import TEACHER, StudentSettings

RECORD = "run.json"
CHECKPOINT = "checkpoint.pt"

_FREE_TO_CHANGE = {
    "output",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "evaluate_on",
    "workers",
    "device",
    "profile",
    "pixels",
    "views",
}
"""Of `pixels` and `views`, what they came to counts, and is recorded beside the settings."""
_FIXED = ("student", "distill", "cache", "rows", "masks", "row_weights", "pairs", "pixels", "views")
_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "pillow", "numpy")


def describe_run(
    cache: FeatureCache,
    name: str,
    student: StudentSettings,
    settings: DistillSettings,
    *,
    total_steps: int,
    precision: str,
    device: torch.device,
    num_processes: int,
    pixels: str,
    order: dict[str, dict[str, object]],
    views: dict[str, object],
    warm_start: dict[str, Any] | None,
    parameters: dict[str, int],
) -> dict[str, Any]:
    """Everything that a reader, a resumed run or an evaluation needs to know about a run, as JSON values.

    `student`, `distill`, `cache`, `rows`, `masks`, `row_weights`, `pairs`, `pixels` and `views` must not change while
    a run lasts; the rest says where and with what it was made.

    Args:
        pixels: where the pictures come from: `files`, or the setting of those that were kept (`jpeg-256`).
        order: how rows are drawn.
        views: crops of the cache, replayed, or crops that it does not hold.
        warm_start: what the student's weights began with.
        parameters: how many each tower of the student's own has.
    """
    return {
        "name": name,
        "student": {name: student.model_dump(mode="json")},
        "distill": settings.model_dump(mode="json", exclude=_FREE_TO_CHANGE),
        "cache": cache.identity,
        "rows": {"images": len(cache.images.usable), "sentences": len(cache.sentences.usable)},
        "masks": {side: dict(mask) for side, mask in cache.masks.items()},
        "pairs": cache.manifest.pairs_settings if settings.pairs.per_image else None,
        "row_weights": cache.row_weights,
        "pixels": pixels,
        "order": order,
        "views": views,
        "warm_start": warm_start,
        "parameters": parameters,
        "embed_dim": cache.images.embeddings.shape[-1],
        "logit_scale": logit_scale_of(cache, settings),
        "preprocess": cache.teacher["preprocess"],
        "teacher": {key: cache.teacher.get(key) for key in ("model", "pretrained", "weights")},
        "transductive": cache.transductive,
        "total_steps": total_steps,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processes": num_processes,
        "versions": {"dimefm": __version__, **{library: version(library) for library in _LIBRARIES}, **decoder()},
    }


def logit_scale_of(cache: FeatureCache, settings: DistillSettings) -> float:
    """The number that `distill.loss.logit_scale` stands for."""
    setting = settings.loss.logit_scale
    return float(cache.teacher["logit_scale"]) if setting == "teacher" else float(setting)


def write_run_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Write `run.json` durably."""
    write_json(run_dir / RECORD, record)


def read_run_record(run_dir: Path) -> dict[str, Any]:
    """Read `run.json`; InputError if it is missing or damaged."""
    path, wanted = run_dir / RECORD, "the folder of a run of `dimefm distill`"
    record = read_json(path, wanted)
    try:
        _ = record["embed_dim"], record["student"][record["name"]]["model"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); wanted {wanted}") from error
    return dict(record)


def check_same_training(run_dir: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue a run on other terms than it began with: `found` is its record on disk.

    Raises:
        InputError: naming every key that differs.
    """
    before, now = (dict(flat({key: record.get(key) for key in _FIXED})) for record in (found, wanted))
    before = {
        **_what_older_runs_do_not_say(str(wanted["name"])),
        **{key: value for key, value in before.items() if value is not None},
    }
    differences = [
        "another cache, or this one before it grew"
        if key == "cache"
        else f"{key} = {before.get(key)!r}, but this run asks for {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise InputError(
            f"{run_dir}: was trained with {'; '.join(differences)}; choose another distill.output or delete that folder"
        )


def _what_older_runs_do_not_say(student: str) -> dict[str, Any]:
    """Keys that came after a run was begun stand for what it did without them: their defaults."""
    defaults = DistillSettings(loss=first_losses()).model_dump(mode="json", exclude=_FREE_TO_CHANGE)
    since = {"pixels": FILES, "views.policy": OWN, f"student.{student}.text": TEACHER}
    return {**dict(flat({"distill": defaults})), **since}


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables, keys joined by dots."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
