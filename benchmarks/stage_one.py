"""Stage one against the slower of its two parts alone: the teacher's forward pass, and decoding.

    python benchmarks/stage_one.py [--images 192] [--model ViT-B-32] [--repeats 3] [--device auto]

All three run in this process, on the same files, in turn, several times: `forward` on batches that are already on the
device, `decode` through as many threads as stage one uses, `stage one` from files to durable chunk files through the
same scheduler as the command. Weights are random: speed does not depend on them. Prints rows/s and the ratio, with the
spread over the repeats; with --check, exits with 1 when the median ratio is under 0.9.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays
from dimefm.cache.disk.layout import IMAGES
from dimefm.cache.disk.row_tables import IMAGE_COLUMNS, write_rows
from dimefm.pipeline.stage_one.cluster.dispatch import run_shards
from dimefm.pipeline.stage_one.cluster.worker_side import TEACHERS
from dimefm.stages.devices import resolve_device
from dimefm.stages.embed.tasks import ShardTask
from dimefm.stages.images.decode import decode_image
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher, load_open_clip_teacher
from dimefm.stages.settings.models import TeacherSettings


def write_photo(path: Path, seed: int) -> None:
    """A 500 x 375 JPEG of about 60 kB: smooth shapes with grain, as large as a photo from the web."""
    numbers = np.random.default_rng(seed)
    coarse = Image.fromarray(numbers.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = numbers.normal(0, 12, smooth.shape)
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=85)


def seconds(work: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shard-rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = root / "weights.safetensors"
        model = open_clip.create_model(options.model)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
        del model
        settings = TeacherSettings(
            model=options.model,
            pretrained=str(weights),
            precision=options.precision,
            batch_size=options.batch_size,
            device=options.device,
        )
        teacher = load_open_clip_teacher(settings, resolve_device(options.device))
        files = [root / f"{i:05d}.jpg" for i in range(options.images)]
        for seed, path in enumerate(files):
            write_photo(path, seed)
        ratios = compare(root, files, settings, teacher, options)
    if options.check and statistics.median(ratios) < 0.9:
        sys.exit(1)


def compare(
    root: Path,
    files: list[Path],
    settings: TeacherSettings,
    teacher: OpenClipTeacher,
    options: argparse.Namespace,
) -> list[float]:
    """Run the three in turn and print what each takes."""
    workers = os.cpu_count() or 1
    batch = torch.stack([teacher.preprocess(decode_image(path.read_bytes())) for path in files[: options.batch_size]])
    batch = batch.to(teacher.device)
    num_batches = -(-len(files) // options.batch_size)

    def forward() -> None:
        for _ in range(num_batches):
            teacher.encode_images(batch)

    def decode() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda path: teacher.crop(decode_image(path.read_bytes())), files):
                pass

    rows = [{"source": path.name, "bytes": path.stat().st_size, "modified_ns": 0} for path in files]
    table = root / "images.parquet"
    write_rows(table, IMAGE_COLUMNS, rows, options.shard_rows)
    spec = ArraySpec((len(files), teacher.embed_dim), "float16", options.shard_rows)
    store = root / "teacher.zarr"
    declare_arrays(store, {IMAGES: spec})
    tasks = [
        ShardTask("images", store, IMAGES, spec, shard, table=table, source=ImageFolder(root))
        for shard in range(spec.num_chunks)
    ]
    TEACHERS.put(settings, teacher)
    weights = teacher.identity()["weights"]

    def stage_one() -> None:
        num_rows = 0
        for done in run_shards(tasks, settings, weights, None):
            done.commit()
            num_rows += done.record.num_rows
        assert num_rows == len(files)

    for warm in (forward, decode, stage_one):  # page cache, thread pools, imports
        warm()
    taken: dict[str, list[float]] = {"forward": [], "decode": [], "stage one": []}
    for _ in range(options.repeats):
        for name, work in (("forward", forward), ("decode", decode), ("stage one", stage_one)):
            taken[name].append(seconds(work))
    rates = {name: [len(files) / value for value in values] for name, values in taken.items()}
    device = torch.cuda.get_device_name() if teacher.device.type == "cuda" else platform.processor() or "CPU"
    print(f"{options.model}, {options.precision}, batch {options.batch_size}, {len(files)} JPEG files of 500 x 375")
    print(f"{device}, {os.cpu_count()} cores, torch {torch.__version__}, {options.repeats} repeats, median (min-max)")
    for name, values in rates.items():
        print(f"{name:>10}: {statistics.median(values):8.1f} rows/s ({min(values):.1f}-{max(values):.1f})")
    ratios = [
        stage / min(forward_rate, decode_rate)
        for forward_rate, decode_rate, stage in zip(rates["forward"], rates["decode"], rates["stage one"], strict=True)
    ]
    print(f"stage one / the slower part: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    return ratios


if __name__ == "__main__":
    main()
