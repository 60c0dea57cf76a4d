"""How a student in training fares: what is logged of a step, and whether it is still sound."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from ..losses.dime import feature_loss
from ..settings.distill import DistillSettings
from .learner import Learner
from .processes import World
from .targets import Targets
from .text_targets import TextTargets
from .tower import Tower

Value = TypeVar("Value")


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
        thing: `gradient_norm`, before clipping; `gradient_scale`, fp16's; `icl_scale`, the learned one. Of a text tower
        the same with `text_` before the name; `loss` is over both towers.
    """
    text = learner.text
    shares = {"loss": learner.loss, **learner.terms}
    assert learner.embeddings is not None
    means = {"cosine": 1 - feature_loss(learner.embeddings, targets.own), **targets.signs(settings, logit_scale)}
    if text is not None and text.embeddings is not None:
        held = TextTargets(targets, settings.batch_texts, world)
        shares |= {"text_loss": text.loss, **_of_text(text.terms)}
        means["text_cosine"] = 1 - feature_loss(text.embeddings, held.own)
        means |= _of_text(held.signs(settings, logit_scale))
    summed = world.sum(torch.stack([*shares.values(), *(value / world.size for value in means.values())]))
    values: dict[str, float] = dict(zip([*shares, *means], summed.tolist()))  # the one moment that waits for a GPU
    if math.isnan(values.get("pairs_cosine", 0.0)):
        del values["pairs_cosine"]  # no image of the step had a candidate
    values |= _numbers_of(learner)
    if text is not None:
        values |= _of_text(_numbers_of(text))
    return values


def _numbers_of(tower: Tower) -> dict[str, float]:
    """What is the same in every process."""
    values: dict[str, float] = {}
    if tower.gradient_norm is not None and math.isfinite(norm := tower.gradient_norm.item()):
        values["gradient_norm"] = norm  # fp16 leaves out the steps where it is not finite, and lowers its scale
    if tower.gradient_scale is not None:
        values["gradient_scale"] = tower.gradient_scale
    if tower.icl_factor is not None:
        values["icl_scale"] = tower.icl_factor.item()
    return values


def _of_text(values: dict[str, Value]) -> dict[str, Value]:
    return {f"text_{name}": value for name, value in values.items()}
