"""`distill.profile`: a trace, a memory snapshot and a table of where the time of some early steps went."""

import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from ...cache.disk.durable import make_folder, write_bytes, write_json
from ..load.batches import Batch
from ..profiling import TABLE, TRACE, PhaseTimes, Trace, phase_table, recording

PROFILE, STEPS, MEMORY = "profile", "steps.json", "memory.pickle"
"""In a run's folder, and there: the numbers of each step; a snapshot for https://pytorch.org/memory_viz."""

PHASES = ("data", "copy", "forward", "losses", "backward", "optimiser")
"""What a step does; the rest of its time is `other`: logging, scores, checkpoints, what processes tell each other."""

STEPS_BEFORE, STEPS_TRACED, STEPS_TIMED = 3, 3, 3
"""Steps of a call that run before; that are traced, which costs time; that are timed alone. Fewer in a short call."""

_EVENTS = 1_000_000
"""Most allocations that a memory snapshot remembers."""


class StepProfile:
    """Profiles some early steps of a call of `train`: first with a trace, then with the clock alone."""

    def __init__(
        self, folders: Sequence[Path], num_steps: int, device: torch.device, tell: Callable[[str], None]
    ) -> None:
        """A profile that has not begun.

        Args:
            folders: of the runs that get it; none turns it off.
            num_steps: steps of this call.
        """
        self._folders, self._device, self._tell = [folder / PROFILE for folder in folders], device, tell
        self._before = min(STEPS_BEFORE, max(0, num_steps - 1))
        window = min(STEPS_TRACED + STEPS_TIMED, num_steps - self._before)
        self._traced = range(self._before, self._before + -(-window // 2))
        self._end = self._before + window
        self._count, self._steps = 0, list[dict[str, Any]]()
        self._times, self._recording = PhaseTimes([device]), ExitStack()
        self._trace: Trace | None = None
        # Documented, but with an underscore: it may go with another torch.
        self._has_memory_history = device.type == "cuda" and hasattr(torch.cuda.memory, "_record_memory_history")

    def watch(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """The same batches; a step lasts from asking for its batch to asking for the next."""
        with closing(batches):
            while True:
                if self._folders and self._count == self._before and self._trace is None:
                    self._start()
                began, before = time.perf_counter(), self._times.seconds.copy()
                batch = next(batches, None)
                if batch is None:
                    return
                try:
                    yield batch
                finally:  # also after the last step, when nobody asks for more
                    if self._folders:
                        self._count_step(batch.step + 1, began, before)

    def close(self) -> None:
        """Write what there is, now or when the call ends before the profile does."""
        self._stop_trace()
        self._recording.close()
        folders, self._folders = self._folders, []
        if not folders or not self._steps:
            return
        first, *others = folders
        timed = [one for one in self._steps if not one["traced"]] or self._steps
        seconds = {name: sum(one["phases"][name] for one in timed) / len(timed) for name in timed[0]["phases"]}
        step_s = sum(seconds.values())
        document = {
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            "step_s": step_s,
            "phases": {name: {"s": of, "share": of / step_s} for name, of in seconds.items()},
            "steps": self._steps,
        }
        lines = [f"where a step's time went: {1e3 * step_s:,.1f} ms, mean of {len(timed)} steps", *phase_table(seconds)]
        write_json(first / STEPS, document)
        write_bytes(first / TABLE, "".join(f"{line}\n" for line in lines).encode())
        for folder in others:
            shutil.copytree(first, folder, dirs_exist_ok=True)
        for line in [*lines, f"profile of these steps: {', '.join(map(str, folders))}"]:
            self._tell(line)

    def _start(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
            make_folder(folder)
        self._recording.enter_context(recording(self._times))
        if self._has_memory_history:
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        self._trace = Trace(self._folders[0] / TRACE)

    def _count_step(self, step: int, began: float, before: Mapping[str, float]) -> None:
        traced, self._count = self._count in self._traced, self._count + 1
        if self._count <= self._before:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - began
        phases = {name: self._times.seconds[name] - before.get(name, 0.0) for name in PHASES}
        phases["other"] = max(0.0, seconds - sum(phases.values()))
        self._steps.append({"step": step, "seconds": seconds, "traced": traced, "phases": phases})
        if self._count == self._traced.stop:
            self._stop_trace()
        if self._count == self._end:
            self.close()

    def _stop_trace(self) -> None:
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        if self._has_memory_history:
            torch.cuda.memory._dump_snapshot(str(self._folders[0] / MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
