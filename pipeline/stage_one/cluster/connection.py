"""The client's end of Dask: a scheduler elsewhere, or one in this process with a worker for each device."""

import inspect
import logging
import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import dask
from distributed import Client, Future, LocalCluster

from ....cache.errors import InputError
from ....stages.settings.cluster import ClusterSettings
from ...progress import say

TASKS_PER_DEVICE = 2
"""One shard is on the device; meanwhile the next one decodes, or the last one is being written."""

SECONDS_FOR_A_LOOK = 10.0
"""How long the scheduler may take to say who its workers are."""

SECONDS_FOR_A_RESULT = 5.0
"""What is known of a shard is small; a worker that does not hand it over in time is looked at again."""


class Seen(NamedTuple):
    """A worker as the scheduler sees it.

    Attributes:
        last_seen: time of its last sign of life, by the scheduler's clock.
        status: `running`; or `paused`, by its memory limit, and others in which it begins nothing.
    """

    name: str
    last_seen: float
    status: str = "running"


class _Call:
    """A call that is made where it is unpickled.

    Dask's scheduler unpickles what it hands out. It would import torch for it, and answer nobody meanwhile, or lack
    this package. So what it gets is bytes.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class Connection:
    """A Dask client whose tasks each go to one worker, and come back in the order in which they end."""

    def __init__(self, client: Client, scheduler: str | None, limits: ClusterSettings) -> None:
        """Use `connected`.

        Args:
            scheduler: its address; None if it is in this process.
        """
        self.scheduler, self._client, self._timeout = scheduler, client, limits.scheduler_timeout
        self._ended: SimpleQueue[Future] = SimpleQueue()
        self._lost_at: float | None = None
        takes = inspect.signature(client.scheduler_info).parameters
        self._all = {"n_workers": -1} if "n_workers" in takes else {}  # older ones always tell of all

    @property
    def is_up(self) -> bool:
        """Whether there is a connection; what is submitted without one may be lost."""
        return bool(self._client.status == "running")

    def submit(self, worker: str, function: Callable[..., Any], *arguments: Any) -> Future:
        """Run a function on one worker and nowhere else."""
        call = pickle.dumps(_Call(function, arguments))
        key = f"{function.__name__}-{uuid.uuid4().hex}"
        future = self._client.submit(pickle.loads, call, key=key, workers=[worker], allow_other_workers=False)
        future.add_done_callback(self._ended.put)
        return future

    def next_ended(self, seconds: float) -> Future | None:
        """A task that has ended, failed or was cancelled; None if there is none within some seconds."""
        try:
            return self._ended.get(timeout=seconds)
        except Empty:
            return None

    def result(self, future: Future) -> Any:
        """What a task returned, or its exception.

        Raises:
            NotYetError: if its worker does not hand it over: it comes again from `next_ended`, unless it is cancelled.
        """
        if future.status == "error":
            return future.result()
        try:
            return future.result(timeout=SECONDS_FOR_A_RESULT)
        except TimeoutError as error:
            self._ended.put(future)
            raise NotYetError from error

    def cancel(self, futures: list[Future]) -> None:
        """Let nothing come of tasks any more, whether they run, wait or have ended."""
        if futures and self.is_up:
            self._client.cancel(futures, force=True)

    def look(self) -> dict[str, Seen] | None:
        """The workers by address, silent ones too; None while the scheduler is out of reach.

        Raises:
            InputError: if it is for longer than `cluster.scheduler_timeout`.
        """
        started = time.monotonic()
        try:
            if not self.is_up:
                raise OSError("the connection is closed")
            identity = self._client.sync(
                self._client.scheduler.identity, callback_timeout=min(SECONDS_FOR_A_LOOK, self._timeout), **self._all
            )
        except OSError as error:
            if self._lost_at is None:
                self._lost_at = started
                say(f"--scheduler {self.scheduler}: does not answer; waiting for it for {self._timeout:g} s")
            waited = time.monotonic() - self._lost_at
            if self._client.status == "closed" or waited > self._timeout:
                raise InputError(
                    f"--scheduler {self.scheduler}: has not answered for {waited:.0f} s (cluster.scheduler_timeout = "
                    f"{self._timeout:g}); what is finished is kept: start it and its workers, and run the same again"
                ) from error
            return None
        if self._lost_at is not None:
            self._lost_at = None
            say(f"--scheduler {self.scheduler}: answers again")
        return {
            address: Seen(str(worker["name"]), worker["last_seen"], worker["status"])
            for address, worker in identity["workers"].items()
        }


class NotYetError(Exception):
    """A task has ended, and what it returned could not be had."""


@contextmanager
def connected(scheduler: str | None, num_devices: int, limits: ClusterSettings) -> Iterator[Connection]:
    """Connect to a scheduler, or start one in this process.

    Args:
        scheduler: its address; None starts one with a worker for each device, named 0, 1, …

    Raises:
        InputError: if no scheduler answers.
    """
    for noisy in ("distributed", "distributed.client", "distributed.core", "distributed.worker", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    if scheduler:
        try:
            client = Client(scheduler, timeout=limits.scheduler_timeout)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--scheduler {scheduler}: no Dask scheduler answers there ({error}); start one with `dask scheduler`, "
                f"and some workers with `dask worker {scheduler}`"
            ) from error
        with client:
            yield Connection(client, scheduler, limits)
        return
    # Shards of embeddings are small; what Dask counts as its workers' memory here is the teacher itself.
    with (
        dask.config.set({"distributed.admin.tick.limit": "1h"}),
        LocalCluster(
            n_workers=num_devices,
            threads_per_worker=TASKS_PER_DEVICE,
            processes=False,
            dashboard_address="127.0.0.1:0",  # Dask's scheduler serves one whatever is asked: on a port nobody wants
            memory_limit=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield Connection(client, None, limits)
