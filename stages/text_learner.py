"""The text tower of a student in training: its optimiser and averages, and what one step does to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import load_weights
from .counter_random import key_of
from .distill_settings import DistillSettings
from .learned_scale import LearnedScale
from .loss_inputs import logit_factor
from .losses import loss_terms
from .mixed_precision import embed
from .optim import build_optimizer, set_lr
from .targets import Targets
from .text_student import build_text_student
from .text_targets import TextTargets
from .world import World


class TextLearner:
    """A text tower that learns the teacher's embeddings of sentences, beside the image tower, which learns its images.

    The two share the step, its rows and the settings, and nothing else: optimiser, clipping, fp16's scale and a learned
    `icl` factor are each tower's own, so an image tower ends with the weights that it gets without a text tower.

    Attributes:
        terms: of the last step, this process's share of each loss, by name.
        loss: of the last step, this process's share of the weighted sum.
        embeddings: of the last step's texts, (n, D), without gradient.
        gradient_norm: of the last step, before clipping; None where nothing is clipped.
        icl_factor: what the last step's `icl` multiplied cosines by; None where that is not learned.
    """

    def __init__(
        self, spec: str, settings: DistillSettings, embed_dim: int, world: World, precision: str, logit_scale: float
    ) -> None:
        """Build a text tower, its weights a function of the run's seed; torch's random state is the caller's to keep.

        Args:
            spec: an open_clip architecture, or the path of a model config (.json).
            precision: `fp32`, `fp16` or `bf16`.

        Raises:
            InputError: if it cannot be built.
        """
        self._settings, self._world = settings, world
        self._precision, self._logit_scale = precision, logit_scale
        torch.manual_seed(key_of(settings.seed, "text student"))
        self.model = build_text_student(spec, embed_dim).to(world.device).train()
        self._optimizer = build_optimizer(self.model, settings)
        self._icl_scale: LearnedScale | None = None
        if settings.loss.icl and settings.temperature.icl_learned:
            self._icl_scale = LearnedScale(logit_factor(logit_scale, settings.temperature.icl), world.device)
            self._optimizer.add_param_group({"params": [self._icl_scale.log], "weight_decay": 0.0})
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.averaged = None if settings.ema is None else ModelEmaV3(self.model, settings.ema, use_warmup=True)
        if settings.compile:
            self.model.compile()
        self._parallel = None if world.size == 1 else DistributedDataParallel(self.model, broadcast_buffers=False)
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

    def learn(self, tokens: Tensor, targets: Targets, lr: float, step: int) -> None:
        """One step. Nothing in it waits for a GPU. Texts go through whole, whatever `accumulate` says of images.

        Args:
            tokens: (n, context_length) int64 ids of this process's texts.
            targets: of the whole step.
            lr: learning rate of this step.
            step: steps that are done after this one.
        """
        set_lr(self._optimizer, lr)
        self._optimizer.zero_grad(set_to_none=True)
        embeddings = embed(self._parallel or self.model, tokens, self._precision)
        self._losses(embeddings, targets).backward()
        self.embeddings = embeddings.detach()
        if self._icl_scale is not None and self._world.size > 1:
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

    def _losses(self, embeddings: Tensor, targets: Targets) -> Tensor:
        """The loss as this process's backward pass wants it: see `Learner`."""
        settings = self._settings
        held = TextTargets(targets, settings.batch_texts, self._world).against(embeddings, self._world)
        factor = None if self._icl_scale is None else self._icl_scale()
        terms = loss_terms(held, settings.loss, settings.temperature, self._logit_scale, factor)
        loss = torch.stack([getattr(settings.loss, name) * term for name, term in terms.items()]).sum()
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.loss = loss.detach()
        self.icl_factor = None if factor is None else factor.detach()
        return self._scaler.scale(loss * self._world.size)

    def tensors(self) -> list[Tensor]:
        """All that must stay finite."""
        values = list(self.model.state_dict().values())
        return values if self._icl_scale is None else [*values, self._icl_scale.log]

    def state(self) -> dict[str, Any]:
        """Its part of a checkpoint."""
        state = {
            "text_model": self.model.state_dict(),
            "text_optimizer": self._optimizer.state_dict(),
            "text_scaler": self._scaler.state_dict(),
        }
        if self.averaged is not None:
            state["text_ema"] = self.averaged.module.state_dict()
        if self._icl_scale is not None:
            state["text_icl_scale"] = self._icl_scale.state_dict()
        return state

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Take up its part of a checkpoint.

        Args:
            path: where that came from, for messages.

        Raises:
            InputError: if it is another tower's.
        """
        state = dict(state)
        load_weights(self.model, state, path, key="text_model")
        if self.averaged is not None:
            load_weights(self.averaged.module, state, path, key="text_ema" if "text_ema" in state else "text_model")
        if self._icl_scale is not None:
            load_weights(self._icl_scale, state, path, key="text_icl_scale")
        self._optimizer.load_state_dict(state["text_optimizer"])
        self._scaler.load_state_dict(state["text_scaler"])
