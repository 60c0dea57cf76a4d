"""How a student in training fares: what is logged of a step, and whether it is still sound."""

import math

import torch
from torch import Tensor

from .distill_settings import DistillSettings
from .learner import Learner
from .losses import feature_loss
from .targets import Targets
from .world import World


class FirstBad:
    """Remembers the first step whose loss was not finite, on the device: no step waits to be told."""

    def __init__(self, total_steps: int, world: World) -> None:
        self._none, self._world = total_steps, world
        self._step = torch.tensor(total_steps, device=world.device)

    def look(self, step: int, loss: Tensor) -> None:
        """Note a step, from 0, if its loss is bad and none was before."""
        self._step = torch.where(loss.isfinite(), self._step, self._step.clamp(max=step))

    def read(self) -> int | None:
        """The first bad step in any process, the same answer in all of them; None if there is none."""
        step = int(self._world.least(self._step))
        return step if step < self._none else None


def read_metrics(
    learner: Learner, targets: Targets, settings: DistillSettings, logit_scale: float, world: World
) -> dict[str, float]:
    """The losses of the last step and its signs of health, over all processes.

    Returns:
        `loss`, each loss by its name, `cosine` (mean, student to target) and `Targets.signs`. Where there is such a
        thing: `gradient_norm`, before clipping; `gradient_scale`, fp16's; `icl_scale`, the learned one.
    """
    shares = {"loss": learner.loss, **learner.terms}
    assert learner.embeddings is not None
    means = {"cosine": 1 - feature_loss(learner.embeddings, targets.own), **targets.signs(settings, logit_scale)}
    summed = world.sum(torch.stack([*shares.values(), *(value / world.size for value in means.values())]))
    values: dict[str, float] = dict(zip([*shares, *means], summed.tolist()))  # the one moment that waits for a GPU
    if math.isnan(values.get("pairs_cosine", 0.0)):
        del values["pairs_cosine"]  # no image of the step had a candidate
    if learner.gradient_norm is not None and math.isfinite(norm := learner.gradient_norm.item()):
        values["gradient_norm"] = norm  # fp16 leaves out the steps where it is not finite, and lowers its scale
    if learner.gradient_scale is not None:
        values["gradient_scale"] = learner.gradient_scale
    if learner.icl_factor is not None:
        values["icl_scale"] = learner.icl_factor.item()  # the same in every process
    return values
