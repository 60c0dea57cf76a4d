"""One tower in training: its model, optimiser, averaged weights and learned scales, and what a step does to them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..losses.loss_inputs import logit_factor
from ..losses.terms import Loss, loss_terms
from ..profiling import phase
from ..run_folder.checkpoint import load_weights, random_state, restore_random_state
from ..settings.distill import DistillSettings
from .optim import build_optimizer, set_lr
from .processes import World, data_parallel
from .targets import Targets
from .trial_step import AUTOCAST

_LARGEST_SCALE = 100.0  # CLIP's bound (Radford et al., ICML 2021, section 2.5): beyond it training was unstable


class LearnedScale(nn.Module):
    """A factor above 0 that a loss multiplies cosines by, learned through its logarithm as CLIP's logit scale is.

    A module so that it is saved like one; it is no part of the student, and nothing that is exported needs it.
    """

    def __init__(self, start: float, device: torch.device) -> None:
        """Begin with `start`: logit scale / temperature."""
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start), dtype=torch.float32, device=device))
        self._largest = math.log(max(_LARGEST_SCALE, start))

    def forward(self) -> Tensor:
        """The factor, a float32 scalar that passes gradients on."""
        return self.log.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep it to 100 at most, or to what it began with if that was more."""
        self.log.clamp_(max=self._largest)


