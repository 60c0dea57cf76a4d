"""Batches on their way from the loader to the device that trains."""

from collections.abc import Generator, Iterable
from dataclasses import replace

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
            copied = replace(
                batch,
                images=tuple(view.to(device, non_blocking=True) for view in batch.images),
                targets=batch.targets.to(device, non_blocking=True),
                sentences=_copy(batch.sentences, device),
                bank=_copy(batch.bank, device),
                other_views=_copy(batch.other_views, device),
                sentence_cosines=_copy(batch.sentence_cosines, device),
                sampling=None
                if batch.sampling is None
                else batch.sampling.map(lambda part: part.to(device, non_blocking=True)),
                tokens={name: ids.to(device, non_blocking=True) for name, ids in batch.tokens.items()},
                wait_s=0.0 if was_busy else batch.wait_s,
            )
        using = torch.cuda.current_stream(device)
        using.wait_stream(stream)
        weights = () if copied.sampling is None else copied.sampling.tensors()
        of_sentences = copied.sentences, copied.sentence_cosines, *weights, *copied.tokens.values()
        for tensor in (*copied.images, copied.targets, *of_sentences, copied.bank, copied.other_views):
            if tensor is not None:
                tensor.record_stream(using)  # its memory is not handed out again while the step uses it
        yield copied
        given = using.record_event()


def _copy(rows: Tensor | None, device: torch.device) -> Tensor | None:
    return None if rows is None else rows.to(device, non_blocking=True)
