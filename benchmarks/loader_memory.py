"""Memory of the loader's worker processes against the number of rows: it must not grow, wherever pictures come from.

A synthetic row table names as many images as wanted. Every name leads to one of a few real files: each folder that the
table names is a link to the one that holds them. The same rows are read from kept pixels as well, whose packs are links
to one real pack, of fewer rows than a cache's (1,024), so that there are more packs to open. A worker holds up to 64
packs open; the fewest rows should have more than these, or the memory rises until it does. The loader runs some steps
with worker processes, and then each worker's private memory is read: what the machine would have back if that process
ended (USS: Private_Clean and Private_Dirty of /proc/PID/smaps_rollup). Pages that workers share, as they do the slots
for views, are not in it; they are part of what is shown for the loader's own process (PSS), as is, for the files, the
one column that has the names.

    python benchmarks/loader_memory.py [--rows 100000,1000000,10000000] [--workers 4] [--check]
    python benchmarks/loader_memory.py --dataloader      # ours against torch's DataLoader with the same views
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from loader import PHOTOS, picture
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.mapped import MappedArray
from dimefm.cache.disk.row_tables import RowTable
from dimefm.cache.reader.feature_cache import EmbeddingSet
from dimefm.cache.reader.pixel_packs import PixelPacks, pack_path, writing_pack
from dimefm.stages.counter_random import uniforms
from dimefm.stages.embed.pack_pixels import make_small
from dimefm.stages.images.crops import NUM_UNIFORMS
from dimefm.stages.images.decode import decode_image
from dimefm.stages.images.views import ViewMaker, make_views
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.inputs.image_source import ImageSource
from dimefm.stages.inputs.kept_pixels import KeptPixels
from dimefm.stages.load.batches import BatchLoader
from dimefm.stages.sample.order import Stream
from dimefm.stages.settings.distill import AugmentSettings

FILES = 1000
CHUNK_ROWS = 65_536
PACK_ROWS, PACK_SIDE = 1024, 256
SOURCES = ("kept pixels", "image files")
LIMIT = 1.1
"""How much a worker may hold with the most rows against the fewest."""


def make_table(path: Path, num_rows: int) -> None:
    """A row table as stage one writes it, in pieces; only what the loader reads."""
    schema = pa.schema([("row", pa.int64()), ("source", pa.string()), ("status", pa.string()), ("reason", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, CHUNK_ROWS):
            rows = range(first, min(first + CHUNK_ROWS, num_rows))
            names = [f"{row // FILES:08d}/{row % FILES:06d}.jpg" for row in rows]
            writer.write_table(pa.table([list(rows), names, ["ok"] * len(rows), [None] * len(rows)], schema=schema))


def make_images(root: Path, pictures: list[bytes], num_rows: int) -> None:
    """The real files, and a link for each folder that the table names."""
    (root / "files").mkdir(parents=True)
    for i in range(FILES):
        (root / "files" / f"{i:06d}.jpg").write_bytes(pictures[i % len(pictures)])
    for folder in range(-(-num_rows // FILES)):
        (root / f"{folder:08d}").symlink_to("files")


def make_packs(folder: Path, pictures: list[bytes], num_rows: int) -> KeptPixels:
    """One real pack, and a link for each that the rows are in."""
    small = [make_small(data, decode_image(data), PACK_SIDE) for data in pictures]
    with writing_pack(folder / "one", PACK_ROWS) as writer:
        for i in range(PACK_ROWS):
            writer.add(small[i % len(small)])
    for shard in range(-(-num_rows // PACK_ROWS)):
        pack_path(folder, shard).symlink_to("one")
    return KeptPixels(PixelPacks(folder, f"jpeg-{PACK_SIDE}", num_rows, PACK_ROWS))


def rollup(pid: int) -> dict[str, int]:
    """The sums of /proc/PID/smaps_rollup, bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def unique(pid: int) -> int:
    sums = rollup(pid)
    return sums["Private_Clean"] + sums["Private_Dirty"]


@dataclass(frozen=True)
class Memory:
    """Bytes after some steps: private ones of each worker, upward; of the loader's own process; of all below it."""

    workers: list[int]
    own: int
    children: int


def make_cache(folder: Path, num_rows: int) -> EmbeddingSet:
    """Rows and (narrow) targets."""
    make_table(folder / "images.parquet", num_rows)
    spec = ArraySpec((num_rows, 8), "float16", CHUNK_ROWS)
    declare_arrays(folder / "teacher.zarr", {"images": spec})
    for chunk in range(spec.num_chunks):
        write_chunk(folder / "teacher.zarr", "images", spec, chunk, np.zeros((spec.rows_of(chunk), 8)))
    return open_cache(folder)


def open_cache(folder: Path) -> EmbeddingSet:
    """What `make_cache` has made."""
    return EmbeddingSet(MappedArray.open(folder / "teacher.zarr", "images"), RowTable(folder / "images.parquet"))


