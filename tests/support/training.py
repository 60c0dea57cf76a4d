"""Training as tests want it: one student in one process, its images in a folder."""

from pathlib import Path
from typing import Any

import torch

from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.stages.inputs.image_source import ImageFiles
from dimefm.stages.run_folder.checkpoint import load_checkpoint
from dimefm.stages.run_folder.run_record import CHECKPOINT
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.dev_scores import DevScores
from dimefm.stages.train.learner import Learner
from dimefm.stages.train.loop import train
from dimefm.stages.train.processes import open_world
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
        source = ImageFiles(images, cache.images)
        if settings.evaluate_every:
            folder, prompts = images.parent / "dev", PROMPTS
            options["dev"] = DevScores(cache, settings.evaluate_on, folder, world.device, workers=1, prompts=prompts)
        (result,) = train(cache, source, [Run("own", student, run_dir)], settings, world, **options)
    return result


def gradients_of(learner: Learner) -> dict[str, torch.Tensor]:
    """The last step's, of everything that a learner learns."""
    learned = dict(learner.model.named_parameters())
    if learner._icl_scale is not None:
        learned["icl_scale"] = learner._icl_scale.log
    if learner.text is not None:
        learned |= {f"text.{name}": parameter for name, parameter in learner.text.model.named_parameters()}
        if learner.text._icl_scale is not None:
            learned["text.icl_scale"] = learner.text._icl_scale.log
    return {name: parameter.grad.clone() for name, parameter in learned.items()}


def weights_of(run_dir: Path, key: str = "model") -> dict[str, torch.Tensor]:
    """The student's weights in its checkpoint: its image tower's, or what else has a key there."""
    return load_checkpoint(run_dir / CHECKPOINT)[key]
