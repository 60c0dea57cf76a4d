"""The text tower of a student in training: its optimiser and averages, and what one step does to it."""

import torch
from torch import Tensor

from ..counter_random import key_of
from ..models.text_student import build_text_student
from ..profiling import phase
from ..settings.distill import DistillSettings
from .mixed_precision import embed
from .processes import World
from .targets import Targets
from .text_targets import TextTargets
from .tower import Tower


class TextLearner(Tower):
    """A text tower that learns the teacher's embeddings of sentences, beside the image tower, which learns its images.

    The two share the step, its rows and the settings, and nothing else: optimiser, clipping, fp16's scale and a learned
    `icl` factor are each tower's own, so an image tower ends with the weights that it gets without a text tower.
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
        torch.manual_seed(key_of(settings.seed, "text student"))
        model = build_text_student(spec, embed_dim).to(world.device).train()
        super().__init__(model, settings, world, precision, logit_scale)

    def learn(self, tokens: Tensor, targets: Targets, lr: float, step: int) -> None:
        """One step. Nothing in it waits for a GPU. Texts go through whole, whatever `accumulate` says of images.

        Args:
            tokens: (n, context_length) int64 ids of this process's texts.
            targets: of the whole step.
            lr: learning rate of this step.
            step: steps that are done after this one.
        """
        self._begin(lr)
        embeddings = embed(self._parallel or self.model, tokens, self._precision)
        held = TextTargets(targets, self._settings.batch_texts, self._world).against(embeddings, self._world)
        with phase("backward"):
            self._weigh(held).backward()
        self.embeddings = embeddings.detach()
        self._update(step)
