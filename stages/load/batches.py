"""Batches of stage two: augmented views from the images, targets and sentences from the cache, some steps ahead.

Which worker makes what and when changes nothing, since every view and every order is a function of (seed, row, pass).
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.reader.feature_cache import EmbeddingSet
from ..images.views import ViewMaker
from ..inputs.image_source import ImageSource, row_keys
from ..losses.loss_inputs import SamplingWeights
from ..profiling import phase
from ..sample.order import Draw, Drawn
from ..sample.replay import Replay
from .workers import ViewPool

_BATCHES_AHEAD = 3
"""Batches whose views are in the making. Two more are held: the one that is trained on and the next."""

_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32, "int64": torch.int64}


Tokens = Callable[[NDArray[np.int64]], Mapping[str, Tensor]]
"""Makes token ids of sentences, (n,) rows of them, for each text tower."""


@dataclass(frozen=True)
class Batch:
    """What one step trains on; everything is on the CPU and the caller's own.

    Attributes:
        step: from 0.
        rows: (B,) int64 image rows.
        images: for each view maker (B, S, S, 3) uint8 views.
        targets: (B, D) float16 teacher embeddings of the images, as emitted: of the very view, where it is one of the
            cache's, else of the centre.
        sentences: (N, D) float16 teacher embeddings of the step's sentences; None where no loss wants any.
        bank: (M, D) float16 teacher embeddings of further images; None where no loss wants any.
        other_views: (B · (n - 1), D) float16 teacher embeddings of the images' other replayed crops; None where no loss
            wants any.
        tokens: for each text tower that is trained, by what it is built from, (n, its context length) int64 token ids
            of the step's texts.
        wait_s: seconds that the training loop waited for this batch.
        views: (B,) int64, which of the cache's views each image is; None where views are made here.
        sentence_cosines: (N,) float32, of a retrieved sentence to the image that brought it, NaN of others; None where
            nothing is retrieved.
        sampling: what makes up for sentences that are drawn more often than others; None is nothing.
    """

    step: int
    rows: NDArray[np.int64]
    images: tuple[Tensor, ...]
    targets: Tensor
    sentences: Tensor | None
    bank: Tensor | None
    tokens: Mapping[str, Tensor]
    wait_s: float
    views: NDArray[np.int64] | None = None
    sentence_cosines: Tensor | None = None
    sampling: SamplingWeights | None = None
    other_views: Tensor | None = None

    def map(self, do: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch, each of its tensors as `do` makes it."""
        mapped: Batch = _map_tensors(self, do)
        return mapped


def _map_tensors(value: Any, do: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(one, do) for one in value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(one, do) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _map_tensors(getattr(value, one.name), do) for one in fields(value)})
    return value


