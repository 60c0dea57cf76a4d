"""Embedding images: encoded images in, embeddings out, one shard at a time.

Batches start at multiples of the batch size and are always full, the last one padded: the last bits of an embedding
depend on the shape of its batch, and so a shard comes out the same whether or not a run was interrupted before it.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.disk.cores import usable_cores
from ..devices import memory_errors_as
from ..images.crops import Crop, Crops
from ..images.decode import AbsentError, ImageError, decode_image
from ..inputs.image_source import ImageSource
from ..models.teacher import ImageTeacher, out_of_memory
from ..profiling import first_batches_traced, phase
from .pack_pixels import ShardPack, make_small
from .tasks import PackTask

BATCHES_IN_FLIGHT = 3
"""Batches that are being decoded, wait for the model or are on it; bounds the memory. Where an image has several views,
these are rounds: a batch of each view, from one decoding of each image; then only two of them are held."""

NOT_FINITE = "the teacher's output is not finite"
BEYOND_FLOAT16 = "beyond float16"

Lock = AbstractContextManager[object]
Prepare = Callable[[int], Callable[[], Tensor]]
"""Starts work on the batch whose first row this is; what it returns waits for the end of that work."""


@dataclass(frozen=True)
class ShardResult:
    """Embeddings of one shard.

    Attributes:
        embeddings: (n, D) float16 as the teacher emits them, before normalisation; rows without one are NaN. With
            crops (n, 1 + K, D), the centre first.
        failures: (position in the shard, reason), in order; rows that were given as None are not among them.
        absent: (position, reason) of images that could not be reached; these are not failures yet.
        seconds: `read`, `decode` (of sentences: tokenising) and `keep` (making images small, where they are kept),
            summed over threads; `wait`, the model idle for want of data; `infer`, forward passes with their copies.
    """

    embeddings: np.ndarray
    failures: list[tuple[int, str]]
    seconds: dict[str, float]
    absent: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class RowCrops:
    """Crops of the images of one shard.

    Attributes:
        rows: (n,) row numbers of the shard's images: what the crops are a function of.
    """

    crops: Crops
    rows: NDArray[np.int64]


def embed_image_shard(
    teacher: ImageTeacher,
    source: ImageSource,
    keys: Sequence[Any | None],
    batch_size: int,
    workers: int,
    lock: Lock,
    pack: ShardPack | None = None,
    crops: RowCrops | None = None,
) -> ShardResult:
    """Embed images. One that cannot be read is embedded as black, so that shapes stay, and then marked.

    Each image is decoded once. The batches of its centre are those that there are without crops; a batch of each crop
    of the same images follows each, so that what comes out does not depend on where an earlier run was interrupted.

    Args:
        keys: of the shard's images in their source; None where it is known that there is nothing to read.
        batch_size: rows of every forward pass.
        workers: threads that read and decode; 0 takes one for each core.
        lock: held while the model runs. The first batches are started before it is asked for, so that a shard gets
            ready while another one has the device.
        pack: gets every image that was decoded, made small.
        crops: what is embedded beside the centre of each image; None for the centre alone.

    Raises:
        InputError: if a batch does not fit into the device's memory.
    """
    num_views = 1 + crops.crops.count if crops else 1
    rows = ShardRows(len(keys), (num_views, teacher.embed_dim) if crops else (teacher.embed_dim,))
    seconds = {"read": 0.0, "decode": 0.0} | ({"keep": 0.0} if pack else {})
    in_flight = 2 if crops else BATCHES_IN_FLIGHT
    on_gpu = teacher.device.type == "cuda"
    # Used in turn: fresh pinned memory costs more time than it saves.
    buffers = deque(
        torch.empty(num_views, batch_size, *teacher.image_size, 3, dtype=torch.uint8, pin_memory=on_gpu)
        for _ in range(min(in_flight, -(-len(keys) // batch_size)))
    )
    with ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="decode") as pool:

        def prepare(first: int) -> Callable[[], Tensor]:
            buffer = buffers[0]
            buffers.rotate(-1)
            batch = [*keys[first : first + batch_size]]
            batch += [None] * (batch_size - len(batch))
            row_of = crops.rows[first : first + batch_size].tolist() if crops else []
            loading = [
                pool.submit(
                    _load,
                    teacher,
                    source,
                    key,
                    buffer.numpy()[:, i],
                    pack.task if pack else None,
                    partial(crops.crops.of_row, row_of[i]) if crops and i < len(row_of) else None,
                )
                for i, key in enumerate(batch)
            ]

            def finish() -> Tensor:
                for row, future in enumerate(loading, start=first):
                    loaded = future.result()
                    seconds["read"] += loaded.read_s
                    seconds["decode"] += loaded.decode_s
                    if loaded.failed:
                        rows.reasons[row] = loaded.reason
                        if loaded.absent:
                            rows.absent.add(row)
                    elif pack:
                        seconds["keep"] += loaded.keep_s
                        pack.add(row, loaded.small)
                return buffer

            return finish

        def encode(batch: Tensor) -> Tensor:
            views = [phase("forward")(teacher.encode_images)(phase("copy")(teacher.normalise)(view)) for view in batch]
            return torch.stack(views, dim=1) if crops else views[0]

        def take(first: int, block: np.ndarray) -> None:
            rows.take(first, block)
            if pack:  # only now it is known which rows the teacher failed on
                pack.write(range(first, min(first + batch_size, len(keys))), rows.reasons.__contains__)

        try:
            seconds |= run_batches(teacher, range(0, len(keys), batch_size), prepare, encode, take, lock, in_flight)
        finally:
            pool.shutdown(cancel_futures=True)
    return rows.result(seconds)


@dataclass
class ShardRows:
    """Embeddings of a shard as they come, and the rows that have none: a reason, or None if it is known elsewhere.

    A row that the teacher fails on in one view has no embedding in any.

    Attributes:
        absent: those of them whose image could not be reached.
    """

    num_rows: int
    row_shape: tuple[int, ...]
    reasons: dict[int, str | None] = field(default_factory=dict)
    absent: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.embeddings = np.full((self.num_rows, *self.row_shape), np.nan, np.float16)

    def take(self, first: int, block: np.ndarray) -> None:
        block = block[: self.num_rows - first]
        with np.errstate(over="ignore"):
            halves = block.astype(np.float16)
        for row in np.flatnonzero(~np.isfinite(halves.reshape(len(halves), -1)).all(axis=1)):
            reason = BEYOND_FLOAT16 if np.isfinite(block[row]).all() else NOT_FINITE
            self.reasons.setdefault(first + int(row), reason)
        self.embeddings[first : first + len(block)] = halves

    def result(self, seconds: dict[str, float]) -> ShardResult:
        self.embeddings[[row for row in self.reasons if row < self.num_rows]] = np.nan
        reasons = sorted((row, reason) for row, reason in self.reasons.items() if reason is not None)
        failures = [item for item in reasons if item[0] not in self.absent]
        return ShardResult(self.embeddings, failures, seconds, [item for item in reasons if item[0] in self.absent])


@dataclass(frozen=True)
class _Loaded:
    read_s: float = 0.0
    decode_s: float = 0.0
    keep_s: float = 0.0
    small: bytes = b""
    failed: bool = False
    reason: str | None = None
    absent: bool = False


def _load(
    teacher: ImageTeacher,
    source: ImageSource,
    key: Any | None,
    pixels: NDArray[np.uint8],
    pack: PackTask | None,
    crops_of: Callable[[tuple[int, int]], list[Crop]] | None,
) -> _Loaded:
    """Fill one row of a batch of each view, and make its image small for its pack, all from one decoding.

    It runs in a thread and uses no torch, whose own threads would multiply there.

    Args:
        pixels: (views, height, width, 3), where the row goes.
        crops_of: crops of an image of this (width, height).
    """
    started = opened = time.perf_counter()
    reason, absent = None, False
    try:
        if key is not None:
            with phase("read"):
                data = source.read(key)
            opened = time.perf_counter()
            with phase("decode"):
                image = decode_image(data)
            with phase("crop"):
                pixels[0] = teacher.crop(image)
                for view, crop in enumerate(crops_of(image.size) if crops_of else [], start=1):
                    pixels[view] = teacher.view(image, crop)
            decoded = time.perf_counter()
            small = b"" if pack is None else make_small(data, image, pack.side, note_size=pack.note_size)
            return _Loaded(opened - started, decoded - opened, time.perf_counter() - decoded, small)
    except ImageError as error:
        reason, absent = str(error), isinstance(error, AbsentError)
    pixels[:] = 0
    return _Loaded(opened - started, time.perf_counter() - opened, failed=True, reason=reason, absent=absent)


def run_batches(
    teacher: ImageTeacher,
    firsts: range,
    prepare: Prepare,
    encode: Callable[[Tensor], Tensor],
    take: Callable[[int, np.ndarray], None],
    lock: Lock,
    in_flight: int = BATCHES_IN_FLIGHT,
) -> dict[str, float]:
    """Every batch through the model in order, a few of them in preparation; returns seconds of `wait` and `infer`."""
    upcoming = iter(firsts)
    pending = deque((first, prepare(first)) for first in islice(upcoming, in_flight))
    wait_s = infer_s = 0.0
    with lock, first_batches_traced() as batch_done:
        while pending:
            first, finish = pending.popleft()
            started = time.perf_counter()
            with phase("wait"):
                batch = finish()
            ready = time.perf_counter()
            with memory_errors_as(out_of_memory(teacher, firsts.step)):
                block = encode(batch).numpy()
            done = time.perf_counter()
            batch_done()
            wait_s, infer_s = wait_s + ready - started, infer_s + done - ready
            pending.extend((later, prepare(later)) for later in islice(upcoming, 1))
            take(first, block)
    return {"wait": wait_s, "infer": infer_s}
