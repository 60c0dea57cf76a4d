"""Where time goes: phases of the work are marked in the code, and timed only while a profile is recorded.

After torchtitan's `tools/profiler.py`: contexts that do nothing unless a profile was asked for.
"""

import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ContextDecorator, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from ..cache.disk.durable import make_folder, write_bytes, write_json

TRACE, TABLE, PHASES = "trace.json.gz", "table.txt", "phases.json"
"""Files of a profile: for https://ui.perfetto.dev or chrome://tracing, for people, and (of stage one) for programs."""

ON_DEVICE = {"copy", "forward", "losses", "backward", "optimiser"}
"""Phases that queue work on a GPU. While a profile is recorded each waits for it: the time would be another's."""

BATCHES_TRACED = 4
"""Batches of stage one in a trace."""


class phase(ContextDecorator):  # noqa: N801 (a context manager, named like those of contextlib)
    """Marks a phase of the work, as a context or a decorator; it costs half a microsecond while nothing is recorded."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _recreate_cm(self) -> "phase":
        return phase(self._name)

    def __enter__(self) -> None:
        self._times = _active
        if self._times is not None:
            self._times.begin(self._name)

    def __exit__(self, *_: object) -> None:
        if self._times is not None:
            self._times.end()


class PhaseTimes:
    """Seconds of each phase, summed over threads; a phase inside another one counts as itself alone.

    Attributes:
        seconds: of each phase so far.
    """

    def __init__(self, devices: Iterable[torch.device], trace: Path | None = None) -> None:
        """Nothing is timed before `recording`.

        Args:
            devices: those that phases wait for.
            trace: where the first batches of stage one are traced to; None traces none.
        """
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._gpus = [device for device in devices if device.type == "cuda"]
        self._trace, self._lock, self._thread = trace, threading.Lock(), threading.local()

    def begin(self, name: str) -> None:
        self._wait(name)
        mark = record_function(name)
        mark.__enter__()
        self._open().append(_OpenPhase(name, mark))

    def end(self) -> None:
        done = self._open().pop()
        self._wait(done.name)
        seconds = time.perf_counter() - done.began
        done.mark.__exit__(None, None, None)
        if self._open():
            self._open()[-1].inner_s += seconds
        with self._lock:
            self.seconds[done.name] += seconds - done.inner_s

    def take_trace(self) -> Path | None:
        """Where to write the trace, for the first that asks; None for all others."""
        with self._lock:
            trace, self._trace = self._trace, None
        return trace

    def _open(self) -> list["_OpenPhase"]:
        stack: list[_OpenPhase] = self._thread.__dict__.setdefault("open", [])
        return stack

    def _wait(self, name: str) -> None:
        if name in ON_DEVICE:
            for gpu in self._gpus:
                torch.cuda.synchronize(gpu)


class _OpenPhase:
    def __init__(self, name: str, mark: record_function) -> None:
        self.name, self.mark, self.inner_s, self.began = name, mark, 0.0, time.perf_counter()


_active: PhaseTimes | None = None


@contextmanager
def recording(times: PhaseTimes) -> Iterator[None]:
    """Time the phases of all threads of this process; one recording at a time."""
    global _active
    _active = times
    try:
        yield
    finally:
        _active = None


class Trace:
    """A torch profiler trace of what this thread, and a GPU, does from now on until `stop`."""

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells everybody that it starts and stops
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._path, self._profiler = path, torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def stop(self) -> None:
        """Write it."""
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._path))


@contextmanager
def first_batches_traced() -> Iterator[Callable[[], None]]:
    """Trace the first batches of a loop, where a profile is recorded that wants it and no other loop has had it.

    Yields:
        What to call after each batch.
    """
    path = None if _active is None else _active.take_trace()
    trace, left = None if path is None else Trace(path), BATCHES_TRACED

    def batch_done() -> None:
        nonlocal trace, left
        left -= 1
        if trace is not None and left <= 0:
            trace.stop()
            trace = None

    try:
        yield batch_done
    finally:
        if trace is not None:
            trace.stop()


@contextmanager
def profiled(folder: Path | None, tell: Callable[[str], None]) -> Iterator[None]:
    """Profile the phases of all that is done meanwhile, and trace the first batches; None profiles nothing."""
    if folder is None:
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
    make_folder(folder)
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    times = PhaseTimes(gpus, folder / TRACE)
    try:
        with recording(times):
            yield
    finally:
        seconds = dict(sorted(times.seconds.items(), key=lambda item: -item[1]))
        lines = ["where the time went, each phase summed over its threads:", *phase_table(seconds)]
        write_json(folder / PHASES, seconds)
        write_bytes(folder / TABLE, "".join(f"{line}\n" for line in lines).encode())
        for line in [*lines, f"profile of this call: {folder}"]:
            tell(line)


def phase_table(seconds: Mapping[str, float]) -> list[str]:
    """Lines for a person: milliseconds of each phase, and its share of all."""
    total = sum(seconds.values())
    return [f"  {name:<10}{1e3 * of:>12,.1f} ms{of / max(total, 1e-12):>8.1%}" for name, of in seconds.items()]
