"""Dask hands out shards: to this process, one worker for each device, or to the workers of a cluster."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from threading import Lock
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster, as_completed, get_worker

from ..cache.errors import InputError
from ..stages.devices import devices_of, resolve_device
from ..stages.settings import TeacherSettings
from ..stages.shard import ShardDone, ShardTask, embed_shard
from ..stages.teacher import Teacher, load_teacher

TASKS_PER_DEVICE = 2
"""One shard is on the device; meanwhile the next one decodes, or the last one is being written."""


class Teachers:
    """The teachers of one process: each device loads its own once and runs one shard at a time."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[TeacherSettings, torch.device], tuple[Teacher, Lock]] = {}
        self._loading = Lock()

    def put(self, settings: TeacherSettings, teacher: Teacher) -> None:
        self._loaded[settings, teacher.device] = (teacher, Lock())

    def get(self, settings: TeacherSettings, device: torch.device) -> tuple[Teacher, Lock]:
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
    teacher, lock = TEACHERS.get(settings, device)
    if not in_process and teacher.identity()["weights"] != weights:
        raise InputError(f"worker {name}: its teacher.pretrained holds other weights than the one this run began with")
    return embed_shard(task, teacher, settings, lock)


@contextmanager
def _client(scheduler: str | None, num_devices: int) -> Iterator[Client]:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if scheduler:
        try:
            client = Client(scheduler, timeout=20)
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
            dashboard_address=None,
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
        num_workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if not num_workers:
            raise InputError(f"--scheduler {scheduler}: has no workers; start some with `dask worker {scheduler}`")

        def submit(task: ShardTask) -> Any:
            return client.submit(_work, task, settings, weights, scheduler is None, pure=False)

        # A window, not all at once: a run of thousands of shards that has to stop, stops.
        window = as_completed([submit(task) for task in islice(remaining, TASKS_PER_DEVICE * num_workers)])
        for future in window:
            done: ShardDone = future.result()
            future.release()
            for task in islice(remaining, 1):
                window.add(submit(task))
            yield done
