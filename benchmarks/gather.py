"""Random rows out of the cache: warm against a plain NumPy memory map, cold against sixteen threads that read them.

`python benchmarks/gather.py --dir /some/disk` writes 1,000,000 x 768 float16 twice, once as the cache's chunk files and
once as one raw file, then gathers the same 4,096 random rows from both in turn.

Warm: every page has been read before. Cold: `posix_fadvise(DONTNEED)` has thrown each file out of the page cache, which
`mincore` confirms, and the files are opened anew, before every single gather; a disk's own or a host's cache behind it
is not emptied. The bytes that came from the disk (`/proc/self/io`) are held against those of the pages that the rows
lie on.
"""

import argparse
import ctypes
import gc
import mmap
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.mapped import MappedArray

NAME = "images/embedding"
LIMIT = 1.5
"""Of time: warm over NumPy's map, cold over threads that read."""
BYTES_LIMIT = 1.2
"""Of bytes read cold over those of the pages wanted."""
THREADS = 16

Gather = Callable[[NDArray[np.int64]], NDArray[Any]]


def write_both(folder: Path, spec: ArraySpec) -> None:
    """Write the same random bytes as chunk files below `folder` and as one raw file."""
    rng = np.random.default_rng(0)
    declare_arrays(folder / "store.zarr", {NAME: spec})
    with (folder / "raw.f2").open("wb") as raw:
        for chunk in range(spec.num_chunks):
            num_rows = min(spec.chunk_rows, spec.shape[0] - chunk * spec.chunk_rows)
            block = rng.standard_normal((num_rows, spec.shape[1]), dtype=np.float32).astype(np.float16)
            write_chunk(folder / "store.zarr", NAME, spec, chunk, block)
            block.tofile(raw)
        raw.flush()
        os.fsync(raw.fileno())


def open_mapped(folder: Path, spec: ArraySpec) -> Gather:
    """The cache's own reader."""
    array = MappedArray.open(folder / "store.zarr", NAME)
    return array.__getitem__


def open_plain(folder: Path, spec: ArraySpec) -> Gather:
    """NumPy's memory map of the one raw file."""
    array = np.memmap(folder / "raw.f2", dtype=np.float16, mode="r", shape=spec.shape)
    return array.__getitem__


def open_reading(folder: Path, spec: ArraySpec) -> Gather:
    """Sixteen threads that read rows of the one raw file, each row by itself."""
    row_bytes = spec.shape[1] * 2

    def gather(rows: NDArray[np.int64]) -> NDArray[Any]:
        out = np.empty((len(rows), spec.shape[1]), dtype=np.float16)
        bytes_of = out.reshape(-1).view(np.uint8).data
        handle = os.open(folder / "raw.f2", os.O_RDONLY)

        def read(places: range) -> None:
            for place in places:
                into = bytes_of[place * row_bytes : (place + 1) * row_bytes]
                os.preadv(handle, [into], int(rows[place]) * row_bytes)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read, (range(first, len(rows), THREADS) for first in range(THREADS))))
        os.close(handle)
        return out

    return gather


def time_s(gather: Gather, rows: NDArray[np.int64]) -> float:
    """Seconds of one gather."""
    start = time.perf_counter()
    gather(rows)
    return time.perf_counter() - start


def drop_pages(folder: Path) -> int:
    """Throw the files, clean and mapped by nobody, out of the page cache. Returns the bytes that stay."""
    left = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                left += mmap.PAGESIZE * resident_pages(file.fileno())
    return left


def resident_pages(handle: int) -> int:
    """Pages of a file that are in memory."""
    with mmap.mmap(handle, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages
        )
        del first
    if failed:
        raise SystemExit("mincore: refused")
    return int((np.ctypeslib.as_array(pages) & 1).sum())


