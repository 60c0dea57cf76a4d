"""Stage two's step against open_clip's own online distillation (`--distill-model`), in samples/s.

    python benchmarks/distill_vs_online.py [--repeats 5] [--large] [--device auto] [--json results.json]

Both sides train the same image tower, in the same precision, on the same batch of images, which is in the device's
memory already (decoding is another benchmark's):

- `stage two`: the step of the trainer itself, `stages.train.student.Student.learn`, with the losses `vl` and `pvl`.
  Its targets and sentences are gathered in every step, at random rows, from memory-mapped arrays of a cache on disk.
  Logging, checks and checkpoints are left out on both sides.
- `online`: open_clip's own training loop, `open_clip_train.train.train_one_epoch`, on a batch of pairs in memory, with
  `open_clip.DistillClipLoss` and models and optimiser as `open_clip_train.main` makes them: every step runs the teacher
  over images and texts without gradient, then the student over both, with its text tower trained; and `frozen`, locked
  as by `--lock-text`.

Weights are random: speed does not depend on them. The small pair is sized so that a step of each kind costs about what
it does for ViT-L/14 -> ViT-B/32, in proportion; that pair itself is measured on a GPU, or anywhere with --large. Each
side keeps its habits: stage two has channels-last images and a fused AdamW, open_clip has neither.

Repeats are interleaved in one process. Beside the ratio of samples/s stands the ratio of floating-point operations,
counted with torch's FlopCounterMode: products and convolutions, the losses' among them, optimisers aside.
"""

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.layout import IMAGES, SENTENCES
from dimefm.cache.disk.mapped import MappedArray
from dimefm.stages.devices import resolve_device
from dimefm.stages.settings.distill import DistillSettings, LossSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.processes import World
from dimefm.stages.train.student import Student
from dimefm.stages.train.targets import Targets

SIDES = ("stage two", "online, text frozen", "online, text trained")
TEXT = {"context_length": 77, "vocab_size": 49408}
CACHE_ROWS, CHUNK_ROWS = 16_384, 8_192
LOOP = {"distill": True, "accum_freq": 1, "skip_scheduler": True, "grad_clip_norm": None, "horovod": False, "rank": 0}
LOOP |= {"world_size": 1, "log_every_n_steps": 10**9, "wandb": False}
"""Arguments of open_clip's loop: one process, no log inside of a repeat."""
LOGIT_SCALE = 100.0
"""Of a trained CLIP."""
OURS_PER_ONLINE = 4
"""Steps of stage two for each of the other: it is the faster, and would be timed over moments otherwise."""


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, as open_clip model configs, and the images of a step."""

    name: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    batch: int
    steps: int

    @property
    def image_size(self) -> int:
        """Of both: open_clip's loop gives one batch to the two of them."""
        return int(self.teacher["vision_cfg"]["image_size"])


def small_pair() -> Pair:
    """ViTs for a CPU, at 96 px."""
    vision = {"image_size": 96, "patch_size": 16, "layers": 12}
    teacher = {"vision_cfg": {**vision, "width": 768}, "text_cfg": {**TEXT, "width": 512, "heads": 8, "layers": 12}}
    student = {"vision_cfg": {**vision, "width": 256}, "text_cfg": {**TEXT, "width": 256, "heads": 4, "layers": 6}}
    return Pair("small ViTs, 96 px", {"embed_dim": 512, **teacher}, {"embed_dim": 512, **student}, batch=32, steps=2)


def large_pair() -> Pair:
    """ViT-L/14 -> ViT-B/32; the student ends in the teacher's width on both sides, as stage two wants it."""
    teacher, student = (open_clip.get_model_config(name) for name in ("ViT-L-14", "ViT-B-32"))
    assert teacher and student
    student["embed_dim"] = teacher["embed_dim"]
    return Pair("ViT-L/14 -> ViT-B/32, 224 px", teacher, student, batch=256, steps=10)


