"""All of stage two against the bare step of its student, in images/s.

    python benchmarks/distill_vs_bare.py [--repeats 5] [--steps 8] [--model timm:mobilenetv3_small_100] [--check]

- `bare`: forward, `vl` and `pvl` of the same widths, backward, AdamW, on one normalised batch, targets and sentences
  that are on the device already. Nothing is read, drawn, logged or checked.
- `loader`: the batches alone, made and thrown away: reading, decoding, augmenting, gathering targets and sentences.
- `ready views`: `train`, as `dimefm distill` runs it, with decoding out of the way: views wait in memory, everything
  else (orders, targets and sentences from the memory maps, copies, schedule, metrics, checks) is as ever.
- `everything`: `train` from the image files.

Repeats are interleaved in one process; the first steps of each are not counted, nor is the checkpoint at its end.
Weights, embeddings and pixels are random: speed does not depend on them. On a GPU the loader's work is beside the
model's; on a CPU the two share the cores, and the last line says what is the most that they can do together.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.stages.counter_random import key_of
from dimefm.stages.images.views import ViewMaker
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.load import batches
from dimefm.stages.load.workers import ViewPool
from dimefm.stages.losses.dime import pvl_loss, vl_loss
from dimefm.stages.models.image_student import build_student
from dimefm.stages.settings.distill import DistillSettings, LossSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train import loop as train
from dimefm.stages.train.optim import build_optimizer
from dimefm.stages.train.processes import World, open_world
from dimefm.stages.train.schedule import Schedule
from dimefm.stages.train.student_run import Run
from tests.support.small_cache import make_cache

LIMIT = 0.95
WARM_STEPS = 4
"""Steps before the clock starts: the loader is as far ahead as it gets by then."""


class ReadyViews(ViewPool):
    """A pool whose views are there already."""

    def __enter__(self) -> "ReadyViews":
        self._stop, self.slots = self._work.slots(bytearray(self._work.num_bytes))
        for slot in self.slots:
            for views in slot:
                views[:] = np.random.default_rng(0).integers(0, 256, views.shape, dtype=np.uint8)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, slot: int, rows: Any, passes: Any, keys: Sequence[Any]) -> list[Future[None]]:
        return []


class Bench:
    """The four ways to spend a step, each measured over the same number of steps."""

    def __init__(self, folder: Path, cache: FeatureCache, options: argparse.Namespace, world: World) -> None:
        self._folder, self._cache, self._world, self._steps = folder, cache, world, options.steps
        self._student = StudentSettings(model=options.model, image_size=options.size)
        self._settings = DistillSettings(
            epochs=1000.0,
            batch_images=options.batch,
            batch_sentences=options.sentences,
            precision=options.precision,
            device=options.device,
            workers=options.workers,
            checkpoint_every=10**6,
            compile=options.compile,
            loss=LossSettings(vl=0.7, pvl=0.3),  # those of the bare step
        )
        self._schedule = Schedule(cache, self._settings, world)
        self._files = ImageFolder(folder / "images")

    def bare(self) -> float:
        """Images/s of the step alone."""
        device, options = self._world.device, self._settings
        width = self._cache.images.embeddings.shape[-1]
        torch.manual_seed(0)
        model = build_student(self._student.model, width, self._student.image_size).to(device).train()
        model = model.to(memory_format=torch.channels_last)
        if options.compile:
            model.compile()
        optimizer = build_optimizer(model, options)
        side = self._student.image_size
        images = torch.randn(options.batch_images, 3, side, side, device=device).to(memory_format=torch.channels_last)
        targets = torch.randn(options.batch_images, width, device=device).half()
        sentences = torch.randn(options.batch_sentences, width, device=device).half()
        scale = self._schedule.logit_scale
        low = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self._schedule.precision)

        def step() -> None:
            with torch.autocast(device.type, low, enabled=low is not None):
                embeddings = model(images)
            loss = 0.7 * vl_loss(embeddings, targets, sentences, 1.0, scale)
            loss = loss + 0.3 * pvl_loss(embeddings, targets, 3.0, scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        for _ in range(WARM_STEPS):
            step()
        return self._rate(step)

    def loader(self) -> float:
        """Images/s of the batches alone."""
        schedule, settings = self._schedule, self._settings
        assert schedule.sentences is not None
        loader = batches.BatchLoader(
            self._cache.images,
            schedule.images,
            self._files,
            [ViewMaker(settings.augment, self._student.image_size, schedule.resample)],
            view_key=key_of(settings.seed, "views"),
            sentences=(self._cache.sentences, schedule.sentences),
            workers=settings.workers,
        )
        with loader:
            coming = loader.batches(0, WARM_STEPS + self._steps)
            for _ in range(WARM_STEPS):
                next(coming)
            return self._rate(lambda: next(coming))

    def everything(self) -> float:
        """Images/s of `train`."""
        moments: list[float] = []

        def clock(done: int, total: int, text: str) -> None:
            if done // self._settings.batch_images in (WARM_STEPS, WARM_STEPS + self._steps):
                self._wait_for_device()
                moments.append(time.perf_counter())

        shutil.rmtree(self._folder / "run", ignore_errors=True)
        run = Run("student", self._student, self._folder / "run")
        train.train(
            self._cache,
            self._files,
            [run],
            self._settings,
            self._world,
            stop_after=WARM_STEPS + self._steps,
            progress=clock,
        )
        return self._settings.batch_images * self._steps / (moments[1] - moments[0])

    def ready_views(self) -> float:
        """Images/s of `train` when views come for nothing."""
        with patch.object(batches, "ViewPool", ReadyViews):
            return self.everything()

    def _rate(self, step: Callable[[], object]) -> float:
        self._wait_for_device()
        start = time.perf_counter()
        for _ in range(self._steps):
            step()
        self._wait_for_device()
        return self._settings.batch_images * self._steps / (time.perf_counter() - start)

    def _wait_for_device(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="timm:mobilenetv3_small_100")
    parser.add_argument("--size", type=int, default=64, help="side of the student's input")
    parser.add_argument("--source-size", type=int, default=96, help="side of the JPEG files")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--sentences", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 when a ratio is under {LIMIT}")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, open_world(options.device) as world:
        root, side = Path(folder), options.source_size
        cache = make_cache(root, options.images, max(options.images, options.sentences), options.width, (side, side))
        bench = Bench(root, cache, options, world)
        ways = {
            "bare": bench.bare,
            "loader": bench.loader,
            "ready views": bench.ready_views,
            "everything": bench.everything,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                rates[name].append(way())
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "CPU"
    what = f"{options.model} at {options.size} px from {side} px JPEG"
    print(f"{what}, {options.batch} images, {options.sentences} sentences")
    print(f"{device}, {os.cpu_count()} cores, torch {torch.__version__}, {options.repeats} repeats, median (min-max)")
    for name, values in rates.items():
        print(f"{name:>12}: {statistics.median(values):8.1f} images/s ({min(values):.1f}-{max(values):.1f})")
    bare, loader = rates["bare"], rates["loader"]
    ready = report("ready views / bare", rates["ready views"], bare)
    slower = [min(pair) for pair in zip(bare, loader)]
    both = report("everything / the slower of bare and loader", rates["everything"], slower)
    if world.device.type == "cpu":
        shared = [1 / (1 / one + 1 / other) for one, other in zip(bare, loader)]
        report("everything / bare and loader one after the other, as they share the cores", rates["everything"], shared)
    if options.check and min(ready, both) < LIMIT:
        sys.exit(1)


def report(what: str, rates: Sequence[float], limits: Sequence[float]) -> float:
    """Print a ratio, repeat by repeat; returns its median."""
    ratios = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
    print(f"{what}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
