"""A student tried on every kind of batch that it will meet, before its first step: what would fail there fails here.

A student may be another model while it trains (auxiliary heads, batch norms), and the last piece of a batch may be a
single image. Weights, statistics, counters and random numbers stay as they are.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ...cache.errors import InputError
from ..models.tower_check import require_embeddings
from ..models.weights_file import one_line
from ..settings.distill import DistillSettings
from ..settings.models import STUDENTS, StudentSettings
from .processes import World, is_lost_peer

_KNOWN = (TimmModel, VisionTransformer, ModifiedResNet)
"""What `timm:` and `open_clip:` students are built of."""
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""What a forward pass is cast to, by the run's precision."""


def piece_sizes(settings: DistillSettings, world: World) -> list[int]:
    """Images of each piece of a step that goes through a student at once, in one process."""
    return [len(piece) for piece in torch.empty(settings.batch_images // world.size).chunk(settings.accumulate)]


def try_step(
    model: nn.Module, student: StudentSettings, embed_dim: int, settings: DistillSettings, world: World, precision: str
) -> bool:
    """A forward and backward pass of two images, and of one where a step has such a piece.

    A student from outside is tried with pieces of all sizes that a step has, and scores one image.

    Args:
        model: on its device, as it will be trained, not compiled yet.

    Returns:
        Whether some of its parameters have no part in an embedding, and so get no gradient.

    Raises:
        InputError: if it fails, emits anything but (B, embed_dim) finite numbers, or has nothing to learn.
    """
    shown, pieces = student.model, set(piece_sizes(settings, world))
    is_own = shown.partition(":")[0] not in STUDENTS
    sizes = pieces if is_own else {1} & pieces
    halves = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.float16]
    if halves and precision == "fp16":
        raise InputError(
            f"{shown}: has weights in float16, which distill.precision = 'fp16' cannot scale; keep float32"
        )

    def pictures(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        side = student.image_size
        return torch.randn(number, 3, side, side, generator=generator).to(world.device)

    what = f"images of {student.image_size} x {student.image_size} pixels"
    with torch.autocast(world.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
        has_unused = _learn(model, pictures(2), embed_dim, shown, what, world)
        for size in sorted(sizes - {2}):
            try:
                _learn(model, pictures(size), embed_dim, shown, what, world)
            except InputError as error:
                raise InputError(f"{_piece(size, settings, world)}: {error}") from error
        if is_own:
            with _on_trial(model, world) as trial:
                require_embeddings(trial, pictures(1), embed_dim, shown, what)
    return has_unused


def _learn(model: nn.Module, images: Tensor, embed_dim: int, shown: str, what: str, world: World) -> bool:
    with _on_trial(model, world) as trial:
        output = require_embeddings(trial, images, embed_dim, shown, f"{what} while it trains", training=True)
        if not output.requires_grad:
            raise InputError(f"{shown}: its embeddings depend on no weight that learns; wanted some with a gradient")
        try:
            output.float().square().mean().backward()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or is_lost_peer(error):
                raise
            raise InputError(f"{shown}: passes no gradient back ({one_line(error)})") from error
        return any(parameter.requires_grad and parameter.grad is None for parameter in trial.parameters())


@contextmanager
def _on_trial(model: nn.Module, world: World) -> Iterator[nn.Module]:
    """A copy of a model; or, where that fails, the model itself, its statistics and gradients put back afterwards.

    timm's and open_clip's models have nothing else that a pass changes, and copies of their many modules take time.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        trial = model if isinstance(model, _KNOWN) else copy.deepcopy(model)
    except Exception:  # a user's own module may refuse in any way
        trial = model
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        yield trial
    if trial is model:
        model.zero_grad(set_to_none=True)
        for buffer, value in zip(model.buffers(), before):
            buffer.copy_(value)


def _piece(size: int, settings: DistillSettings, world: World) -> str:
    shared = "" if world.size == 1 else f" in each of {world.size} processes"
    images = f"{size} image" + "s" * (size > 1)
    return (
        f"distill.batch_images = {settings.batch_images} and distill.accumulate = {settings.accumulate} give pieces of "
        f"{images}{shared}, which do not suit this student; raise the one or lower the other"
    )
