"""Batches of stage two: augmented views from the images, targets and sentences from the cache, some steps ahead.

Threads are enough: Pillow lets go of the interpreter lock while it reads, decodes and resizes. Which thread makes what
and when changes nothing, since every view and every order is a function of (seed, row, pass).
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.errors import InputError
from ..cache.feature_cache import EmbeddingSet
from .augment import NUM_UNIFORMS, ViewMaker
from .counter_random import uniforms
from .images import ImageError, read_file
from .order import Draw, Stream

_IMAGES_A_TASK = 16
_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Batch:
    """What one step trains on; everything is on the CPU.

    Attributes:
        step: from 0.
        rows: (B,) int64 image rows.
        images: (B, S, S, 3) uint8 views.
        targets: (B, D) float16 teacher embeddings of the images, as emitted.
        sentences: (N, D) float16 teacher embeddings of the step's sentences; None where no loss wants any.
        wait_s: seconds that the training loop waited for this batch.
    """

    step: int
    rows: NDArray[np.int64]
    images: Tensor
    targets: Tensor
    sentences: Tensor | None
    wait_s: float


class BatchLoader:
    """Makes batches in threads, a few steps ahead. Use it in a `with` block, which ends the threads."""

    def __init__(
        self,
        images: tuple[EmbeddingSet, Stream],
        sentences: tuple[EmbeddingSet, Stream] | None,
        images_root: Path,
        views: ViewMaker,
        view_key: int,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """A loader that has not started yet.

        Args:
            images: the cached images and the order in which they are drawn.
            sentences: the same of the sentences, or None.
            images_root: folder that the image rows are relative to.
            views: makes the views.
            view_key: key that all views of the run derive from.
            workers: threads; 0 takes one for each core.
            pin_memory: put tensors where a GPU can fetch them from on its own.

        Raises:
            InputError: if the folder of images is missing.
        """
        if not images_root.is_dir():
            raise InputError(f"{images_root}: no such folder; stage two needs the images that stage one embedded")
        self._images, self._image_stream = images
        self._sentences = sentences
        self._root, self._views, self._view_key, self._pin = images_root, views, view_key, pin_memory
        # One flat column: gathering the names of a batch touches no other row.
        self._sources = self._images.rows.column("source").cast(pa.large_string()).combine_chunks()
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="batches")

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps `first_step` … `end_step - 1`, in order.

        Raises:
            InputError: if an image can no longer be read. Training on another one instead would break exact resuming.
        """
        pending: deque[_Pending] = deque()
        next_step = first_step
        for step in range(first_step, end_step):
            while next_step < min(step + _BATCHES_AHEAD, end_step):
                pending.append(self._start(next_step))
                next_step += 1
            began = time.perf_counter()
            ready = pending.popleft()
            for view_task in ready.views:
                view_task.result()
            targets, sentences = ready.embeddings.result()
            wait_s = time.perf_counter() - began
            yield Batch(step, ready.draw.rows, ready.images, targets, sentences, wait_s)

    def _start(self, step: int) -> "_Pending":
        draw = self._image_stream.draw(step)
        side = self._views.image_size
        images = torch.empty((len(draw.rows), side, side, 3), dtype=torch.uint8, pin_memory=self._pin)
        embeddings = self._pool.submit(self._gather, draw, step)
        numbers = uniforms(self._view_key, draw.rows, draw.passes, NUM_UNIFORMS).tolist()
        sources = self._sources.take(pa.array(draw.rows)).to_pylist()
        views = [
            self._pool.submit(self._fill, images.numpy(), draw.rows, sources, numbers, start)
            for start in range(0, len(draw.rows), _IMAGES_A_TASK)
        ]
        return _Pending(draw, images, views, embeddings)

    def _fill(
        self,
        images: NDArray[np.uint8],
        rows: NDArray[np.int64],
        sources: list[str],
        numbers: list[list[float]],
        start: int,
    ) -> None:
        for i in range(start, min(start + _IMAGES_A_TASK, len(rows))):
            path = self._root / sources[i]
            try:
                images[i] = self._views.view(read_file(path), numbers[i])
            except ImageError as error:
                raise InputError(
                    f"{path}: row {rows[i]} can no longer be used ({error}), but stage one embedded it; "
                    "put the file back, then run again"
                ) from error

    def _gather(self, draw: Draw, step: int) -> tuple[Tensor, Tensor | None]:
        targets = self._tensor(self._images.embeddings[draw.rows])
        if self._sentences is None:
            return targets, None
        sentences, stream = self._sentences
        return targets, self._tensor(sentences.embeddings[stream.draw(step).rows])

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin else tensor


@dataclass(frozen=True)
class _Pending:
    draw: Draw
    images: Tensor
    views: list[Future[None]]
    embeddings: Future[tuple[Tensor, Tensor | None]]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn views into a student's input, on whatever device they are.

    Args:
        images: (B, S, S, 3) uint8.
        mean, std: (3,) float32, of values between 0 and 1.

    Returns:
        (B, 3, S, S) float32 (in memory still channels last, which convolutions like).
    """
    return ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
