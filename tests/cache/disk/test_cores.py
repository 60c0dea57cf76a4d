"""Cores that a process may use: hand-made affinity and cgroup files."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from dimefm.cache.disk.cores import map_ahead, usable_cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write files of a machine with 64 cores; call with the process's affinity, its cgroups and their files."""

    def make(affinity=64, cgroup="0::/\n", **files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        for name, text in {"proc/self/cgroup": cgroup, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_a_process_pinned_to_two_of_64_cores_has_two(machine):
    assert usable_cores(machine(affinity=2)) == 2


@pytest.mark.parametrize(("limit", "cores"), [("300000 100000", 3), ("150000 100000", 2), ("1000 100000", 1)])
def test_a_quota_of_cgroup_v2_is_rounded_up(machine, limit, cores):
    assert usable_cores(machine(**{"sys/fs/cgroup/cpu.max": limit})) == cores


def test_no_quota_leaves_the_affinity(machine):
    assert usable_cores(machine(affinity=5, **{"sys/fs/cgroup/cpu.max": "max 100000"})) == 5


def test_a_quota_above_the_affinity_changes_nothing(machine):
    assert usable_cores(machine(affinity=2, **{"sys/fs/cgroup/cpu.max": "800000 100000"})) == 2


def test_the_quota_of_a_group_above_holds_too(machine):
    files = {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "400000 100000"}
    assert usable_cores(machine(cgroup="0::/a/b\n", **files)) == 4


def test_a_quota_of_cgroup_v1_counts(machine):
    group = "sys/fs/cgroup/cpu,cpuacct/job"
    files = {f"{group}/cpu.cfs_quota_us": "700000\n", f"{group}/cpu.cfs_period_us": "100000\n"}
    assert usable_cores(machine(cgroup="5:memory:/job\n4:cpu,cpuacct:/job\n", **files)) == 7


def test_minus_one_is_no_quota_in_cgroup_v1(machine):
    group = "sys/fs/cgroup/cpu"
    files = {f"{group}/cpu.cfs_quota_us": "-1\n", f"{group}/cpu.cfs_period_us": "100000\n"}
    assert usable_cores(machine(cgroup="4:cpu:/docker/abc\n", **files)) == 64


def test_a_container_that_sees_its_hosts_path_finds_its_quota_at_the_mount(machine):
    group = "sys/fs/cgroup/cpu"
    files = {f"{group}/cpu.cfs_quota_us": "200000\n", f"{group}/cpu.cfs_period_us": "100000\n"}
    assert usable_cores(machine(cgroup="4:cpu:/docker/abc\n", **files)) == 2


def test_without_cgroups_the_affinity_counts(tmp_path):
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_a_lazy_map_keeps_order_and_takes_no_more_items_than_it_was_allowed():
    taken = []
    with ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, lambda item: -item, (taken.append(i) or i for i in range(9)), 3)
        assert next(results) == 0 and taken == [0, 1, 2]
        assert next(results) == -1 and taken == [0, 1, 2, 3]
        assert [*results] == [-2, -3, -4, -5, -6, -7, -8]
        assert [*map_ahead(pool, abs, [], 3)] == []
