"""Shards are handed out: to this process, one worker for each device, or to the workers of a cluster.

Each attempt at a shard goes to one worker and is written under a name that is made there; the caller commits what is
yielded, one attempt for each shard. So whatever workers do late or twice, a shard that counts is not written again.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from distributed import CancelledError, Future, KilledWorker

from ....cache.errors import CacheError, DimefmError, InputError
from ....stages.devices import devices_of
from ....stages.embed.tasks import ShardDone, ShardTask
from ....stages.settings.cluster import ClusterSettings
from ....stages.settings.models import TeacherSettings
from .connection import TASKS_PER_DEVICE, Connection, NotYetError, connected
from .crew import SECONDS_BETWEEN_LOOKS, Crew, Devices, Worker
from .trial import Trial
from .worker_side import TEACHERS, NotTriedError, embed

ENOUGH_LACKING = 2
"""Workers that lack images of a shard, after which it is no longer asked of others: the client looks for itself."""

MOST_LOST = 3
"""Workers that may be lost while they have a shard, before it is taken to be the reason."""


@dataclass(eq=False)
class Shard:
    """A shard until it is yielded.

    Attributes:
        num_lost: workers that were lost while they had it.
        lacking: workers that did not find some of its images.
        best: of what those made, that with most images.
    """

    task: ShardTask
    num_lost: int = 0
    lacking: list[Worker] = field(default_factory=list)
    best: ShardDone | None = None

    def __str__(self) -> str:
        return f"shard {self.task.shard} of {self.task.array}"


def run_shards(
    tasks: Sequence[ShardTask],
    settings: TeacherSettings,
    weights: str,
    scheduler: str | None,
    limits: ClusterSettings | None = None,
) -> Iterator[ShardDone]:
    """Embed shards, on every device there is; yields each once, in the order they finish, for the caller to commit.

    Args:
        weights: hash of the teacher's weights; a worker whose own differ refuses to work.
        scheduler: address of a Dask scheduler whose workers see the same files, or None for this process.
        limits: how long is waited for whom; None takes the defaults.

    Raises:
        InputError: if there is nobody to embed for too long, or if a worker meets what a user has to mend.
        CacheError: if a file cannot be written.
    """
    if not tasks:
        return
    limits, devices = limits or ClusterSettings(), devices_of(settings.device)
    with connected(scheduler, len(devices), limits) as connection, ExitStack() as stack:
        crew: Crew | Devices
        token: Path | None = None
        if scheduler:
            teacher, _ = TEACHERS.get(settings, devices[0], weights)
            trial = stack.enter_context(Trial(tasks, settings, weights, teacher))
            crew, token = Crew(connection, trial, limits, settings.device), trial.task.token
        else:
            crew = Devices(connection, [str(device) for device in devices])
        yield from Dispatch(connection, crew, tasks, settings, weights, token).run()


class Dispatch:
    """Hands out the shards of one run. A window of a few for each worker, so that a run that has to stop, stops."""

    def __init__(
        self,
        connection: Connection,
        crew: Crew | Devices,
        tasks: Sequence[ShardTask],
        settings: TeacherSettings,
        weights: str,
        token: Path | None,
    ) -> None:
        """Arguments as of `run_shards` and `worker_side.embed`."""
        self._connection, self._crew = connection, crew
        self._settings, self._weights, self._token = settings, weights, token
        self._waiting = deque(Shard(task) for task in tasks)

    def run(self) -> Iterator[ShardDone]:
        """Yields each shard as it is finished."""
        while True:
            for worker in self._crew.look():
                self._take_back(worker, is_lost=True)
            yield from self._nowhere_complete()
            self._hand_out()
            if not self._waiting and not any(worker.running for worker in self._crew.workers.values()):
                return
            future = self._connection.next_ended(SECONDS_BETWEEN_LOOKS)
            if future is not None and not self._crew.take(future):
                done = self._ended(future)
                if done:
                    yield done

    def _hand_out(self) -> None:
        usable = self._crew.usable()
        for worker in self._crew.workers.values():
            # Where nobody else could do it, a silent worker keeps what it has: it may come back.
            if worker.running and usable and worker not in usable and worker.is_silent:
                self._take_back(worker)
        for depth in range(TASKS_PER_DEVICE):
            for worker in usable:
                if len(worker.running) > depth:
                    continue
                shard = next((shard for shard in self._waiting if worker not in shard.lacking), None)
                if shard is None:
                    continue
                self._waiting.remove(shard)
                arguments = (shard.task, self._settings, self._weights, worker.device, worker.process, self._token)
                worker.running[self._connection.submit(worker.address, embed, *arguments)] = shard

    def _take_back(self, worker: Worker, *, is_lost: bool = False) -> None:
        """Give a worker's shards to others; what it still writes of them is nobody's.

        Raises:
            InputError: if too many workers were lost with one of them.
        """
        self._connection.cancel([*worker.running])
        while worker.running:
            self._once_more(worker.running.popitem()[1], is_lost=is_lost)

    def _once_more(self, shard: Shard, *, is_lost: bool = False) -> None:
        self._waiting.appendleft(shard)
        shard.num_lost += is_lost
        if shard.num_lost > MOST_LOST:
            raise InputError(
                f"--scheduler {self._connection.scheduler}: {shard} was with {shard.num_lost} workers that were lost; "
                "their logs say why"
            )

    def _ended(self, future: Future) -> ShardDone | None:
        """What came of a shard; None if it has to be embedded once more, or is with somebody else by now."""
        worker = next((worker for worker in self._crew.workers.values() if future in worker.running), None)
        if worker is None:
            return None
        try:
            done: ShardDone = self._connection.result(future)
        except NotYetError:
            return None
        except (CancelledError, KilledWorker, NotTriedError) as error:
            self._once_more(worker.running.pop(future), is_lost=not isinstance(error, CancelledError))
            if isinstance(error, NotTriedError) and isinstance(self._crew, Crew) and worker.state == "good":
                self._crew.try_again(worker)
            return None
        except DimefmError as error:
            if isinstance(self._crew, Devices):
                raise
            raise type(error)(f"worker {worker.name}: {error}") from error
        except Exception as error:  # a device that fails, memory that is short: another worker may do better
            if isinstance(self._crew, Devices):
                raise
            self._once_more(worker.running.pop(future), is_lost=True)
            self._crew.refuse(worker, " ".join(f"{type(error).__name__}: {error}".split())[:300])
            self._take_back(worker)
            return None
        shard: Shard = worker.running.pop(future)
        future.release()
        try:
            done.require_sound()
        except CacheError as error:
            if isinstance(self._crew, Devices):
                raise
            self._once_more(shard)
            self._crew.refuse(worker, str(error))
            self._take_back(worker)
            return None
        if isinstance(self._crew, Devices):
            return done
        if done.absent:
            shard.lacking.append(worker)
            if shard.best and len(shard.best.absent) <= len(done.absent):
                done.discard()
            else:
                self._replace_best(shard, done)
            self._once_more(shard)
            return None
        for other in shard.lacking:
            if self._crew.workers.get(other.address) is other:
                self._crew.lacked(other, f"images of {shard}")
        self._replace_best(shard, None)
        return done

    def _replace_best(self, shard: Shard, done: ShardDone | None) -> None:
        if shard.best:
            shard.best.discard()
        shard.best = done

    def _nowhere_complete(self) -> Iterator[ShardDone]:
        """Shards of which every worker lacks images, or two of many: the caller decides what becomes of them."""
        for shard in [shard for shard in self._waiting if shard.best]:
            usable = self._crew.usable()
            if len(shard.lacking) >= ENOUGH_LACKING or (usable and all(worker in shard.lacking for worker in usable)):
                self._waiting.remove(shard)
                assert shard.best
                yield shard.best