class BatchLoader:
    """Makes batches a few steps ahead. Use it in a `with` block, which starts the workers and ends them."""

    def __init__(
        self,
        images: EmbeddingSet,
        image_stream: Drawn,
        pixels: ImageSource,
        views: Sequence[ViewMaker],
        view_key: int,
        sentences: tuple[EmbeddingSet, Drawn] | None = None,
        bank: Drawn | None = None,
        other_views: Replay | None = None,
        texts: tuple[Tokens, Drawn] | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        *,
        processes: bool | None = None,
    ) -> None:
        """A loader that has not started yet.

        Args:
            images: the cached images.
            image_stream: the order in which they are drawn; every draw has as many rows as that of step 0.
            pixels: where their files' bytes come from.
            views: makers of one or several kinds of views, which all come from one reading of each image.
            view_key: key that all views derive from: the run's, or that of the cache's crops where `image_stream` says
                which of them are taken.
            sentences: the cached sentences and the order in which they are drawn, or None.
            bank: the order in which further image rows are drawn, whose targets alone are wanted, or None.
            other_views: what the images' other crops are taken from, whose targets alone are wanted, or None.
            texts: what makes token ids of sentence rows, and the order in which these are drawn, or None.
            workers: how many read, decode and augment; 0 takes one for each core that this process may use.
            pin_memory: put tensors where a GPU can fetch them from on its own.
            processes: whether workers are processes or threads; None lets their number decide.
        """
        self._images, self._image_stream, self._keys = images, image_stream, row_keys(pixels, images.rows)
        self._sentences, self._bank, self._texts, self._pin = sentences, bank, texts, pin_memory
        self._other_views = other_views
        batch = len(image_stream.draw(0).rows)
        self._pool = ViewPool(pixels, views, view_key, batch, _BATCHES_AHEAD, workers, processes)
        self._background: ThreadPoolExecutor

    @property
    def num_workers(self) -> int:
        """How many make views."""
        return self._pool.num_workers

    def __enter__(self) -> "BatchLoader":
        self._pool.__enter__()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="batches")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.__exit__()
        self._background.shutdown(cancel_futures=True)

    def batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps `first_step` … `end_step - 1`, in order. One such iteration at a time.

        Raises:
            InputError: if an image can no longer be read (training on another one instead would break exact resuming),
                or a worker process was killed.
        """
        making = self._make(range(first_step, end_step))
        coming = self._background.submit(next, making, None)
        try:
            while True:
                began = time.perf_counter()
                with phase("data"):
                    batch = coming.result()
                if batch is None:
                    return
                coming = self._background.submit(next, making, None)
                yield replace(batch, wait_s=time.perf_counter() - began)
        finally:
            self._pool.stop()  # an iteration that is left early waits for no view that nobody wants
            if not coming.cancelled():  # as it is where the loader was closed before this iteration
                coming.exception()
            making.close()
            self._pool.go_on()

    def _make(self, steps: range) -> Generator[Batch, None, None]:
        """All batches, in the background: each is finished when it is asked for, while workers are on those after."""
        upcoming = iter(steps)
        free = deque(range(_BATCHES_AHEAD))
        started = deque(self._start(step, free.popleft()) for step in islice(upcoming, _BATCHES_AHEAD))
        try:
            while started:
                batch = self._finish(started[0])
                free.append(started.popleft().slot)
                started.extend(self._start(step, free.popleft()) for step in islice(upcoming, 1))
                yield batch
        finally:
            self._pool.abandon([task for one in started for task in one.tasks])

    def _start(self, step: int, slot: int) -> "_Started":
        draw = self._image_stream.draw(step)
        numbers = draw.passes if draw.views is None else draw.views
        tasks = self._pool.start(slot, draw.rows, numbers, self._keys(draw.rows))
        return _Started(step, slot, draw, tasks)

    def _finish(self, one: "_Started") -> Batch:
        targets = self._gather(self._images, one.draw)
        bank = None if self._bank is None else self._gather(self._images, self._bank.draw(one.step))
        sentences = cosines = sampling = None
        if self._sentences is not None:
            draw = self._sentences[1].draw(one.step)
            sentences = self._gather(self._sentences[0], draw)
            cosines = None if draw.cosines is None else self._tensor(draw.cosines)
            if draw.weights is not None:
                of = draw.weights
                sampling = SamplingWeights(*(self._tensor(part) for part in (of.sentences, of.places, of.values)))
        tokens = {} if self._texts is None else self._texts[0](self._texts[1].draw(one.step).rows)
        if self._pin:
            tokens = {name: ids.pin_memory() for name, ids in tokens.items()}
        for task in one.tasks:
            task.result()
        return Batch(
            one.step,
            one.draw.rows,
            images=tuple(self._tensor(views) for views in self._pool.slots[one.slot]),
            targets=targets,
            sentences=sentences,
            bank=bank,
            tokens=tokens,
            wait_s=0.0,
            views=one.draw.views,
            sentence_cosines=cosines,
            sampling=sampling,
            other_views=self._gather_others(one.draw),
        )

    def _gather(self, embeddings: EmbeddingSet, draw: Draw) -> Tensor:
        if draw.views is None:
            return self._tensor(embeddings.embeddings[draw.rows])
        assert embeddings.views is not None
        return self._tensor(embeddings.views.at(draw.rows, draw.views))

    def _gather_others(self, draw: Draw) -> Tensor | None:
        if self._other_views is None:
            return None
        assert self._images.views is not None
        return self._tensor(self._other_views.others(draw, self._images.views))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        """A copy of its own, so that a batch lives as long as its user wants."""
        own = torch.empty(array.shape, dtype=_DTYPES[array.dtype.name], pin_memory=self._pin)
        np.copyto(own.numpy(), array)
        return own


@dataclass(frozen=True)
class _Started:
    step: int
    slot: int
    draw: Draw
    tasks: list[Future[None]]


@phase("copy")
def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn views into a student's input, on whatever device they are.

    Args:
        images: (B, S, S, 3) uint8.
        mean, std: (3,) float32, of values between 0 and 1.

    Returns:
        (B, 3, S, S) float32 (in memory still channels last, which convolutions like).
    """
    return ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