def measure(images: EmbeddingSet, pixels: ImageSource, options: argparse.Namespace) -> Memory:
    """Run some steps and read the memory."""
    loader = BatchLoader(
        images,
        Stream(images.usable, options.batch, 0, "images"),
        pixels,
        [ViewMaker(AugmentSettings(), 224, Image.Resampling.BICUBIC)],
        view_key=5,
        workers=options.workers,
        processes=True,
    )
    with loader:
        for _ in loader.batches(0, options.steps):
            pass
        workers = sorted(unique(child.pid) for child in multiprocessing.active_children() if child.pid)
        return Memory(workers, rollup(multiprocessing.current_process().pid or 0)["Pss"], children_pss())


class Views(Dataset[torch.Tensor]):
    """The views of each step for torch's DataLoader: one item is one batch, which one worker makes."""

    def __init__(self, stream: Stream, source: ImageSource, keys: Sequence[str]) -> None:
        self.stream, self.source, self.keys = stream, source, keys

    def __getitem__(self, step: int) -> torch.Tensor:
        draw = self.stream.draw(step)
        maker = ViewMaker(AugmentSettings(), 224, Image.Resampling.BICUBIC)
        views = np.empty((len(draw.rows), 224, 224, 3), np.uint8)
        numbers = uniforms(5, draw.rows, draw.passes, NUM_UNIFORMS).tolist()
        for i, (row, number) in enumerate(zip(draw.rows, numbers)):
            views[i] = make_views([maker], self.source.read(self.keys[row]), number)[0]
        return torch.from_numpy(views)


def measure_ours(folder: Path, options: argparse.Namespace) -> int:
    """PSS of all processes that make views."""
    return measure(open_cache(folder), ImageFolder(folder / "photos"), options).children


def measure_dataloader(folder: Path, options: argparse.Namespace) -> int:
    """PSS of all processes that torch's DataLoader starts, after some steps.

    They come from a fork server, as ours do: a fork of the trainer would inherit its threads, its student and its GPU.
    The server has loaded all that workers need, so that its pages are shared; each has one batch in the making.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["torchvision.datasets", "dimefm.stages.load.batches", "dimefm.stages.embed.pack_pixels"]
    )
    images, source = open_cache(folder), ImageFolder(folder / "photos")
    stream = Stream(images.usable, options.batch, 0, "images")
    loader = DataLoader(
        Views(stream, source, images.rows.column("source").to_pylist()),
        batch_size=None,
        sampler=range(options.steps),
        num_workers=options.workers,
        prefetch_factor=1,
        multiprocessing_context=server,
    )
    for step, _ in enumerate(loader):
        if step == options.steps // 2:
            return children_pss()
    raise AssertionError("no step was measured")


def children_pss() -> int:
    """PSS of every process below this one."""
    return sum(rollup(child.pid)["Pss"] for child in psutil.Process().children(recursive=True))


def compare(options: argparse.Namespace) -> None:
    """Ours and torch's DataLoader, on the same few files."""
    pictures = [picture(*PHOTOS["imagenet"], seed) for seed in range(8)]
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="loader-memory-") as name:
        make_cache(Path(name), FILES)
        make_images(Path(name) / "photos", pictures, FILES)
        # Each in a process of its own: the two want fork servers that have loaded different things.
        spawned = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(2)]
        with spawned[0], spawned[1]:
            ours = spawned[0].submit(measure_ours, Path(name), options).result()
            theirs = spawned[1].submit(measure_dataloader, Path(name), options).result()
    print(f"{options.workers} workers, batches of {options.batch}: PSS of all processes that make views")
    print(f"  ours {ours / 2**20:,.0f} MiB, torch's DataLoader {theirs / 2**20:,.0f} MiB: {theirs / ours:.2f} times")


def main() -> int:
    """Parse and measure; 1 with `--check` where memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000,10000000", help="numbers of rows, with commas, upward")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--dir", type=Path, default=None, help="disk for the files; a temporary folder in it is removed"
    )
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 where the most rows take {LIMIT} x the fewest"
    )
    parser.add_argument("--dataloader", action="store_true", help="compare with torch's DataLoader, and nothing else")
    options = parser.parse_args()
    if options.dataloader:
        compare(options)
        return 0
    medians: dict[str, list[float]] = {source: [] for source in SOURCES}
    pictures = [picture(*PHOTOS["imagenet"], seed) for seed in range(8)]
    print(f"{options.workers} workers, {options.steps} steps of {options.batch} images; private memory of each worker")
    for num_rows in map(int, options.rows.split(",")):
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="loader-memory-") as name:
            folder = Path(name)
            images = make_cache(folder, num_rows)
            make_images(folder / "photos", pictures, num_rows)
            packs = make_packs(folder / "packs", pictures, num_rows)
            for source in SOURCES:  # kept pixels first: the column of names is not there yet
                found = measure(images, packs if source == SOURCES[0] else ImageFolder(folder / "photos"), options)
                medians[source].append(statistics.median(found.workers))
                shown = ", ".join(f"{size / 2**20:.1f}" for size in found.workers)
                own = f"(the loader's own process: {found.own / 2**20:,.0f} MiB)"
                print(f"  {num_rows:>12,} rows, {source}: {shown} MiB   {own}", flush=True)
    grown = {source: sizes[-1] / sizes[0] for source, sizes in medians.items()}
    for source, ratio in grown.items():
        print(f"  {source}: most rows / fewest: {ratio:.2f} (wanted: at most {LIMIT})")
    return int(options.check and max(grown.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
