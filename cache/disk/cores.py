"""How many CPU cores this process may use, which sizes thread pools and workers; and a lazy map over a pool."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that the process's affinity allows, and no more than the CPU quota of its cgroups (v1 or v2), rounded up.

    Args:
        root: where `proc` and `sys` lie.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, math.ceil(quota)) for quota in _quotas(root))])


def _quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in cores, of the process's cgroups and those above them."""
    with suppress(OSError, ValueError):  # no Linux, or no cgroups: no quota
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / controllers
            folder = mount / group.lstrip("/")
            # A container may see its host's path here while its own group is what is mounted: go up to the mount.
            for level in (folder, *folder.parents):
                if level.is_relative_to(mount):
                    yield from _quota(level)


def _quota(group: Path) -> Iterator[float]:
    with suppress(OSError, ValueError, ZeroDivisionError):  # no limit is set here, or it is `max`
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            yield int(quota) / int(period)


def map_ahead(pool: Executor, function: Callable[[T], U], items: Iterable[T], ahead: int) -> Iterator[U]:
    """As `pool.map`, in order, but only `ahead` items are taken before their results are; left early, none is begun."""
    remaining = iter(items)
    pending: deque[Future[U]] = deque(pool.submit(function, item) for item in islice(remaining, ahead))
    try:
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        for future in pending:
            future.cancel()
