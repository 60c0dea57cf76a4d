"""The workers of a cluster: who is there, who was tried and may embed, who has gone silent, and the wait for one."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from distributed import CancelledError, Future

from ....cache.errors import DimefmError, InputError
from ....stages.devices import deal_gpu
from ....stages.models.weights_file import one_line
from ....stages.settings.cluster import ClusterSettings
from ...progress import say
from .connection import Connection, NotYetError, Seen
from .trial import Trial
from .worker_side import Introduction, introduce, try_out

SECONDS_BETWEEN_LOOKS = 1.0

SECONDS_BEFORE_A_LINE = 5.0
SECONDS_BETWEEN_LINES = 30.0
"""When it is first said, and said again, that a worker is waited for."""

SECONDS_FOR_OTHERS = 10.0
"""Where every worker was refused, how long others may take to join before the run stops."""

MOST_LACKING = 3
"""Shards of which a worker may fail to find images that others find, before it is used no more."""


@dataclass(eq=False)
class Worker:
    """One worker.

    Attributes:
        state: `new` until it has said who it is, `tried` until it has been, then `good` or `refused`.
        process: the one that was tried; None where that is this one.
        device: the one that it embeds on.
        gpu: what that is called on its host, if it was dealt one.
        running: what it has been given, by the future of each.
        lacking: shards of which it did not find images that others found.
        refusal: why it may not embed.
    """

    address: str
    name: str
    last_seen: float
    state: Literal["new", "tried", "good", "refused"] = "new"
    process: str | None = None
    host: str = ""
    device: str = ""
    gpu: str | None = None
    running: dict[Future, Any] = field(default_factory=dict)
    lacking: int = 0
    refusal: str = ""
    silent_s: float = 0.0
    is_silent: bool = False
    step: Future | None = None
    introduction: Introduction | None = None


class Crew:
    """All workers of a scheduler: looked for all the time, each tried before it is used."""

    def __init__(self, connection: Connection, trial: Trial, limits: ClusterSettings, device: str) -> None:
        """Nobody is looked for yet.

        Args:
            device: `teacher.device`.
        """
        self.workers: dict[str, Worker] = {}
        self._connection, self._trial, self._limits, self._device = connection, trial, limits, device
        self._looked_at = float("-inf")
        self._is_reachable = self._had_good = False
        self._alone_since: float | None = None
        self._refused_at = self._said_at = 0.0

    def usable(self) -> list[Worker]:
        """Workers that may embed and answer."""
        if not (self._is_reachable and self._connection.is_up):
            return []
        return [worker for worker in self.workers.values() if worker.state == "good" and not worker.is_silent]

    def look(self) -> list[Worker]:
        """See who has joined and who has gone silent; returns those that are gone. Does nothing if it just did.

        Raises:
            InputError: if the scheduler is out of reach, or there is no worker, for too long; or if none may be used.
        """
        now = time.monotonic()
        passed = now - self._looked_at
        if passed < SECONDS_BETWEEN_LOOKS:
            return []
        seen = self._connection.look()
        self._looked_at, self._is_reachable = now, seen is not None
        if seen is None:
            return []
        gone = [self.workers.pop(address) for address in [*self.workers] if address not in seen]
        for worker in gone:
            if worker.running or worker.state == "tried":
                say(f"worker {worker.name}: gone{'; others get its shards' if worker.running else ''}")
        for address, found in sorted(seen.items(), key=lambda item: (item[1].name, item[0])):
            worker = self.workers.setdefault(address, Worker(address, found.name, found.last_seen))
            # In steps: a client that was itself stopped for a while would find everybody silent.
            self._listen(worker, found, min(passed, 2 * SECONDS_BETWEEN_LOOKS))
            if worker.step is None and worker.state in ("new", "tried"):
                self.try_again(worker)
        self._wait_for_one(now)
        return gone

    def try_again(self, worker: Worker) -> None:
        """Try a worker, from the beginning; it gets no shard meanwhile."""
        worker.state = "new"
        worker.step = self._connection.submit(worker.address, introduce, self._device)

    def refuse(self, worker: Worker, reason: str) -> None:
        """Use a worker no more, and say why."""
        worker.state, worker.refusal, worker.step = "refused", reason, None
        self._refused_at = time.monotonic()
        say(f"worker {worker.name}: not used: {reason}")

    def lacked(self, worker: Worker, what: str) -> None:
        """Another worker found what this one did not: it is tried again, and after a few such shards refused."""
        worker.lacking += 1
        say(f"worker {worker.name}: did not find {what}, which another worker found")
        if worker.lacking >= MOST_LACKING:
            self.refuse(worker, f"it did not find images of {worker.lacking} shards that others found")
        elif worker.state == "good":
            self.try_again(worker)

    def take(self, future: Future) -> bool:
        """Take what came out of a trial; False if the future is of something else."""
        worker = next((worker for worker in self.workers.values() if worker.step is future), None)
        if worker is None:
            return False
        try:
            if worker.state == "new":
                self._introduced(worker, self._connection.result(future))
            else:
                assert worker.introduction
                remark = self._trial.judge(worker.introduction, self._connection.result(future))
                if remark:
                    say(f"worker {worker.name}: {remark}")
                worker.state, worker.step, self._had_good = "good", None, True
        except NotYetError:
            pass
        except CancelledError:  # by a scheduler that is gone; if the worker is not, it is tried once more
            worker.step = None
        except Exception as error:  # whatever is wrong with a worker: this one is not used
            self.refuse(worker, str(error) if isinstance(error, DimefmError) else one_line(error))
        return True

    def _introduced(self, worker: Worker, introduction: Introduction) -> None:
        self._trial.require_versions(introduction)
        worker.process, worker.host, worker.device = introduction.process, introduction.host, introduction.device
        worker.introduction = introduction
        if introduction.gpus:
            others = [
                other.gpu
                for other in self.workers.values()
                if other.gpu and other is not worker and other.host == worker.host and other.state != "refused"
            ]
            number = deal_gpu(introduction.gpus, others)
            worker.gpu, worker.device = introduction.gpus[number], f"cuda:{number}"
        worker.state = "tried"
        worker.step = self._connection.submit(worker.address, try_out, self._trial.task, worker.device)

    def _listen(self, worker: Worker, found: Seen, passed: float) -> None:
        """Count the time without a sign of life by this machine's clock: the scheduler's may be another."""
        is_awake = found.last_seen != worker.last_seen and found.status == "running"
        worker.silent_s = 0.0 if is_awake else worker.silent_s + passed
        worker.last_seen = found.last_seen
        was_silent, worker.is_silent = worker.is_silent, worker.silent_s > self._limits.heartbeat_timeout
        if worker.is_silent and not was_silent and worker.state != "refused":
            what = "no sign of life" if found.status == "running" else found.status
            say(f"worker {worker.name}: {what} for {worker.silent_s:.0f} s; it gets no shards until it is back")
        elif was_silent and not worker.is_silent and worker.state != "refused":
            say(f"worker {worker.name}: is back")

    def _wait_for_one(self, now: float) -> None:
        """Where no worker may be used: say who is waited for, and stop after a while."""
        if self.usable():
            self._alone_since = None
            return
        if self._alone_since is None:
            self._alone_since, self._said_at = now, now - SECONDS_BETWEEN_LINES + SECONDS_BEFORE_A_LINE
        waited, limit = now - self._alone_since, self._limits.worker_timeout
        where = f"--scheduler {self._connection.scheduler}"
        reasons = [*self._what_is_wrong()]
        shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more workers" if len(reasons) > 3 else "")
        are_refused = self.workers and all(worker.state == "refused" for worker in self.workers.values())
        if are_refused and not self._had_good and now - self._refused_at > min(SECONDS_FOR_OTHERS, limit):
            raise InputError(f"{where}: none of its {len(self.workers)} workers can be used: {shown}")
        if waited > limit:
            raise InputError(
                f"{where}: for {waited:.0f} s no worker that can be used (cluster.worker_timeout = {limit:g}): {shown}"
                "; what is finished is kept: mend that and run the same again"
            )
        if now - self._said_at >= SECONDS_BETWEEN_LINES:
            self._said_at = now
            say(f"{where}: waiting for a worker: {shown} (up to {limit - waited:,.0f} s more: cluster.worker_timeout)")

    def _what_is_wrong(self) -> Iterator[str]:
        """Of each worker, or of their lack, why nobody embeds."""
        if not self.workers:
            yield f"none is there; start some with `dask worker {self._connection.scheduler}`"
        for worker in self.workers.values():
            if worker.is_silent:
                yield f"worker {worker.name} has given no sign of life for {worker.silent_s:.0f} s"
            elif worker.state == "refused":
                yield f"worker {worker.name}: {worker.refusal}"
            else:
                yield f"worker {worker.name} is being tried"


class Devices:
    """In the place of a crew where everything runs in this process: a worker for each device, always there."""

    def __init__(self, connection: Connection, devices: list[str]) -> None:
        """Args:
        devices: of the workers, in the order of their names.
        """
        seen = connection.look()
        assert seen is not None
        self.workers = {
            address: Worker(address, worker.name, worker.last_seen, "good", device=devices[int(worker.name)])
            for address, worker in seen.items()
        }

    def usable(self) -> list[Worker]:
        """All of them."""
        return [*self.workers.values()]

    def look(self) -> list[Worker]:
        """Nobody ever goes."""
        return []

    def take(self, future: Future) -> bool:
        """Nobody is ever tried."""
        return False
