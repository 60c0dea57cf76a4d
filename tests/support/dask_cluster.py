"""A Dask cluster for tests: a scheduler and workers, each a process of its own, on loopback; and what breaks them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from distributed import Client

WORKER = """
import torch
torch.set_num_threads(1)
import dimefm.pipeline.stage_one.cluster.worker_side
import dimefm.stages.models.open_clip_teacher
from distributed.cli.dask_worker import main
main()
"""
"""It joins when all that takes long to import is there: tests with short time-outs find it awake."""

PATCH = """
import builtins
undo = builtins.__dict__.setdefault("faults_to_undo", [])
def patch(owner, name, make):
    undo.append((owner, name, getattr(owner, name)))
    setattr(owner, name, make(getattr(owner, name)))
"""
HEALTHY = (
    PATCH
    + """
while undo:
    setattr(*undo.pop())
"""
)

ALTERED = (
    PATCH
    + """
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher
for name in ("encode_images", "encode_tokens"):
    patch(OpenClipTeacher, name, lambda whole: lambda self, batch: whole(self, batch) * (1 + 2**-9))
"""
)
"""A worker whose embeddings have other last bits, as on another processor, at a cosine of 1."""

BLIND = (
    PATCH
    + """
from pathlib import Path
from dimefm.stages.inputs.image_folder import ImageFolder
nothing = ImageFolder(Path("/an/empty/mount"))
patch(ImageFolder, "read", lambda whole: lambda self, key: whole(nothing, key))
"""
)
"""A worker whose folder of images is empty, as where a disk is not mounted."""

LACKING = (
    PATCH
    + """
import dataclasses
from dimefm.pipeline.stage_one.cluster import worker_side
def without_first(done):
    return dataclasses.replace(done, absent=(0,)) if done.record.array == "images/embedding" else done
patch(worker_side, "embed_shard", lambda whole: lambda *arguments: without_first(whole(*arguments)))
"""
)
"""A worker that does not find the first image of any shard."""

OTHER_PILLOW = (
    PATCH
    + """
import importlib.metadata
patch(importlib.metadata, "version", lambda whole: lambda name: "1.1.7" if name == "pillow" else whole(name))
"""
)

SLOW = (
    PATCH
    + """
import os
import time
import dimefm.stages.embed.shard
patch(
    dimefm.stages.embed.shard,
    "attempt_chunk",
    lambda whole: lambda *rest: (time.sleep(1), whole(*rest), os.write(1, b"wrote a chunk\\n"))[1],
)
"""
)
"""A worker that takes a second longer for each shard, just before it writes it, and says so in its log."""


def wait_until(is_so: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class DaskCluster:
    """A scheduler, and workers by name."""

    def __init__(self, folder: Path) -> None:
        """Start the scheduler.

        Args:
            folder: for the logs. `warm_up` is code that every new worker runs before a test gets it.
        """
        self.folder, self.workers, self.warm_up = folder, {}, ""
        self._start_scheduler()

    def __enter__(self) -> "DaskCluster":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in [*self.workers.values(), self.scheduler]:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def start(self, *names: str) -> None:
        """Start workers; they join when they are ready."""
        for name in names:
            words = ["-c", WORKER, self.address, "--nthreads", "2", "--no-nanny", "--no-dashboard", "--name", name]
            self.workers[name] = self._start(name, *words)

    def wait_for(self, *names: str) -> None:
        """Wait until workers have joined."""
        with Client(self.address, set_as_default=False) as client:
            wait_until(lambda: set(names) <= {*self._addresses(client)}, f"{names} do not join")

    def send(self, name: str, signal_number: int) -> None:
        """Send a signal to a worker; after a kill, wait for its end."""
        self.workers[name].send_signal(signal_number)
        if signal_number == signal.SIGKILL:
            self.workers.pop(name).wait()

    def make_ready(self, *names: str) -> None:
        """Have these workers and no others, with no fault; and a scheduler, if it was killed."""
        if self.scheduler.poll() is not None:
            for name in [*self.workers]:
                self.send(name, signal.SIGKILL)
            self._start_scheduler()
        for name in [*self.workers]:
            self.send(name, signal.SIGCONT if name in names else signal.SIGKILL)
        new = [name for name in names if name not in self.workers]
        self.start(*new)
        self.wait_for(*names)
        for name in new:
            self.change(name, self.warm_up)
        for name in names:
            self.change(name, HEALTHY)

    def change(self, name: str, code: str) -> None:
        """Run code in a worker: one of the faults above."""
        with Client(self.address, set_as_default=False) as client:
            client.run(exec, code, {}, workers=[self._addresses(client)[name]])

    def num_written(self, name: str) -> int:
        """Chunks that a slow worker has said it wrote."""
        return (self.folder / f"{name}.log").read_text().count("wrote a chunk")

    def is_idle(self, name: str) -> bool:
        """Whether a worker's threads have nothing to do any more."""
        code = "sum(len(worker.active_threads) for worker in __import__('distributed').Worker._instances)"
        with Client(self.address, set_as_default=False) as client:
            return not any(client.run(eval, code, workers=[self._addresses(client)[name]]).values())

    def _addresses(self, client: Client) -> dict[str, str]:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        return {str(worker["name"]): address for address, worker in workers.items()}

    def _start(self, name: str, *words: str) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environment)

    def _start_scheduler(self) -> None:
        words = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        self.scheduler = self._start("scheduler", *words)
        wait_until(self._find_address, "the scheduler does not start")
        self.address = self._find_address()

    def _find_address(self) -> str | None:
        found = re.search(r"Scheduler at:\s+(tcp://\S+)", (self.folder / "scheduler.log").read_text())
        return found and found.group(1)
