"""The workers that make views: threads of this process, or processes that share memory with it.

Python's lock lets all threads of a process together make a few thousand views a second, so many workers are processes.
A fork server starts them, which has loaded this file and what it imports: no worker inherits the student, the cache or
a GPU. They write views into anonymous shared memory, which is gone with its last user. They leave Ctrl-C and SIGTERM to
the trainer, and end when it is gone.

Why not torch's DataLoader, which is as fast: its workers import torch. Four of them take 640 MiB, started by a fork
server that has loaded all they need (380 MiB as forks of the trainer, whose GPU and threads they then inherit); these
take 160 MiB (`benchmarks/loader_memory.py --dataloader`). It reports an unreadable image by a worker's traceback and a
killed worker by its process number, and the first batch takes as long as a single worker needs for it.
"""

import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, context, resource_tracker
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.cores import usable_cores
from ...cache.errors import DimefmError, InputError
from ..counter_random import uniforms
from ..images.crops import NUM_UNIFORMS
from ..images.decode import ImageError
from ..images.views import ViewMaker, make_views
from ..inputs.image_source import ImageSource

MOST_THREADS = 2
"""Up to here threads do as well as processes, and start at once."""
_IMAGES_A_TASK = 16, 64
"""At least and at most: telling a worker what to do costs about as much as one small image."""
_ALIGN = 4096
_PATIENCE_S = 10.0
"""How long a worker process may take to end by itself."""

Slots = list[list[NDArray[np.uint8]]]
"""For each batch in the making, for each kind of view, (B, S, S, 3)."""


@dataclass(frozen=True)
class _Task:
    slot: int
    first: int
    rows: NDArray[np.int64]
    passes: NDArray[np.int64]
    keys: Sequence[Any]


