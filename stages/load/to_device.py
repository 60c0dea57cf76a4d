"""Batches on their way from the loader to the device that trains."""

from collections.abc import Generator, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..profiling import phase
from .batches import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """Copy batches to the device they are trained on.

    On a GPU the copy has a stream of its own: the host is a step ahead of the GPU, so the copy of a batch runs beside
    the computing of the one before it. For the same reason the host may wait for a batch while the GPU still has work;
    `wait_s` is then 0, for nobody waited.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    given: torch.cuda.Event | None = None
    for batch in batches:
        was_busy = given is not None and not given.query()
        with phase("copy"), torch.cuda.stream(stream):
            copied = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
        using = torch.cuda.current_stream(device)
        using.wait_stream(stream)
        copied.map(partial(_in_use, stream=using))
        if was_busy:
            copied = replace(copied, wait_s=0.0)
        yield copied
        given = using.record_event()


def _in_use(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)  # its memory is not handed out again while the step uses it
    return tensor
