"""Losses as tests want them: random embeddings, and the terms of a step by what the config says."""

import torch

from dimefm.stages.losses.loss_inputs import LossInputs
from dimefm.stages.losses.terms import load_losses, loss_terms
from dimefm.stages.settings.loss_terms import LossSettings, TemperatureSettings, active_losses


def embeddings(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers, a function of shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def terms_of(
    inputs: LossInputs, loss: LossSettings, temperature: TemperatureSettings, logit_scale: float
) -> dict[str, torch.Tensor]:
    """This process's share of each loss that is on."""
    return loss_terms(inputs, load_losses(active_losses(loss, temperature)), logit_scale)
