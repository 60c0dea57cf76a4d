"""Batches on their way from the loader to the device that trains."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batches import Batch


@dataclass(frozen=True)
class DeviceBatch:
    """A `Batch`, on the device.

    Attributes:
        step: from 0.
        rows: (B,) int64 image rows, on the CPU.
        images: for each kind of view, (B, S, S, 3) uint8.
        targets: (B, D) float16 teacher embeddings of the images.
        sentences: (N, D) float16, or None.
        bank: (M, D) float16 teacher embeddings of images that are not in the batch, or None.
        wait_s: seconds that training waited for the loader.
    """

    step: int
    rows: NDArray[np.int64]
    images: tuple[Tensor, ...]
    targets: Tensor
    sentences: Tensor | None
    bank: Tensor | None
    wait_s: float


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[DeviceBatch]:
    """Copy batches to the device they are trained on.

    On a GPU the copy has a stream of its own: the host is a step ahead of the GPU, so the copy of a batch runs beside
    the computing of the one before it.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = DeviceBatch(
                batch.step,
                batch.rows,
                tuple(view.to(device, non_blocking=True) for view in batch.images),
                batch.targets.to(device, non_blocking=True),
                None if batch.sentences is None else batch.sentences.to(device, non_blocking=True),
                None if batch.bank is None else batch.bank.to(device, non_blocking=True),
                batch.wait_s,
            )
        if stream is not None:
            using = torch.cuda.current_stream(device)
            using.wait_stream(stream)
            for tensor in (*copied.images, copied.targets, copied.sentences, copied.bank):
                if tensor is not None:
                    tensor.record_stream(using)  # its memory is not handed out again while the step uses it
        yield copied
