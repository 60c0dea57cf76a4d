"""How a student in training fares: what is logged of a step, and whether it is still sound."""

import torch
from torch import Tensor

from .info_nce import masked_share
from .learner import Learner, Targets
from .losses import effective_candidates, feature_loss
from .settings import DistillSettings
from .similarity_blocks import Rows
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
        `loss`, each loss by its name, `cosine` (mean, student to target), and for each relational loss
        `…_candidates`: how many columns the teacher's softmax spreads over, exp(entropy), mean over the rows. For `icl`
        with a threshold `icl_masked`, the share of other images that are no negatives, and
        `icl_scale`, what it multiplied cosines by, where that is learned.
    """
    shares = {"loss": learner.loss, **learner.terms}
    means = _signs(learner, targets, settings, logit_scale)
    summed = world.sum(torch.stack([*shares.values(), *(value / world.size for value in means.values())]))
    values: dict[str, float] = dict(zip([*shares, *means], summed.tolist()))  # the one moment that waits for a GPU
    if learner.gradient_norm is not None:
        values["gradient_norm"] = learner.gradient_norm.item()
    if learner.icl_factor is not None:
        values["icl_scale"] = learner.icl_factor.item()  # the same in every process
    return values


def _signs(learner: Learner, targets: Targets, settings: DistillSettings, logit_scale: float) -> dict[str, Tensor]:
    assert learner.embeddings is not None
    temperature = settings.temperature
    signs = {"cosine": 1 - feature_loss(learner.embeddings, targets.own)}
    pairs: dict[str, tuple[Tensor, Rows, float]] = {}
    if targets.sentences is not None and targets.all_sentences is not None:
        pairs["vl_candidates"] = targets.own, targets.all_sentences, temperature.vl
        pairs["vl_candidates_sentences"] = targets.sentences, targets.everybodys, temperature.vl
    columns = targets.everybodys if targets.bank is None else (targets.everybodys, targets.bank)
    if settings.loss.pvl:
        pairs["pvl_candidates"] = targets.own, columns, temperature.pvl
    if settings.loss.udist:
        pairs["udist_candidates"] = targets.own, targets.everybodys, temperature.udist
    for key, (rows, over, of) in pairs.items():
        signs[key] = effective_candidates(rows, over, of, logit_scale)
    if settings.loss.icl and settings.loss.icl_threshold is not None:
        signs["icl_masked"] = masked_share(targets.own, columns, targets.first_image, settings.loss.icl_threshold)
    return signs