@dataclass(frozen=True)
class _Work:
    """What every worker knows: nothing here grows with the number of rows."""

    pixels: ImageSource
    views: tuple[ViewMaker, ...]
    view_key: int
    batch: int
    num_slots: int

    def slots(self, memory: Any) -> tuple[NDArray[np.uint8], Slots]:
        """The flag that tells workers to stop, and every slot, all in one piece of memory."""
        whole = np.frombuffer(memory, dtype=np.uint8)
        slots, start = [], _ALIGN
        for _ in range(self.num_slots):
            kinds = []
            for side in (maker.image_size for maker in self.views):
                end = start + self.batch * side * side * 3
                kinds.append(whole[start:end].reshape(self.batch, side, side, 3))
                start = -(-end // _ALIGN) * _ALIGN
            slots.append(kinds)
        return whole[:1], slots

    @property
    def num_bytes(self) -> int:
        per_slot = (self.batch * maker.image_size**2 * 3 for maker in self.views)
        return _ALIGN + self.num_slots * sum(-(-size // _ALIGN) * _ALIGN for size in per_slot)

    def fill(self, task: _Task, stop: NDArray[np.uint8], slots: Slots) -> None:
        numbers = uniforms(self.view_key, task.rows, task.passes, NUM_UNIFORMS).tolist()
        for i, (row, key) in enumerate(zip(task.rows, task.keys)):
            if stop[0]:
                return
            try:
                views = make_views(self.views, self.pixels.read(key), numbers[i])
            except ImageError as error:
                raise InputError(
                    f"{self.pixels.locate(key)}: row {row} can no longer be used ({error}), but stage one embedded "
                    "it; put the file back, then run again"
                ) from error
            except MemoryError as error:
                raise InputError(
                    f"{self.pixels.locate(key)}: no memory left to decode it; lower distill.workers, then run again"
                ) from error
            for kind, view in zip(slots[task.slot], views):
                kind[task.first + i] = view


class ViewPool:
    """Fills slots with the views of batches. Use it in a `with` block, which ends the workers.

    Attributes:
        slots: for each slot, for each view maker, (B, S, S, 3) uint8; whoever started a slot's batch reads it there.
    """

    def __init__(
        self,
        pixels: ImageSource,
        views: Sequence[ViewMaker],
        view_key: int,
        batch: int,
        num_slots: int,
        workers: int,
        processes: bool | None = None,
    ) -> None:
        """Workers that have not started yet.

        Args:
            batch: images of one slot.
            workers: how many; 0 takes one for each core that this process may use.
            processes: whether they are processes; None decides by their number (`MOST_THREADS`).
        """
        self.num_workers = workers or usable_cores()
        self._work = _Work(pixels, tuple(views), view_key, batch, num_slots)
        self._are_processes = self.num_workers > MOST_THREADS if processes is None else processes
        least, most = _IMAGES_A_TASK
        self._task_images = max(least, min(most, -(-batch // self.num_workers)))
        self._pool: ThreadPoolExecutor
        self._processes: SimpleQueue[_WorkerProcess] = SimpleQueue()

    def __enter__(self) -> "ViewPool":
        if self._are_processes:
            self._start_processes()
        else:
            self._stop, self.slots = self._work.slots(bytearray(self._work.num_bytes))
        self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="views")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._pool.shutdown(cancel_futures=True)
        ending = [self._processes.get() for _ in range(self._processes.qsize())]
        for process in ending:
            process.end()
        for process in ending:
            process.join()

    def start(
        self, slot: int, rows: NDArray[np.int64], passes: NDArray[np.int64], keys: Sequence[Any]
    ) -> list[Future[None]]:
        """Start on the views of a batch; they are in the slot when all of these are done.

        One that fails raises InputError: an image can no longer be read, or a worker process was killed.
        """
        fill = self._fill_elsewhere if self._are_processes else self._fill_here
        size = self._task_images
        return [
            self._pool.submit(fill, _Task(slot, first, rows[first:last], passes[first:last], keys[first:last]))
            for first, last in ((first, first + size) for first in range(0, len(rows), size))
        ]

    def stop(self) -> None:
        """Make workers leave what they are doing: every task ends soon, its views unfinished, until `go_on`."""
        self._stop[0] = 1

    def go_on(self) -> None:
        self._stop[0] = 0

    def abandon(self, tasks: Sequence[Future[None]]) -> None:
        """Leave a batch unfinished; afterwards nothing writes into its slot any more."""
        self.stop()
        for task in tasks:  # `concurrent.futures.wait` would wait forever for one that a closing pool has cancelled
            with suppress(CancelledError):
                task.exception()
        self.go_on()

    def _fill_here(self, task: _Task) -> None:
        self._work.fill(task, self._stop, self.slots)

    def _fill_elsewhere(self, task: _Task) -> None:
        """Each thread of the pool lends itself a process and waits for it."""
        process = self._processes.get()
        try:
            process.fill(task)
        finally:
            self._processes.put(process)

    def _start_processes(self) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload([__name__])
        memory = server.RawArray(ctypes.c_uint8, self._work.num_bytes)  # a file that is unlinked as soon as it is open
        self._stop, self.slots = self._work.slots(memory)
        with _signals_blocked(), _main_hidden():
            for _ in range(self.num_workers):
                self._processes.put(_WorkerProcess(server, self._work, memory))


class _WorkerProcess:
    """A process that makes views when it is told to, and the line to it."""

    def __init__(self, server: context.ForkServerContext, work: _Work, memory: Any) -> None:
        self._line, other_end = server.Pipe()
        self._process = server.Process(target=_serve, args=(other_end, work, memory), name="views", daemon=True)
        self._process.start()
        other_end.close()  # the process alone has it now: when it ends, so does the line

    def fill(self, task: _Task) -> None:
        """Have it make views.

        Raises:
            InputError: if an image can no longer be read, or the process is gone.
        """
        try:
            self._line.send(task)
            error = self._line.recv()
        except (EOFError, OSError) as gone:
            raise self._died() from gone
        if error is not None:
            raise error

    def end(self) -> None:
        """Ask it to end."""
        self._line.close()

    def join(self) -> None:
        self._process.join(_PATIENCE_S)
        self._process.kill()
        self._process.join()

    def _died(self) -> InputError:
        self._process.join(_PATIENCE_S)
        code = self._process.exitcode
        if code is None or code >= 0:
            return InputError(
                f"a worker process that makes views ended with exit code {code}; what it wrote above says why, and "
                "distill.workers = 1 does without processes"
            )
        cause = signal.Signals(-code).name + (", often for want of memory" if code == -signal.SIGKILL else "")
        return InputError(
            f"a worker process was killed ({cause}) while it made views; the run keeps its last checkpoint: lower "
            "distill.workers, then run again"
        )


def _serve(line: connection.Connection, work: _Work, memory: Any) -> None:
    """What a worker process does until nobody is left at the other end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    stop, slots = work.slots(memory)
    with suppress(EOFError, OSError):
        while True:
            task = line.recv()
            error = None
            try:
                work.fill(task, stop, slots)
            except Exception as raised:
                if not isinstance(raised, DimefmError):  # a fault of ours: its trace would be lost on the way
                    raised.add_note("".join(traceback.format_exception(raised)))
                error = raised
            line.send(error)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """The fork server and all that it forks inherit this: a Ctrl-C while they start gets no traceback out of them."""
    resource_tracker.ensure_running()  # it would unblock them when the fork server starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Without this, every worker would run the main program's file again, with all that it imports."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
