"""Random rows out of the cache against a plain NumPy memory map of the same bytes.

`python benchmarks/gather.py --dir /some/disk` writes 1,000,000 x 768 float16 twice, once as the cache's chunk files and
once as one raw file, then gathers the same 4,096 random rows from both in turn.

Warm: every page has been read before. Cold: `posix_fadvise(DONTNEED)` has thrown each file out of the page cache, and
the file is mapped anew, before every single gather; a disk's own or a host's cache behind it is not emptied.
"""

import argparse
import gc
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.mapped import MappedArray

NAME = "images/embedding"
LIMIT = 1.5

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


def time_s(gather: Gather, rows: NDArray[np.int64]) -> float:
    """Seconds of one gather."""
    start = time.perf_counter()
    gather(rows)
    return time.perf_counter() - start


def drop_pages(folder: Path) -> None:
    """Throw the files out of the page cache. They must be clean (fsynced) and mapped by nobody."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def describe(name: str, seconds: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = (value * 1e3 for value in statistics.quantiles(seconds, n=4))
    return f"  {name:<14} median {middle:8.2f} ms   quartiles {low:8.2f} to {high:8.2f}"


def measure(folder: Path, spec: ArraySpec, num_gathered: int, repeats: int, cold_repeats: int) -> float:
    """Print warm and cold figures; return the warm ratio of medians, cache's reader over plain map."""
    rng = np.random.default_rng(1)
    readers = {"MappedArray": open_mapped, "np.memmap": open_plain}

    gathers = {name: reader(folder, spec) for name, reader in readers.items()}
    everything = np.arange(spec.shape[0])
    for gather in gathers.values():  # one pass over every page: page cache and page tables are warm
        for start in range(0, spec.shape[0], spec.chunk_rows):
            gather(everything[start : start + spec.chunk_rows])
    warm: dict[str, list[float]] = {name: [] for name in readers}
    for repeat in range(repeats):
        rows = rng.integers(spec.shape[0], size=num_gathered)
        for name in list(readers) if repeat % 2 else list(readers)[::-1]:
            warm[name].append(time_s(gathers[name], rows))
    mapped, plain = (gathers[name](rows) for name in readers)
    if mapped.tobytes() != plain.tobytes():
        raise SystemExit("MappedArray and np.memmap gave different bytes")
    print(f"warm, {repeats} repeats in turn:")
    for name, seconds in warm.items():
        print(describe(name, seconds))
    ratio = statistics.median(warm["MappedArray"]) / statistics.median(warm["np.memmap"])
    print(f"  ratio of medians {ratio:.2f} (wanted: at most {LIMIT})")

    del gathers, gather
    cold: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(cold_repeats):
        rows = rng.integers(spec.shape[0], size=num_gathered)
        for name, reader in readers.items():
            gc.collect()  # the maps of the turn before must be gone, or their pages stay
            drop_pages(folder)
            cold[name].append(time_s(reader(folder, spec), rows))
    print(f"cold, {cold_repeats} repeats in turn, pages dropped with posix_fadvise(DONTNEED) and files mapped anew:")
    for name, seconds in cold.items():
        print(describe(name, seconds))
    return ratio


def main() -> int:
    """Parse, write, measure; 1 with `--check` when the ratio is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="disk to measure; a temporary folder in it is removed")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chunk-rows", type=int, default=8192)
    parser.add_argument("--gather", type=int, default=4096, help="random rows of one gather")
    parser.add_argument("--repeats", type=int, default=25, help="warm repeats")
    parser.add_argument("--cold-repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true", help=f"exit with 1 when the warm ratio is above {LIMIT}")
    options = parser.parse_args()
    spec = ArraySpec((options.rows, options.width), "float16", options.chunk_rows)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="gather-") as name:
        folder = Path(name)
        print(
            f"{options.gather:,} random rows of {options.rows:,} x {options.width} float16 "
            f"({spec.num_bytes / 1e9:.2f} GB in chunks of {options.chunk_rows:,} rows), pages of {mmap.PAGESIZE} bytes"
        )
        write_both(folder, spec)
        ratio = measure(folder, spec, options.gather, options.repeats, options.cold_repeats)
    return int(options.check and ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