class StageTwo:
    """Steps of the trainer's own `Student`, with what it is given in a run; nothing is logged or saved."""

    def __init__(self, pair: Pair, images: Tensor, folder: Path, options: argparse.Namespace) -> None:
        config, width = folder / "student.json", pair.teacher["embed_dim"]
        config.write_text(json.dumps(pair.student))
        student = StudentSettings(model=f"open_clip:{config}", image_size=pair.image_size)
        self._world = World(images.device)
        self._settings = DistillSettings(loss=LossSettings(vl=0.7, pvl=0.3))  # what docs/results.md was measured with
        self._student = Student(student, self._settings, width, self._world, options.precision, LOGIT_SCALE, fresh=True)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._targets, self._sentences = (write_array(folder, name, width) for name in (IMAGES, SENTENCES))
        self._num_sentences, self._rng = options.sentences, np.random.default_rng(0)

    @property
    def model(self) -> nn.Module:
        """The student."""
        return self._student.image.model

    def run(self, num_steps: int) -> None:
        """Train for some steps."""
        for _ in range(num_steps):
            targets = self._gather(self._targets, len(self._images))
            sentences = self._gather(self._sentences, self._num_sentences)
            self._student.learn(self._images, Targets.gather(targets, sentences, None, self._world), self._settings.lr)

    def _gather(self, array: MappedArray, num_rows: int) -> Tensor:
        rows = torch.from_numpy(array[self._rng.integers(len(array), size=num_rows)])
        if self._images.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self._images.device, non_blocking=True)


class Online:
    """open_clip's training loop with a teacher beside the student."""

    def __init__(self, pair: Pair, teacher: nn.Module, images: Tensor, *, lock_text: bool, precision: str) -> None:
        self.model, self._teacher = open_clip.CLIP(**pair.student, output_dict=True).to(images.device), teacher
        if lock_text:
            self.model.lock_text_tower(unlocked_layers=0, freeze_layer_norm=True)
        self._pairs = images, torch.randint(1, 49406, (len(images), TEXT["context_length"]), device=images.device)
        self._pairs[1][:, -1] = 49407  # the end token is the highest: it is where a text's embedding is read
        self._optimizer, self._loss = open_clip_optimizer(self.model), open_clip.DistillClipLoss(cache_labels=True)
        amp = "amp_bf16" if precision == "bf16" else "fp32"
        self._args = SimpleNamespace(device=str(images.device), precision=amp, batch_size=len(images), **LOOP)

    def run(self, num_steps: int) -> None:
        """Train for some steps: one of open_clip's epochs."""
        loader = PairsInMemory([self._pairs] * num_steps)
        data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
        train_one_epoch(
            self.model, data, self._loss, 0, self._optimizer, None, None, self._teacher, self._args, tb_writer=None
        )


class PairsInMemory:
    """What open_clip's loop asks of a loader."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches
        self.num_batches, self.num_samples = len(batches), len(batches) * len(batches[0][0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


def open_clip_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as in `open_clip_train.main`, with its defaults for a ViT."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        if parameter.requires_grad:
            groups[exempt].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.0}, {"params": groups[False], "weight_decay": 0.2}],
        lr=5e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
    )


def write_array(folder: Path, name: str, width: int) -> MappedArray:
    """An array of a cache, random rows."""
    spec, rng = ArraySpec((CACHE_ROWS, width), "float16", CHUNK_ROWS), np.random.default_rng(0)
    store = folder / f"{name.split('/')[0]}.zarr"
    declare_arrays(store, {name: spec})
    for chunk in range(spec.num_chunks):
        write_chunk(store, name, spec, chunk, rng.standard_normal((CHUNK_ROWS, width)).astype(np.float16))
    return MappedArray.open(store, name)


def seconds(work: Callable[[int], None], num_steps: int) -> float:
    """Time of some steps, all of them done: whatever was asked of a GPU before is awaited first."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work(num_steps)
    wait()
    return time.perf_counter() - start


def addmm_flops(total: tuple[int, int], left: tuple[int, int], right: tuple[int, int], **_: Any) -> int:
    """Of `addmm_`, from shapes: torch's counter has none for it, and the losses add up their gradients with it."""
    return 2 * left[0] * left[1] * right[1]


