"""Training as tests want it: one student in one process, its images in a folder."""

import json
from pathlib import Path
from typing import Any

import torch

from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.run_folder.checkpoint import load_checkpoint
from dimefm.stages.run_folder.run_record import CHECKPOINT
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.dev_scores import DevScores
from dimefm.stages.train.loop import train
from dimefm.stages.train.processes import open_world
from dimefm.stages.train.student import Student
from dimefm.stages.train.student_run import Run, TrainResult

TIMES = {"images_per_s", "step_s", "wait_s", "compute_s", "data_wait", "flops_per_s"}
"""Keys of a line of metrics that no run repeats."""

PROMPTS = [["a red thing", "red"], ["a green thing"], ["a blue thing"]]
"""Of the small cache's classes, for students with a text tower of their own."""


def train_one(
    cache: FeatureCache,
    images: Path,
    student: StudentSettings,
    settings: DistillSettings,
    run_dir: Path,
    **options: Any,
) -> TrainResult:
    """Train the student `own`; where it is to be scored, on the images of `dev/` beside the others."""
    with open_world(settings.device) as world:
        source = ImageFolder(images)
        if settings.evaluate_every:
            folder, prompts = images.parent / "dev", PROMPTS
            options["dev"] = DevScores(cache, settings.evaluate_on, folder, world.device, workers=1, prompts=prompts)
        (result,) = train(cache, source, [Run("own", student, run_dir)], settings, world, **options)
    return result


def lines_of(run_dir: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's log, without what no run repeats."""
    read = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read]


def gradients_of(student: Student) -> dict[str, torch.Tensor]:
    """The last step's, of everything that a student learns."""
    learned = {}
    for prefix, tower in zip(("", "text."), student.towers):
        learned |= {f"{prefix}{name}": parameter for name, parameter in tower.model.named_parameters()}
        learned |= {f"{prefix}{name}_scale": scale.log for name, scale in tower.scales.items()}
    return {name: parameter.grad.clone() for name, parameter in learned.items() if parameter.grad is not None}


def weights_of(run_dir: Path, key: str = "model") -> dict[str, torch.Tensor]:
    """The student's weights in its checkpoint: its image tower's, or what else has a key there."""
    return load_checkpoint(run_dir / CHECKPOINT)[key]
