"""One tower in training: its model, optimiser, average and scales, and what a step does to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..losses.loss_inputs import LossInputs, logit_factor
from ..losses.terms import loss_terms
from ..profiling import phase
from ..run_folder.checkpoint import load_weights
from ..settings.distill import DistillSettings
from .learned_scale import LearnedScale
from .optim import build_optimizer, set_lr
from .processes import World


class Tower:
    """A model that learns. What it embeds, and what that is held against, is for those who derive from it.

    Attributes:
        averaged: a running average of its weights, or None.
        terms: of the last step, this process's share of each loss, by name.
        loss: of the last step, this process's share of the weighted sum.
        embeddings: of the last step's rows, (B, D), without gradient.
        gradient_norm: of the last step, before clipping; None where nothing is clipped.
        icl_factor: what the last step's `icl` multiplied cosines by; None where that is not learned.
    """

    def __init__(
        self, model: nn.Module, settings: DistillSettings, world: World, precision: str, logit_scale: float
    ) -> None:
        """Get a model ready to learn.

        Args:
            model: on its device, in training mode.
            precision: `fp32`, `fp16` or `bf16`.
        """
        self.model, self._settings, self._world = model, settings, world
        self._precision, self._logit_scale = precision, logit_scale
        self._optimizer = build_optimizer(model, settings)
        self._icl_scale: LearnedScale | None = None
        if settings.loss.icl and settings.temperature.icl_learned:
            self._icl_scale = LearnedScale(logit_factor(logit_scale, settings.temperature.icl), world.device)
            self._optimizer.add_param_group({"params": [self._icl_scale.log], "weight_decay": 0.0})
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.averaged = None if settings.ema is None else ModelEmaV3(model, settings.ema, use_warmup=True)
        if settings.compile:
            model.compile()  # in place: the names of the weights stay
        self._parallel = None if world.size == 1 else DistributedDataParallel(model, broadcast_buffers=False)
        self.terms: dict[str, Tensor] = {}
        self.loss = torch.tensor(torch.nan)
        self.embeddings: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.icl_factor: Tensor | None = None

    @property
    def gradient_scale(self) -> float | None:
        """What fp16 multiplies the loss by; None in other formats."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _begin(self, lr: float) -> None:
        """Forget the gradients of the step before."""
        set_lr(self._optimizer, lr)
        self._optimizer.zero_grad(set_to_none=True)

    @phase("losses")
    def _weigh(self, held: LossInputs) -> Tensor:
        """The loss as this process's backward pass wants it."""
        settings = self._settings
        factor = None if self._icl_scale is None else self._icl_scale()
        terms = loss_terms(held, settings.loss, settings.temperature, self._logit_scale, factor)
        loss = torch.stack([getattr(settings.loss, name) * term for name, term in terms.items()]).sum()
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.loss = loss.detach()
        self.icl_factor = None if factor is None else factor.detach()
        # DistributedDataParallel takes the mean of the processes' gradients; the shares of a loss add up.
        return self._scaler.scale(loss * self._world.size)

    @phase("optimiser")
    def _update(self, step: int) -> None:
        """Change the weights by the gradients that are there.

        Args:
            step: steps that are done after this one.
        """
        if self._icl_scale is not None and self._world.size > 1:
            # It is nothing that DistributedDataParallel knows: the same mean over the processes, by hand.
            gradient = self._icl_scale.log.grad
            assert gradient is not None
            self._icl_scale.log.grad = self._world.sum(gradient) / self._world.size
        if self._settings.clip_grad_norm is not None:
            self._scaler.unscale_(self._optimizer)
            self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._icl_scale is not None:
            self._icl_scale.keep_within_bounds()
        if self.averaged is not None:
            self.averaged.update(self.model, step)

    def tensors(self) -> list[Tensor]:
        """All that must stay finite."""
        values = list(self.model.state_dict().values())
        return values if self._icl_scale is None else [*values, self._icl_scale.log]

    def state(self, prefix: str = "") -> dict[str, Any]:
        """Its part of a checkpoint, under keys that begin so."""
        state = {"model": self.model.state_dict()}
        state |= {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        if self.averaged is not None:
            state["ema"] = self.averaged.module.state_dict()
        if self._icl_scale is not None:
            state["icl_scale"] = self._icl_scale.state_dict()
        return {f"{prefix}{key}": value for key, value in state.items()}

    def take_up(self, state: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        """Take up its part of a checkpoint.

        Args:
            path: where that came from, for messages.

        Raises:
            InputError: if it is another model's.
        """
        whole, model, ema = dict(state), f"{prefix}model", f"{prefix}ema"
        load_weights(self.model, whole, path, key=model)
        if self.averaged is not None:
            load_weights(self.averaged.module, whole, path, key=ema if ema in whole else model)
        if self._icl_scale is not None:
            load_weights(self._icl_scale, whole, path, key=f"{prefix}icl_scale")
        self._optimizer.load_state_dict(whole[f"{prefix}optimizer"])
        self._scaler.load_state_dict(whole[f"{prefix}scaler"])
