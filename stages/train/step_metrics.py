"""What is logged of a training step, and the first step whose loss was not finite."""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..losses.dime import feature_loss
from .processes import World
from .student import TEXT, Student
from .targets import Targets
from .tower import Tower

Value = TypeVar("Value")


class FirstNotFinite:
    """Remembers the first step whose loss was not finite, on the device, so that no step waits for a GPU."""

    def __init__(self, total_steps: int, world: World) -> None:
        self._none, self._world = total_steps, world
        self._step = torch.tensor(total_steps, device=world.device)

    def update(self, step: int, loss: Tensor) -> None:
        """Note a step, from 0, if its loss is bad and none was before."""
        self._step = torch.where(loss.isfinite(), self._step, self._step.clamp(max=step))

    def read(self) -> int | None:
        """The first bad step in any process, the same answer in all of them; None if there is none."""
        step = int(self._world.least(self._step))
        return step if step < self._none else None


def read_metrics(
    student: Student, targets: Targets, logit_scale: float, num_texts: int, world: World
) -> dict[str, float]:
    """The losses of the last step and its diagnostics, over all processes.

    Args:
        num_texts: texts of the whole step.

    Returns:
        `loss`, each loss by its name, `cosine` (mean, student to target) and `Targets.diagnostics`. Where there is such
        a thing: `gradient_norm`, before clipping; `gradient_scale`, fp16's; `icl_scale` and its like, learned ones. Of
        a text tower the same with `text_` before the name; `loss` is over both towers.
    """
    shares: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for prefix, tower in zip(("", TEXT), student.towers):
        held = targets.of_texts(num_texts) if prefix else targets
        assert tower.embeddings is not None
        of_tower = {"cosine": 1 - feature_loss(tower.embeddings, held.inputs.local_teacher)}
        of_tower |= held.diagnostics(tower.losses, logit_scale)
        shares |= _named(prefix, {"loss": tower.loss, **tower.terms})
        means |= _named(prefix, of_tower)
        numbers |= _named(prefix, _numbers_of(tower))
    shares["loss"] = student.loss
    summed = world.sum(torch.stack([*shares.values(), *(value / world.size for value in means.values())]))
    values: dict[str, float] = dict(zip([*shares, *means], summed.tolist()))  # the one moment that waits for a GPU
    if math.isnan(values.get("pairs_cosine", 0.0)):
        del values["pairs_cosine"]  # no image of the step had a candidate
    return values | numbers


def _numbers_of(tower: Tower) -> dict[str, float]:
    """What is the same in every process."""
    values: dict[str, float] = {}
    if tower.gradient_norm is not None and math.isfinite(norm := tower.gradient_norm.item()):
        values["gradient_norm"] = norm  # fp16 leaves out the steps where it is not finite, and lowers its scale
    if tower.gradient_scale is not None:
        values["gradient_scale"] = tower.gradient_scale
    return values | {f"{name}_scale": factor.item() for name, factor in tower.factors.items()}


def _named(prefix: str, values: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{prefix}{name}": value for name, value in values.items()}