def count_flops(work: Callable[[int], None]) -> int:
    """Floating-point operations of one step. Fused attention is taken apart: the counter does not know all of it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter,
        ):
            work(1)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def measure(pair: Pair, options: argparse.Namespace) -> dict[str, Any]:
    """Run a pair's three kinds of steps in turn; counts, rates and ratios, ready for JSON."""
    device = resolve_device(options.device)
    batch, steps = options.batch or pair.batch, options.steps or pair.steps
    torch.manual_seed(0)
    images = torch.randn(batch, 3, pair.image_size, pair.image_size, device=device)
    teacher = open_clip.CLIP(**pair.teacher, output_dict=True).to(device)
    with tempfile.TemporaryDirectory(prefix="online-") as folder:
        ours = StageTwo(pair, images, Path(folder), options)
        online = [Online(pair, teacher, images, lock_text=lock, precision=options.precision) for lock in (True, False)]
        check_same_towers(ours.model, *(side.model.visual for side in online))
        work = dict(zip(SIDES, (ours.run, online[0].run, online[1].run)))
        num_steps = {name: steps * (OURS_PER_ONLINE if name == SIDES[0] else 1) for name in SIDES}
        flops = {name: count_flops(work[name]) / batch for name in SIDES}
        for name in SIDES:  # the optimiser's state, thread pools, kernels
            seconds(work[name], num_steps[name])
        rates: dict[str, list[float]] = {name: [] for name in SIDES}
        for repeat in range(options.repeats):
            for name in SIDES if repeat % 2 else SIDES[::-1]:
                rates[name].append(num_steps[name] * batch / seconds(work[name], num_steps[name]))
    return {
        "pair": pair.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "precision": options.precision,
        "batch": batch,
        "sentences": options.sentences,
        "samples_per_s": rates,
        "gflops_per_sample": {name: value / 1e9 for name, value in flops.items()},
        "ratio": {name: [a / b for a, b in zip(rates[SIDES[0]], rates[name])] for name in SIDES[1:]},
        "flop_ratio": {name: flops[name] / flops[SIDES[0]] for name in SIDES[1:]},
    }


def check_same_towers(*towers: nn.Module) -> None:
    """Stop unless all sides train the same tensors."""
    shapes = [{name: value.shape for name, value in tower.state_dict().items()} for tower in towers]
    if any(other != shapes[0] for other in shapes):
        raise SystemExit("the students' image towers differ")


def report(result: dict[str, Any]) -> None:
    """Print one pair's figures."""
    print(
        f"{result['pair']}: {result['precision']}, batch {result['batch']}, {result['sentences']:,} sentences a step; "
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}, open_clip {result['open_clip']}"
    )
    print(f"{'':>20}  {'samples/s, median (min-max)':>28}  GFLOP/sample  {'stage two is':>22}  by FLOPs")
    for name, rates in result["samples_per_s"].items():
        line = f"{name:>20}  {spread(rates):>28}  {result['gflops_per_sample'][name]:12.2f}"
        if name in result["ratio"]:
            line += f"  {spread(result['ratio'][name]) + ' x':>22}  {result['flop_ratio'][name]:6.2f} x"
        print(line)


def spread(values: list[float]) -> str:
    """Median and range, in four digits."""
    digits = max(0, 3 - math.floor(math.log10(statistics.median(values))))
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=0, help="images of a step; 0: the pair's own, 32 or 256")
    parser.add_argument("--sentences", type=int, default=4096, help="sentences of a step of stage two")
    parser.add_argument("--steps", type=int, default=0, help="online steps of one repeat; 0: the pair's own, 2 or 10")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0: its own choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on a GPU")
    parser.add_argument("--large", action="store_true", help="ViT-L/14 -> ViT-B/32 without a GPU too: give --batch 8")
    parser.add_argument("--json", type=Path, default=None, help="write the results there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = resolve_device(options.device).type == "cuda"
    if options.precision == "auto":
        options.precision = "bf16" if on_gpu else "fp32"
    results: list[dict[str, Any]] = []
    for pair, wanted in ((small_pair(), True), (large_pair(), on_gpu or options.large)):
        results.append(measure(pair, options) if wanted else {"pair": pair.name, "not_measured": "no GPU"})
        if wanted:
            report(results[-1])
        else:
            print(f"{pair.name}: not measured (no GPU; --large measures it all the same)")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
