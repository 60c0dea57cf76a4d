"""The loader of stage two against torchvision's ImageFolder with a DataLoader.

Both read the same JPEG files and make random resized crops of the same scale, ratio, size and filter, as batches of
uint8, with the same number of worker processes, which are started and warm before anything is timed. The loader also
gathers a 768-wide target for each image. Another line has the same loader read what stage one keeps of these files with
`cache.pixels = "jpeg-256"`. A last one has the loader's views in torch's DataLoader: what is left
between it and the first is the machinery, what is between it and the second is the decoding. The three take turns, pass
by pass, in one process, so that a busy machine slows all of them: trust the ratios.

torch's DataLoader gives each worker whole batches: with few batches a pass some of its workers would idle at the end of
each. So a pass has at least four for each worker; where the files do not suffice, it goes over them several times.

The files are made here: several octaves of noise, gradients and edges, saved with quality 90. A few pictures are
written many times over, since making them takes longer than reading them. `--check` judges large photos alone: of the
others there is a report and no promise.

    python benchmarks/loader.py [--workers 2] [--repeats 5] [--photos large,medium,imagenet,small] [--paper]
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, PILToTensor, RandomResizedCrop

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.mapped import MappedArray
from dimefm.cache.disk.row_tables import IMAGE_COLUMNS, RowTable, write_rows
from dimefm.cache.reader.feature_cache import EmbeddingSet
from dimefm.cache.reader.pixel_packs import PixelPacks, pack_path, writing_pack
from dimefm.stages.counter_random import uniforms
from dimefm.stages.embed.pack_pixels import make_small
from dimefm.stages.images.crops import NUM_UNIFORMS
from dimefm.stages.images.decode import decode_image
from dimefm.stages.images.views import ViewMaker
from dimefm.stages.inputs.image_folder import ImageFolder as FolderOfImages
from dimefm.stages.inputs.kept_pixels import KeptPixels
from dimefm.stages.load.batches import BatchLoader
from dimefm.stages.sample.order import Stream
from dimefm.stages.settings.distill import AugmentSettings

PHOTOS = {"large": (2048, 1536), "medium": (1024, 768), "imagenet": (500, 375), "small": (320, 240)}
NUM_PICTURES = 12
WIDTH = 768
LIMIT = 2.0
BATCHES_PER_WORKER = 4
"""In one pass, at least."""
OURS, THEIRS, MIXED = "BatchLoader", "ImageFolder + DataLoader", "our views in DataLoader"
KEPT, KEPT_SIDE = "BatchLoader, kept pixels", 256


def picture(width: int, height: int, seed: int) -> bytes:
    """A JPEG with detail at every size, about as many bytes a pixel as a photo's."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 10):
        cells = rng.normal(size=(2**octave * 3 // 4, 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(cells[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[:, :, channel] += np.asarray(layer) * 60 / 1.5**octave
    pixels += np.linspace(-40, 40, width)[None, :, None]
    for _ in range(20):
        left, top = rng.integers(width), rng.integers(height)
        pixels[top : top + height // 5, left : left + width // 5] += rng.normal(size=3) * 30
    pixels += rng.normal(size=(height, width, 1)) * 4  # a sensor's grain
    buffer = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_files(root: Path, size: tuple[int, int], count: int) -> int:
    """Write the files where ImageFolder finds a class; returns the bytes of one."""
    (root / "class").mkdir(parents=True)
    pictures = [picture(*size, seed) for seed in range(NUM_PICTURES)]
    for i in range(count):
        (root / "class" / f"{i:06d}.jpg").write_bytes(pictures[i % NUM_PICTURES])
    return sum(map(len, pictures)) // NUM_PICTURES


def cached_images(folder: Path, count: int) -> EmbeddingSet:
    """Rows and targets for the files, as a cache has them."""
    spec = ArraySpec((count, WIDTH), "float16", count)
    declare_arrays(folder / "teacher.zarr", {"images": spec})
    write_chunk(folder / "teacher.zarr", "images", spec, 0, np.random.default_rng(0).normal(size=(count, WIDTH)))
    write_rows(
        folder / "images.parquet", IMAGE_COLUMNS, ({"source": f"class/{i:06d}.jpg"} for i in range(count)), count
    )
    return EmbeddingSet(MappedArray.open(folder / "teacher.zarr", "images"), RowTable(folder / "images.parquet"))


def kept_pixels(folder: Path, count: int) -> KeptPixels:
    """The same files as stage one keeps them, in one pack."""
    with writing_pack(pack_path(folder / "pixels", 0), count) as writer:
        for i in range(count):
            data = (folder / "photos" / "class" / f"{i:06d}.jpg").read_bytes()
            writer.add(make_small(data, decode_image(data), KEPT_SIDE))
    return KeptPixels(PixelPacks(folder / "pixels", f"jpeg-{KEPT_SIDE}", count, count))


class Views(Dataset[torch.Tensor]):
    """The loader's views as a dataset that DataLoader takes."""

    def __init__(self, files: FolderOfImages, count: int, maker: ViewMaker) -> None:
        self._files, self._maker = files, maker
        self._names = [f"class/{i:06d}.jpg" for i in range(count)]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: int) -> torch.Tensor:
        numbers = uniforms(5, np.array([row]), np.array([0]), NUM_UNIFORMS).tolist()[0]
        return torch.from_numpy(self._maker.view(self._files.read(self._names[row]), numbers).copy())


def rounds_of_a_pass(options: argparse.Namespace) -> int:
    """How often a pass goes over the files."""
    return max(1, -(-BATCHES_PER_WORKER * options.workers * options.batch // options.count))


def drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def measure(folder: Path, options: argparse.Namespace, settings: AugmentSettings) -> dict[str, list[float]]:
    """Images a second of each contender, pass by pass in turn; the first pass warms and is not counted."""
    images = cached_images(folder, options.count)
    files, rounds = FolderOfImages(folder / "photos"), rounds_of_a_pass(options)
    steps = rounds * options.count // options.batch
    maker = ViewMaker(settings, options.size, Image.Resampling.BICUBIC)
    crop = RandomResizedCrop(options.size, settings.scale, settings.ratio, InterpolationMode.BICUBIC)
    torchs = {"batch_size": options.batch, "shuffle": True, "num_workers": options.workers, "persistent_workers": True}
    folders = ImageFolder(folder / "photos", Compose([crop, PILToTensor()]))
    folder_loader: DataLoader[Any] = DataLoader(ConcatDataset([folders] * rounds), **torchs)
    view_loader: DataLoader[Any] = DataLoader(ConcatDataset([Views(files, options.count, maker)] * rounds), **torchs)
    seconds: dict[str, list[float]] = {OURS: [], KEPT: [], THEIRS: [], MIXED: []}
    with ExitStack() as stack:
        stream = Stream(np.arange(options.count), options.batch, 0, "images")
        loader, kept_loader = (
            stack.enter_context(
                BatchLoader(images, stream, pixels, [maker], 5, workers=options.workers, processes=not options.threads)
            )
            for pixels in (files, kept_pixels(folder, options.count))
        )
        for turn in range(options.repeats + 1):
            runs: dict[str, Callable[[], None]] = {
                OURS: partial(drain, loader.batches(turn * steps, (turn + 1) * steps)),
                KEPT: partial(drain, kept_loader.batches(turn * steps, (turn + 1) * steps)),
                THEIRS: partial(drain, folder_loader),
                MIXED: partial(drain, view_loader),
            }
            for name in list(runs) if turn % 2 else list(runs)[::-1]:
                began = time.perf_counter()
                runs[name]()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    return {name: [rounds * options.count / value for value in values] for name, values in seconds.items()}


def report(rates: dict[str, list[float]]) -> float:
    """Print rates and ratios; returns the median ratio of the loader to ImageFolder."""
    for name, values in rates.items():
        print(
            f"  {name:<26} median {statistics.median(values):9,.0f} images/s   {min(values):,.0f} to {max(values):,.0f}"
        )
    gains = [kept / ours for kept, ours in zip(rates[KEPT], rates[OURS])]
    print(f"  {KEPT} / {OURS}: median {statistics.median(gains):.2f}   {min(gains):.2f} to {max(gains):.2f}")
    median = 0.0
    for base in (MIXED, THEIRS):
        ratios = [ours / other for ours, other in zip(rates[OURS], rates[base])]
        median = statistics.median(ratios)
        print(f"  {OURS} / {base}: median {median:.2f}   {min(ratios):.2f} to {max(ratios):.2f}")
    return median


def main() -> int:
    """Parse, make files, measure; 1 with `--check` where large photos fall short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default="large,imagenet", help=f"which of {', '.join(PHOTOS)}, with commas")
    parser.add_argument("--count", type=int, default=512, help="files of each kind")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="side of a view")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", action="store_true", help="threads in place of the loader's processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--paper", action="store_true", help="scale 0.08-1 with flips in place of 0.65-1")
    parser.add_argument(
        "--dir", type=Path, default=None, help="disk for the files; a temporary folder in it is removed"
    )
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if large photos gain less than {LIMIT}")
    options = parser.parse_args()
    options.count -= options.count % options.batch
    settings = AugmentSettings(preset="paper") if options.paper else AugmentSettings()
    short = False
    for kind in options.photos.split(","):
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="loader-") as name:
            num_bytes = make_files(Path(name) / "photos", PHOTOS[kind], options.count)
            width, height = PHOTOS[kind]
            print(
                f"{kind}: {options.count} JPEGs of {width} x {height}, {num_bytes / 1e3:,.0f} kB each; views of "
                f"{options.size}, scale {settings.scale}; {options.workers} workers, batches of {options.batch}, "
                f"{rounds_of_a_pass(options) * options.count // options.batch} a pass"
            )
            ratio = report(measure(Path(name), options, settings))
            short |= kind == "large" and ratio < LIMIT
    return int(options.check and short)


if __name__ == "__main__":
    sys.exit(main())
