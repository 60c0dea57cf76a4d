"""One student in training: an image tower, perhaps a text tower beside it, and their random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ..counter_random import key_of
from ..losses.terms import load_losses
from ..models.image_student import build_student
from ..models.plausible import scale_remark
from ..models.text_student import build_text_student
from ..run_folder.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from ..settings.distill import DistillSettings
from ..settings.models import StudentSettings
from .processes import World
from .targets import Targets
from .tower import Tower
from .trial_step import piece_sizes, try_step
from .warm_start import WarmStart, warm_start

TEXT = "text_"
"""Keys of a checkpoint that are the text tower's begin so."""


class Student:
    """A student that learns; any number of them can learn from the same batches, each as if it were alone.

    Its towers share the step, its rows and the settings, and nothing else: optimiser, clipping, fp16's scale and
    learned factors are each tower's own, so an image tower ends with the weights that it gets without a text tower.

    Attributes:
        image: its image tower.
        text: its own text tower, or None.
        step: steps that it has behind it.
        warm: what the weights of its image tower began with, or None.
    """

    def __init__(
        self,
        student: StudentSettings,
        settings: DistillSettings,
        embed_dim: int,
        world: World,
        precision: str,
        logit_scale: float,
        *,
        fresh: bool,
    ) -> None:
        """Build a student, its weights a function of the run's seed.

        Args:
            precision: `fp32`, `fp16` or `bf16`.
            fresh: whether a run begins, and `student.init` counts; otherwise `restore` follows.

        Raises:
            InputError: if the student cannot be built, its first weights not be read, a loss not be imported, or a
                step's pieces do not suit the student.
        """
        self.step, self._processes_before = 0, world.size
        self._settings, self._world, self._logit_scale = settings, world, logit_scale
        losses = load_losses(settings.losses)
        torch.manual_seed(key_of(settings.seed, "student"))
        model = build_student(student.model, embed_dim, student.image_size)
        self.warm: WarmStart | None = None
        if fresh and student.init is not None:
            self.warm = warm_start(model, student.model, student.init, student.image_size)
        model = model.to(world.device).train()
        if world.size > 1 and world.device.type == "cuda":  # refuses the CPU, where each process keeps its own
            model = share_batch_statistics(model)
        # Channels last, as images are: convolutions gain up to twofold.
        model = model.to(memory_format=torch.channels_last)
        has_unused = try_step(model, student, embed_dim, settings, world, precision)
        self.image = Tower(
            model, losses, settings, world, precision, logit_scale, settings.accumulate, has_unused=has_unused
        )
        if world.rank:
            torch.manual_seed(key_of(settings.seed, "student", world.rank))  # another dropout for other images
        self._random = random_state(world.device)
        self.text: Tower | None = None
        if student.own_text is not None:
            torch.manual_seed(key_of(settings.seed, "text student"))
            model = build_text_student(student.own_text, embed_dim).to(world.device).train()
            of_texts = [loss for loss in losses if "views" not in loss.settings.wants]
            self.text = Tower(model, of_texts, settings, world, precision, logit_scale)

    @property
    def loss(self) -> Tensor:
        """This process's share of the last step's weighted sum, over both towers."""
        return self.image.loss if self.text is None else self.image.loss + self.text.loss

    @property
    def towers(self) -> list[Tower]:
        return [self.image] if self.text is None else [self.image, self.text]

    def chosen_weights(self) -> tuple[str, dict[str, dict[str, Tensor]]]:
        """What counts outside of training: `ema` or `model`, and those weights, of its text tower as `text_model`."""
        weights = {f"{prefix}model": tower.best_weights.state_dict() for prefix, tower in zip(("", TEXT), self.towers)}
        return "model" if self.image.averaged is None else "ema", weights

    def notes(self) -> Iterator[str]:
        """What the person should know before it learns."""
        if self.warm is not None:
            yield self.warm.line
        now, before = self._world.size, self._processes_before
        remark = scale_remark(self._logit_scale, "distill.loss.logit_scale")
        if remark and self._settings.loss.logit_scale == "teacher":
            yield f"the teacher's {remark}"
        if now != before:
            yield (
                f"trained by {before} processes before, by {now} now: it goes on with the same batches, but no longer "
                "repeats bit for bit"
            )
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.image.model.modules())
        apart = now if self._world.device.type != "cuda" else 1  # GPUs share the statistics of their processes
        parts = apart * len(piece_sizes(self._settings, self._world))
        if norms and parts > 1:
            yield f"has batch norms: their statistics are those of {parts} parts of the batch each, not of the whole"

    def learn(self, images: Tensor, targets: Targets, lr: float, tokens: Tensor | None = None) -> None:
        """One step. Nothing in it waits for a GPU.

        Args:
            images: (B, 3, S, S) float32, normalised: this process's.
            targets: what the images' embeddings are compared to.
            lr: learning rate of this step.
            tokens: (n, context_length) int64, of this process's texts; wanted where it has a text tower. Texts go
                through whole, whatever `accumulate` says of images.
        """
        with self._own_random_numbers():
            self.step += 1
            self.image.learn(images, targets, lr, self.step)
            if self.text is not None:
                assert tokens is not None, "a text tower wants texts"
                self.text.learn(tokens, targets.of_texts(self._settings.batch_texts), lr, self.step)

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Draw dropout and the like from this student's own generator, wherever the process's stands."""
        restore_random_state(self._random, self._world.device)
        yield
        self._random = random_state(self._world.device)

    def is_finite(self) -> bool:
        """Whether every weight is a number, in every process: batch statistics may be a process's own."""
        sound = torch.stack([value.isfinite().all() for tower in self.towers for value in tower.tensors()]).all()
        return bool(self._world.least(sound.int()))

    def save(self, path: Path) -> None:
        """Write its state; all processes take part, the first one writes."""
        state = {"step": self.step, **self.image.state(), "random": self._world.gather_objects(self._random)}
        if self.text is not None:
            state |= self.text.state(TEXT)
        if self._world.is_first:
            save_checkpoint(path, state)

    def restore(self, path: Path) -> None:
        """Load a saved state.

        Raises:
            InputError: if it is damaged or another student's.
        """
        state = load_checkpoint(path)
        for prefix, tower in zip(("", TEXT), self.towers):
            tower.load_state(state, path, prefix)
        self.step = int(state["step"])
        of_ranks = state["random"] if isinstance(state["random"], list) else [state["random"]]
        self._processes_before = len(of_ranks)
        if len(of_ranks) == self._world.size:
            self._random = of_ranks[self._world.rank]
        else:
            torch.manual_seed(key_of(self._settings.seed, "student", self._world.rank, self.step))
            self._random = random_state(self._world.device)


def share_batch_statistics(model: nn.Module) -> nn.Module:
    """Make batch norms take their statistics over all processes: timm's way, torch's drops activations inside norms."""
    converted: nn.Module = convert_sync_batchnorm(model)
    return converted
