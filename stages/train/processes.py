"""The processes of one training run: one alone, or several that torchrun started, each with a device of its own."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...cache.disk.cores import usable_cores
from ...cache.errors import InputError
from ..devices import resolve_device

PATIENCE = timedelta(days=7)
"""How long processes wait for what the first one does alone; for all else torch's own limits hold, some minutes."""


class World:
    """What a process knows about the run's other processes; one process alone is a world of its own.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: of this process.
    """

    def __init__(
        self, device: torch.device, rank: int = 0, size: int = 1, votes: Any = None, patient: Any = None
    ) -> None:
        """Use `open_world`.

        Args:
            votes: a group over the CPU, so that a vote never waits for a GPU.
            patient: another one, whose members wait for each other as long as `PATIENCE`.
        """
        self.device, self.rank, self.size, self._votes, self._patient = device, rank, size, votes, patient

    def share_of_cores(self, workers: int) -> int:
        """Loader workers of this process: the setting, or its share of the cores of this machine."""
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1
        return workers or max(1, usable_cores() // on_this_machine)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """Everybody's rows, in the order of ranks, without a gradient: (n, …) of each -> (size * n, …)."""
        return rows if self.size == 1 else _all_gather(rows, self.size)

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """As `gather`, and the gradient of a row is the sum of its gradients in all processes.

        The loss of the run is the sum of what every process computes from all rows, so a row's gradient has a part in
        each of them.
        """
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self.size)
        return gathered

    def wait_for_device(self) -> None:
        """Until all that was given to this process's GPU is done; on the CPU nothing ever waits."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wait_for_first(self) -> None:
        """Until the first process is here, too: after what it did alone, which may have taken longer than a step."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self._patient)

    def sum(self, numbers: Tensor) -> Tensor:
        """Element by element over all processes."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def least(self, numbers: Tensor) -> Tensor:
        """The smallest over all processes, element by element."""
        return self._reduced(numbers, dist.ReduceOp.MIN)

    def gather_objects(self, thing: Any) -> list[Any]:
        """What each process has, in the order of ranks; through the CPU, for small things."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self._votes)
        return things

    def stop_vote(self) -> "StopVote":
        """A vote on whether to stop that costs no step its time."""
        return StopVote(self.size, self._votes)

    def _reduced(self, numbers: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            numbers = numbers.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(numbers, operation)
        return numbers


class StopVote:
    """Decides, for all processes at once, whether one of them was asked to stop.

    Processes see a signal at different steps, but must leave the loop after the same one: a vote is cast after each
    step and counted after the next, when it has long been on its way.
    """

    def __init__(self, size: int, group: Any) -> None:
        self._size, self._group = size, group
        self._pending: tuple[Tensor, Any] | None = None

    def cast(self, asked: bool) -> bool:
        """Cast this step's vote; returns what was decided, the same in every process."""
        if self._size == 1:
            return asked
        decided = False
        if self._pending is not None:
            votes, arriving = self._pending
            arriving.wait()
            decided = bool(votes.item())
        votes = torch.tensor(int(asked))
        self._pending = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return decided


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did.

    Args:
        device: the setting; under torchrun, `auto` and `cuda` give each process of a machine the GPU of its own number.

    Raises:
        InputError: if there is no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:  # some clusters set the one for every job
        yield World(resolve_device(device))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    on_gpus = device != "cpu" and torch.cuda.device_count() > 0
    if on_gpus and device.startswith("cuda:"):
        raise InputError(f"distill.device = {device!r}: {size} processes cannot share one GPU; wanted 'auto'")
    own = resolve_device(f"cuda:{local}" if on_gpus else device)
    if on_gpus:
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if on_gpus else "gloo", device_id=own if on_gpus else None)
    try:
        votes = dist.new_group(backend="gloo") if on_gpus else None
        yield World(own, rank, size, votes, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


def data_parallel(model: nn.Module, *, has_unused: bool) -> DistributedDataParallel:
    """A model whose gradients are the mean over all processes; each process keeps its own statistics.

    Args:
        has_unused: whether some of its parameters get no gradient, which the others would wait for.
    """
    keep_apart: dict[str, Any] = {_SYNC_BUFFERS: False}
    return DistributedDataParallel(model, find_unused_parameters=has_unused, **keep_apart)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process of the run has ended; that one reports the cause."""
    told = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in told)
    )


# torch 2.13 renamed the one, torch 2.14 the other.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_gather(rows: Tensor, size: int) -> Tensor:
    pieces = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(pieces, rows.contiguous())
    return torch.cat(pieces)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, size: int) -> Tensor:
        return _all_gather(rows.detach(), size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous())
        return own, None
