"""One student in training: its model, optimiser, averages and random numbers, and what one step does to them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ..counter_random import key_of
from ..models.image_student import build_student
from ..profiling import phase
from ..run_folder.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from ..settings.distill import DistillSettings
from ..settings.models import StudentSettings
from .mixed_precision import embed
from .processes import World
from .targets import Targets
from .text_learner import TextLearner
from .tower import Tower
from .warm_start import WarmStart, warm_start

TEXT = "text_"
"""Keys of a checkpoint that are the text tower's begin so."""


class Learner(Tower):
    """A student that learns; any number of them can learn from the same batches, each as if it were alone.

    Attributes:
        step: steps that it has behind it.
        text: its own text tower, learning beside it, or None. What else is said here is said of the image tower.
        warm: what its weights began with, or None.
        terms: of the last step, this process's share of each loss, by name.
        loss: of the last step, this process's share of the weighted sum, over both towers.
        embeddings: of the last step's images, (B, D), without gradient.
        gradient_norm: of the last step, before clipping; None where nothing is clipped.
        icl_factor: what the last step's `icl` multiplied cosines by; None where that is not learned.
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
            InputError: if the student cannot be built, or its first weights not be read.
        """
        self.step, self._processes_before = 0, world.size
        torch.manual_seed(key_of(settings.seed, "student"))
        model = build_student(student.model, embed_dim, student.image_size)
        self.warm: WarmStart | None = None
        if fresh and student.init is not None:
            self.warm = warm_start(model, student.model, student.init, student.image_size)
        model = model.to(world.device).train()
        if world.size > 1 and world.device.type == "cuda":  # refuses the CPU, where each process keeps its own
            model = share_batch_statistics(model)
        # Channels last, as images are: convolutions gain up to twofold.
        super().__init__(model.to(memory_format=torch.channels_last), settings, world, precision, logit_scale)
        if world.rank:
            torch.manual_seed(key_of(settings.seed, "student", world.rank))  # another dropout for other images
        self._random = random_state(world.device)
        self.text: TextLearner | None = None
        if student.own_text is not None:
            self.text = TextLearner(student.own_text, settings, embed_dim, world, precision, logit_scale)

    def weights_to_use(self) -> tuple[str, dict[str, dict[str, Tensor]]]:
        """What counts outside of training: `ema` or `model`, and those weights, of its text tower as `text_model`."""
        towers: dict[str, Tower] = {"model": self}
        if self.text is not None:
            towers["text_model"] = self.text
        weights = {
            name: tower.model if tower.averaged is None else tower.averaged.module for name, tower in towers.items()
        }
        return "model" if self.averaged is None else "ema", {name: one.state_dict() for name, one in weights.items()}

    def notes(self) -> Iterator[str]:
        """What the person should know before it learns."""
        if self.warm is not None:
            yield self.warm.line
        now, before = self._world.size, self._processes_before
        if now != before:
            yield (
                f"trained by {before} processes before, by {now} now: it goes on with the same batches, but no longer "
                "repeats bit for bit"
            )
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        apart = now if self._world.device.type != "cuda" else 1  # GPUs share the statistics of their processes
        parts = apart * len(torch.empty(self._settings.batch_images // now).chunk(self._settings.accumulate))
        if norms and parts > 1:
            yield f"has batch norms: their statistics are those of {parts} parts of the batch each, not of the whole"

    def learn(self, images: Tensor, inputs: Targets, lr: float, tokens: Tensor | None = None) -> None:
        """One step. Nothing in it waits for a GPU.

        Args:
            images: (B, 3, S, S) float32, normalised: this process's.
            inputs: what the images' embeddings are held against.
            lr: learning rate of this step.
            tokens: (n, context_length) int64, of this process's texts; wanted where it has a text tower.
        """
        with self._own_random_numbers():
            self._begin(lr)
            self._add_gradients(images, inputs)
            self.step += 1
            self._update(self.step)
            if self.text is not None:
                assert tokens is not None, "a text tower wants texts"
                self.text.learn(tokens, inputs, lr, self.step)
                self.loss = self.loss + self.text.loss

    def _add_gradients(self, images: Tensor, inputs: Targets) -> None:
        pieces = images.chunk(self._settings.accumulate)
        if len(pieces) == 1:
            embeddings = self._embed(images)
            with phase("backward"):
                self._losses(embeddings, inputs).backward()
            self.embeddings = embeddings.detach()
            return
        # The losses compare every image with all the others: embed all of them first, ask the losses what each
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
        with phase("backward"):
            self._losses(embeddings, inputs).backward()
        assert embeddings.grad is not None
        gradients = embeddings.grad.split([len(piece) for piece in pieces])
        for i, (piece, gradient, state) in enumerate(zip(pieces, gradients, states)):
            restore_random_state(state, self._world.device)
            last = i == len(pieces) - 1
            with phase("backward"), nullcontext() if last or self._parallel is None else self._parallel.no_sync():
                self._embed(piece).backward(gradient)
        self.embeddings = embeddings.detach()

    def _embed(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        return embed(model or self._parallel or self.model, images, self._precision)

    def _losses(self, embeddings: Tensor, inputs: Targets) -> Tensor:
        return self._weigh(inputs.against(embeddings, self._world))

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Draw dropout and the like from this student's own generator, wherever the process's stands."""
        restore_random_state(self._random, self._world.device)
        yield
        self._random = random_state(self._world.device)

    def is_finite(self) -> bool:
        """Whether every weight is a number, in every process: batch statistics may be a process's own."""
        values = self.tensors() + ([] if self.text is None else self.text.tensors())
        sound = torch.stack([value.isfinite().all() for value in values]).all()
        return bool(self._world.least(sound.int()))

    def save(self, path: Path) -> None:
        """Write its state; all processes take part, the first one writes."""
        state = {"step": self.step, **self.state(), "random": self._world.gather_objects(self._random)}
        if self.text is not None:
            state |= self.text.state(TEXT)
        if self._world.is_first:
            save_checkpoint(path, state)

    def restore(self, path: Path) -> None:
        """Take up a saved state.

        Raises:
            InputError: if it is damaged or another student's.
        """
        state = load_checkpoint(path)
        self.take_up(state, path)
        if self.text is not None:
            self.text.take_up(state, path, TEXT)
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
