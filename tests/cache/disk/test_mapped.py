"""Gathers from mapped chunks: NumPy's rules, the pages that are wanted alone, threads only to wait for a disk."""

import itertools
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dimefm.cache.disk import gather, mapped
from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.gather import THREADS, Items
from dimefm.cache.disk.mapped import MappedArray
from dimefm.cache.errors import CacheError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PAGE = 4096


def write(folder: Path, num_rows: int, chunk_rows: int, *shape: int) -> np.ndarray:
    """An array `rows` of float16 in a store; returns its values."""
    spec = ArraySpec((num_rows, *shape), "float16", chunk_rows)
    values = np.random.default_rng(0).normal(size=spec.shape).astype(np.float16)
    declare_arrays(folder, {"rows": spec})
    for chunk in range(spec.num_chunks):
        write_chunk(folder, "rows", spec, chunk, values[chunk * chunk_rows : (chunk + 1) * chunk_rows])
    return values


@pytest.fixture(params=["joined", "apart"])
def how(request, monkeypatch):
    """Chunks mapped side by side, and one by one."""
    if request.param == "apart":
        monkeypatch.setattr("dimefm.cache.disk.mapped.map_side_by_side", lambda paths, chunk_bytes: None)
    return request.param


@pytest.fixture
def takers(monkeypatch) -> list[int]:
    """The threads that copy items, one entry a copy."""
    seen, take = [], Items.take

    def watched(self, *arguments):
        seen.append(threading.get_ident())
        return take(self, *arguments)

    monkeypatch.setattr(Items, "take", watched)
    return seen


@pytest.mark.parametrize("rows", [7, np.int32(149), [[3, 149], [64, 3], [0, 1]], np.zeros((2, 0), np.int64)])
def test_rows_of_any_shape_are_taken_as_numpy_takes_them(tmp_path, how, rows):
    values = write(tmp_path, 150, 64, 32)
    found = MappedArray.open(tmp_path, "rows")[rows]
    assert found.shape == values[rows].shape and np.array_equal(found, values[rows])


@pytest.mark.parametrize("rows", [-1, 150, True, 1.5])
def test_one_row_that_is_none_is_refused_as_many_are(tmp_path, how, rows):
    write(tmp_path, 150, 64, 32)
    with pytest.raises((IndexError, TypeError)):
        MappedArray.open(tmp_path, "rows")[rows]


@linux
def test_gathers_and_scans_have_maps_of_their_own(tmp_path, how):
    write(tmp_path, 150, 64, 32)
    array = MappedArray.open(tmp_path, "rows")
    advised: dict[str, list[set[str]]] = {}
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        name, flags = entry.partition("\n")[0].split(" ")[-1], re.search(r"^VmFlags:(.*)$", entry, re.MULTILINE)
        if name.startswith(str(tmp_path)) and flags:
            advised.setdefault(name, []).append({"rr", "sr"} & set(flags[1].split()))
    assert len(advised) == 3  # chunks, each mapped for random reads and without advice
    assert all(sorted(flags, key=len) == [set(), {"rr"}] for flags in advised.values())
    assert len(array) == 150


@pytest.mark.parametrize("views", [(), (3,)])
def test_what_is_gathered_by_threads_is_what_is_gathered_by_one(tmp_path, how, takers, monkeypatch, views):
    values = write(tmp_path, 3000, 64, *views, 32)
    array = MappedArray.open(tmp_path, "rows")
    rows = np.random.default_rng(1).integers(0, 3000, 333)
    waits = itertools.count(0, PAGE)
    monkeypatch.setattr(gather, "_waits", lambda: next(waits))  # as if every page had to be waited for
    assert np.array_equal(array[rows], values[rows])
    if views:
        which = rows % 3
        assert np.array_equal(array.at(rows, which), values[rows, which])
    others = set(takers) - {threading.get_ident()}
    assert 1 <= len(others) <= THREADS * (2 if views else 1)


def test_no_thread_is_started_for_pages_in_memory_or_for_few_rows(tmp_path, how, takers, monkeypatch):
    values = write(tmp_path, 3000, 64, 32)
    array = MappedArray.open(tmp_path, "rows")
    rows = np.random.default_rng(1).integers(0, 3000, 300)
    assert np.array_equal(array[rows], values[rows])  # written a moment ago
    waits = itertools.count(0, PAGE)
    monkeypatch.setattr(gather, "_waits", lambda: next(waits))
    assert np.array_equal(array[rows[:16]], values[rows[:16]])
    assert np.array_equal(array[:], values)  # a scan: the system reads ahead
    assert set(takers) == {threading.get_ident()}


def drop_pages(folder: Path) -> None:
    for path in folder.rglob("c/*/*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """From disks, by all threads of this process, so far."""
    return int(re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


@linux
def test_of_pages_on_disk_a_gather_reads_those_of_its_rows_and_a_scan_all(tmp_path, how):
    values = write(tmp_path, 16384, 4096, 256)  # 8 MiB; eight rows are a page
    array = MappedArray.open(tmp_path, "rows")
    rows = np.random.default_rng(1).choice(16384, 200, replace=False)
    wanted = PAGE * len(np.unique(rows // 8))
    drop_pages(tmp_path)
    before = bytes_read()
    found = array[rows]
    read = bytes_read() - before
    if not read:
        pytest.skip("this file system keeps its pages, or is one in memory")
    assert np.array_equal(found, values[rows])
    assert read <= 1.2 * wanted
    assert all(np.array_equal(block, values[start : start + 4096]) for start, block in array.blocks())
    assert bytes_read() - before >= 0.9 * values.nbytes


def test_where_no_more_maps_are_allowed_one_of_each_file_will_do(tmp_path, monkeypatch):
    values, calls, map_files = write(tmp_path, 50, 8, 4), [], mapped.map_chunk
    monkeypatch.setattr(mapped, "map_side_by_side", lambda *_: None)

    def allowed(path, spec):
        calls.append(path)
        if len(calls) > spec.num_chunks:
            raise CacheError("no more memory maps")
        return map_files(path, spec)

    monkeypatch.setattr(mapped, "map_chunk", allowed)
    array = MappedArray.open(tmp_path, "rows")
    assert np.array_equal(array[[3, 49, 8]], values[[3, 49, 8]])