def bytes_read() -> int:
    """Bytes that this process has had from disks so far."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def bytes_of_pages(rows: NDArray[np.int64], spec: ArraySpec) -> int:
    """Bytes of the pages that rows lie on, in a file that holds nothing else."""
    row_bytes = spec.shape[1] * 2
    first, last = rows * row_bytes // mmap.PAGESIZE, ((rows + 1) * row_bytes - 1) // mmap.PAGESIZE
    pages = [np.minimum(first + i, last) for i in range(int((last - first).max()) + 1)]
    return mmap.PAGESIZE * len(np.unique(np.concatenate(pages)))


def describe(name: str, seconds: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = (value * 1e3 for value in statistics.quantiles(seconds, n=4))
    return f"  {name:<14} median {middle:8.2f} ms   quartiles {low:8.2f} to {high:8.2f}"


def measure_warm(folder: Path, spec: ArraySpec, num_gathered: int, repeats: int) -> float:
    """Print figures; return the ratio of medians, cache's reader over plain map."""
    rng = np.random.default_rng(1)
    readers = {"MappedArray": open_mapped, "np.memmap": open_plain}
    gathers = {name: reader(folder, spec) for name, reader in readers.items()}
    # One pass over every page, of both in turn: page cache and page tables are warm.
    for rows in np.array_split(rng.permutation(spec.shape[0]), spec.shape[0] // num_gathered + 1):
        for gather in gathers.values():
            gather(rows)
    waited = dict.fromkeys(readers, 0)
    warm: dict[str, list[float]] = {name: [] for name in readers}
    for repeat in range(repeats):
        rows = rng.integers(spec.shape[0], size=num_gathered)
        for name in list(readers) if repeat % 2 else list(readers)[::-1]:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            warm[name].append(time_s(gathers[name], rows))
            waited[name] += resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
    mapped, plain = (gathers[name](rows) for name in readers)
    if mapped.tobytes() != plain.tobytes():
        raise SystemExit("MappedArray and np.memmap gave different bytes")
    print(f"warm, {repeats} repeats in turn:")
    for name, seconds in warm.items():
        print(f"{describe(name, seconds)}   {waited[name]} pages were on disk")
    ratio = statistics.median(warm["MappedArray"]) / statistics.median(warm["np.memmap"])
    print(f"  ratio of medians {ratio:.2f} (wanted: at most {LIMIT})")
    return ratio


def measure_cold(folder: Path, spec: ArraySpec, num_gathered: int, repeats: int) -> tuple[float, float]:
    """Print figures; return the ratio of median times, and bytes read over those of the pages wanted."""
    rng = np.random.default_rng(2)
    readers = {"MappedArray": open_mapped, f"{THREADS} x pread": open_reading}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    read: dict[str, list[float]] = {name: [] for name in readers}
    left = 0
    for _ in range(repeats):
        rows = rng.integers(spec.shape[0], size=num_gathered)
        wanted = bytes_of_pages(rows, spec)
        for name, reader in readers.items():
            gc.collect()  # the maps of the turn before must be gone, or their pages stay
            left = max(left, drop_pages(folder))
            gather = reader(folder, spec)
            before = bytes_read()
            seconds[name].append(time_s(gather, rows))
            read[name].append((bytes_read() - before) / wanted)
            del gather
    print(f"cold, {repeats} repeats in turn, pages dropped with posix_fadvise(DONTNEED) and files opened anew:")
    print(f"  left in memory by this file system: {left / 1e6:,.1f} MB of {2 * spec.num_bytes / 1e6:,.1f} MB")
    print(f"  pages that the rows lie on: {wanted / 1e6:,.1f} MB")
    for name, each in seconds.items():
        print(f"{describe(name, each)}   read {statistics.median(read[name]):.2f} x the pages wanted")
    ours, theirs = (statistics.median(each) for each in seconds.values())
    share = statistics.median(read["MappedArray"])
    print(
        f"  ratio of medians {ours / theirs:.2f} (wanted: at most {LIMIT}); bytes {share:.2f} (at most {BYTES_LIMIT})"
    )
    return ours / theirs, share


def main() -> int:
    """Parse, write, measure; 1 with `--check` when a ratio is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="disk to measure; a temporary folder in it is removed")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chunk-rows", type=int, default=8192)
    parser.add_argument("--gather", type=int, default=4096, help="random rows of one gather")
    parser.add_argument("--repeats", type=int, default=25, help="warm repeats")
    parser.add_argument("--cold-repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a ratio is above its limit")
    options = parser.parse_args()
    spec = ArraySpec((options.rows, options.width), "float16", options.chunk_rows)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="gather-") as name:
        folder = Path(name)
        print(
            f"{options.gather:,} random rows of {options.rows:,} x {options.width} float16 "
            f"({spec.num_bytes / 1e9:.2f} GB in chunks of {options.chunk_rows:,} rows), pages of {mmap.PAGESIZE} bytes"
        )
        write_both(folder, spec)
        ratio = measure_warm(folder, spec, options.gather, options.repeats)
        cold, share = measure_cold(folder, spec, options.gather, options.cold_repeats)
    return int(options.check and (max(ratio, cold) > LIMIT or share > BYTES_LIMIT))


if __name__ == "__main__":
    sys.exit(main())