class Tower:
    """An image or a text tower that learns.

    Attributes:
        model: the tower.
        averaged: a running average of its weights, or None.
        losses: those that it learns from.
        scales: learned factors, by the loss's name.
        terms: of the last step, this process's share of each loss, by name.
        loss: of the last step, this process's share of the weighted sum.
        embeddings: of the last step's rows, (B, D), without gradient.
        gradient_norm: of the last step, before clipping; None where nothing is clipped.
        factors: what the last step's losses multiplied cosines by, where that is learned, by the loss's name.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Sequence[Loss],
        settings: DistillSettings,
        world: World,
        precision: str,
        logit_scale: float,
        pieces: int = 1,
        *,
        has_unused: bool = False,
    ) -> None:
        """Prepare a model for training.

        Args:
            model: on its device, in training mode.
            precision: `fp32`, `fp16` or `bf16`.
            pieces: that a batch goes through the model in, one after the other.
            has_unused: whether some of its parameters get no gradient.
        """
        self.model, self.losses, self._settings, self._world = model, losses, settings, world
        self._precision, self._logit_scale, self._pieces = precision, logit_scale, pieces
        self._optimizer = build_optimizer(model, settings)
        self.scales: dict[str, LearnedScale] = {}
        for loss in losses:
            if loss.settings.learned and loss.settings.temperature is not None:
                scale = LearnedScale(logit_factor(logit_scale, loss.settings.temperature), world.device)
                self._optimizer.add_param_group({"params": [scale.log], "weight_decay": 0.0})
                self.scales[loss.settings.name] = scale
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.averaged = None if settings.ema is None else ModelEmaV3(model, settings.ema, use_warmup=True)
        if settings.compile:
            model.compile()  # in place: the names of the weights stay
        self._parallel = None if world.size == 1 else data_parallel(model, has_unused=has_unused)
        self.terms: dict[str, Tensor] = {}
        self.loss = torch.tensor(torch.nan)
        self.embeddings: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.factors: dict[str, Tensor] = {}

    @property
    def gradient_scale(self) -> float | None:
        """What fp16 multiplies the loss by; None in other formats."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def best_weights(self) -> nn.Module:
        """The model whose weights count outside of training: the averaged one, where there is one."""
        return self.model if self.averaged is None else self.averaged.module

    def learn(self, batch: Tensor, targets: Targets, lr: float, step: int) -> None:
        """One step. Nothing in it waits for a GPU.

        Args:
            batch: this process's rows, as the model takes them.
            targets: what their embeddings are compared to.
            lr: learning rate of this step.
            step: steps that are done after this one.
        """
        set_lr(self._optimizer, lr)
        self._optimizer.zero_grad(set_to_none=True)
        self.add_gradients(batch, targets)
        self._update(step)

    @phase("backward")  # which the phases inside of it are no part of
    def add_gradients(self, batch: Tensor, targets: Targets) -> None:
        """Add the gradients of the losses of a batch to the parameters'."""
        pieces = batch.chunk(self._pieces)
        if len(pieces) == 1:
            embeddings = self._embed(batch)
            loss = self._weighted_loss(embeddings, targets)
            loss.backward()
            self.embeddings = embeddings.detach()
            return
        # The losses compare every row with all the others: embed all of them first, ask the losses what each
        # embedding should change, then embed piece by piece again, with gradient (GradCache, arXiv 2101.06983).
        before = [buffer.clone() for buffer in self.model.buffers()]
        states, embedded = [], []
        with torch.no_grad():
            for piece in pieces:
                states.append(random_state(self._world.device))
                embedded.append(self._embed(piece, self.model))
            for buffer, value in zip(self.model.buffers(), before):
                buffer.copy_(value)  # batch norms count each image once
        embeddings = torch.cat(embedded).requires_grad_()
        loss = self._weighted_loss(embeddings, targets)
        loss.backward()
        assert embeddings.grad is not None
        gradients = embeddings.grad.split([len(piece) for piece in pieces])
        for i, (piece, gradient, state) in enumerate(zip(pieces, gradients, states)):
            restore_random_state(state, self._world.device)
            last = i == len(pieces) - 1
            with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
                self._embed(piece).backward(gradient)
        self.embeddings = embeddings.detach()

    def tensors(self) -> list[Tensor]:
        """All that must stay finite."""
        return [*self.model.state_dict().values(), *(scale.log for scale in self.scales.values())]

    def state(self, prefix: str = "") -> dict[str, Any]:
        """Its part of a checkpoint, under keys that begin so."""
        state = {"model": self.model.state_dict()}
        state |= {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        if self.averaged is not None:
            state["ema"] = self.averaged.module.state_dict()
        state |= {f"{name}_scale": scale.state_dict() for name, scale in self.scales.items()}
        return {f"{prefix}{key}": value for key, value in state.items()}

    def load_state(self, state: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        """Load its part of a checkpoint.

        Args:
            path: where that came from, for messages.

        Raises:
            InputError: if it is another model's.
        """
        whole, model, ema = dict(state), f"{prefix}model", f"{prefix}ema"
        load_weights(self.model, whole, path, key=model)
        if self.averaged is not None:
            load_weights(self.averaged.module, whole, path, key=ema if ema in whole else model)
        for name, scale in self.scales.items():
            load_weights(scale, whole, path, key=f"{prefix}{name}_scale")
        self._optimizer.load_state_dict(whole[f"{prefix}optimizer"])
        self._scaler.load_state_dict(whole[f"{prefix}scaler"])

    @phase("forward")
    def _embed(self, batch: Tensor, model: nn.Module | None = None) -> Tensor:
        """(B, D) embeddings under autocast, as float32 at least."""
        model = model or self._parallel or self.model
        with torch.autocast(batch.device.type, AUTOCAST.get(self._precision), enabled=self._precision in AUTOCAST):
            embeddings: Tensor = model(batch)
        # Once, here: each loss would cast for itself, and gradients would be rounded for each and added in few bits.
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    @phase("losses")
    def _weighted_loss(self, embeddings: Tensor, targets: Targets) -> Tensor:
        """The loss as this process's backward pass wants it."""
        factors = {name: scale() for name, scale in self.scales.items()}
        terms = loss_terms(targets.against(embeddings), self.losses, self._logit_scale, factors)
        loss = torch.stack([loss.settings.weight * terms[loss.settings.name] for loss in self.losses]).sum()
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.loss = loss.detach()
        self.factors = {name: factor.detach() for name, factor in factors.items()}
        # DistributedDataParallel takes the mean of the processes' gradients; the shares of a loss add up.
        return self._scaler.scale(loss * self._world.size)

    @phase("optimiser")
    def _update(self, step: int) -> None:
        """Change the weights by their gradients."""
        if self._world.size > 1:
            for scale in self.scales.values():
                # DistributedDataParallel does not know it: the same mean over the processes, by hand.
                assert scale.log.grad is not None
                scale.log.grad = self._world.sum(scale.log.grad) / self._world.size
        if self._settings.clip_grad_norm is not None:
            self._scaler.unscale_(self._optimizer)
            self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        for scale in self.scales.values():
            scale.clamp()
        if self.averaged is not None:
            self.averaged.update(self.model, step)
