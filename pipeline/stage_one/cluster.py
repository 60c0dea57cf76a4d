"""Dask hands out shards: to this process, one worker for each device, or to the workers of a cluster."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from threading import Lock
from typing import Any

import dask
import torch
from distributed import Client, KilledWorker, LocalCluster, get_worker, wait

from ...cache.errors import InputError
from ...stages.devices import devices_of, resolve_device
from ...stages.embed.shard import embed_shard
from ...stages.embed.tasks import ShardDone, ShardTask
from ...stages.models.load_teacher import load_teacher
from ...stages.models.teacher import Teacher
from ...stages.settings.models import TeacherSettings

TASKS_PER_DEVICE = 2
"""One shard is on the device; meanwhile the next one decodes, or the last one is being written."""

SECONDS_FOR_SCHEDULER = 20
SECONDS_FOR_WORKERS = 60
SECONDS_BETWEEN_LOOKS = 10
"""How long to wait for a shard before looking whether any worker is left."""


class Teachers:
    """The teachers of one process: each device loads its own once and runs one shard at a time."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[TeacherSettings, torch.device], tuple[Teacher, Lock, str]] = {}
        self._loading = Lock()

    def put(self, settings: TeacherSettings, teacher: Teacher) -> None:
        self._loaded[settings, teacher.device] = (teacher, Lock(), teacher.identity()["weights"])

    def get(self, settings: TeacherSettings, device: torch.device) -> tuple[Teacher, Lock, str]:
        """The teacher of a device, the lock to hold while it runs, and the hash of its weights."""
        with self._loading:
            if (settings, device) not in self._loaded:
                self.put(settings, load_teacher(settings, device))
            return self._loaded[settings, device]

    def clear(self) -> None:
        self._loaded.clear()


TEACHERS = Teachers()


def _work(task: ShardTask, settings: TeacherSettings, weights: str, in_process: bool) -> ShardDone:
    """What a Dask worker runs for one shard."""
    name = get_worker().name
    device = devices_of(settings.device)[int(name)] if in_process else resolve_device(settings.device)
    teacher, lock, own_weights = TEACHERS.get(settings, device)
    if own_weights != weights:
        TEACHERS.clear()  # the file may have been replaced since it was read: the next try reads it again
        raise InputError(f"worker {name}: its teacher.pretrained holds other weights than the one this run began with")
    return embed_shard(task, teacher, settings, lock)


@contextmanager
def _client(scheduler: str | None, num_devices: int) -> Iterator[Client]:
    for noisy in ("distributed", "distributed.client", "distributed.core", "distributed.worker", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    if scheduler:
        try:
            client = Client(scheduler, timeout=SECONDS_FOR_SCHEDULER)
        except (OSError, ValueError) as error:
            raise InputError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error})") from error
        with client:
            yield client
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
        yield client


def run_shards(
    tasks: Iterable[ShardTask], settings: TeacherSettings, weights: str, scheduler: str | None
) -> Iterator[ShardDone]:
    """Embed shards, on every device there is; yields each when its file is durable, in the order they finish.

    Args:
        weights: hash of the teacher's weights; a worker whose own differ refuses to work.
        scheduler: address of a Dask scheduler whose workers see the same files, or None for this process.
    """
    num_devices = len(devices_of(settings.device))
    remaining = iter(tasks)
    with _client(scheduler, num_devices) as client:
        try:  # those that are just being started count too
            client.wait_for_workers(1, timeout=SECONDS_FOR_WORKERS)
        except TimeoutError as error:
            raise InputError(
                f"--scheduler {scheduler}: has no workers; start some with `dask worker {scheduler}`"
            ) from error
        num_workers = len(client.scheduler_info(n_workers=-1)["workers"])

        def submit(task: ShardTask) -> Any:
            return client.submit(_work, task, settings, weights, scheduler is None, pure=False)

        # A window, not all at once: a run of thousands of shards that has to stop, stops.
        window = {submit(task) for task in islice(remaining, TASKS_PER_DEVICE * num_workers)}
        while window:
            for future in _finished(client, window, scheduler):
                window.remove(future)
                try:
                    done: ShardDone = future.result()
                except KilledWorker as error:
                    raise InputError(
                        f"--scheduler {scheduler}: a shard killed several workers ({error}); their logs say why"
                    ) from error
                window.update(submit(task) for task in islice(remaining, 1))
                yield done


def _finished(client: Client, window: set[Any], scheduler: str | None) -> list[Any]:
    """Shards that are finished, at least one; refuses to wait for workers that are no more."""
    while True:
        try:
            return list(wait(window, timeout=SECONDS_BETWEEN_LOOKS, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            if not client.scheduler_info(n_workers=-1)["workers"]:
                raise InputError(f"--scheduler {scheduler}: all workers are gone; start some and run again") from None
