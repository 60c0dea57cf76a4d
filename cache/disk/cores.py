"""How many CPU cores this process may use: what thread pools and workers are sized by."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


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
