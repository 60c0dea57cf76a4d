"""The losses over wide rows: memory beyond the inputs, and time beside the plain formula.

    python benchmarks/wide_softmax.py [--images 256] [--width 768] [--columns 4096 65536 1000000] [--repeats 15]

Memory: each number comes from a process of its own, which makes its inputs (float16 columns, as the cache has them),
warms up on a few rows, and then computes one loss with its gradient. On the CPU it is the kernel's peak of resident
memory less what was resident with the inputs in place (VmHWM, reset by way of /proc/self/clear_refs; Linux with glibc,
told to hand every piece back at once); on a GPU `torch.cuda.max_memory_allocated` less what was allocated. The plain
formula keeps whole matrices of logits; it is run where it should fit into half of the free memory. Up to some columns
all is one block, which may take more than the smaller blocks of a wide matrix: memory is held against that of the
fewest columns from 65,536 on. The effective candidates of a logged step are one number for each sentence as well.

Time: loss and gradient at the first number of columns, both formulas in this process, in turn; ratios of each pair.

Share of a training step, on a GPU only: vl and pvl with their gradients at 256 images and 12,288 sentences, 768 wide as
ViT-L/14's embeddings are, against forward, backward and AdamW of a ViT-B/32 that ends in the same width, in bf16 at 256
images. With --check, exits with 1 where the most columns take more than 1.1 times the memory (candidates: and 8 bytes
a sentence, two float32) or the share is over 5 %.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dimefm.stages.losses.clip_kd import icl_loss
from dimefm.stages.losses.diagnostics import effective_candidates
from dimefm.stages.losses.dime import pvl_loss, vl_loss
from dimefm.stages.models.image_student import build_student

MIB = 2**20
SHARE_LIMIT = 0.05
TEACHER_WIDTH = 768
"""Of ViT-L/14's embeddings."""
GROWTH_LIMIT = 1.1
WIDE_COLUMNS = 65_536
"""From here on 256 images and more are no single block, however narrow embeddings are."""
BYTES_PER_COLUMN = {"candidates": 8}
"""What may come on top of blocks: the entropies of all sentences, in pieces and put together."""


def plain_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Mean over rows of KL, from whole matrices."""
    log_p, log_q = F.log_softmax(teacher_logits, dim=1), F.log_softmax(student_logits, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum() / len(log_p)


def plain_vl(student: Tensor, teacher: Tensor, columns: Tensor) -> Tensor:
    """`vl_loss` as the formula reads, left to autograd."""
    student, teacher, columns = (F.normalize(side.float(), dim=1) for side in (student, teacher, columns))
    teacher_logits, student_logits = 100 * teacher @ columns.T, 100 * student @ columns.T
    return plain_kl(teacher_logits, student_logits) + plain_kl(teacher_logits.T, student_logits.T)


def plain_pvl(student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """`pvl_loss` with a bank as the formula reads."""
    student, teacher, bank = (F.normalize(side.float(), dim=1) for side in (student, teacher, bank))
    columns = torch.cat([teacher, bank])
    return 2 * plain_kl(100 / 3 * teacher @ columns.T, 100 / 3 * student @ columns.T)


def candidates(student: Tensor, teacher: Tensor, columns: Tensor) -> Tensor:
    """What a logged step computes beside the losses."""
    both = effective_candidates(teacher, columns, 1.0, 100.0) + effective_candidates(columns, teacher, 1.0, 100.0)
    return both + 0 * student.sum()


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "vl": vl_loss,
    "vl, plain": plain_vl,
    "pvl with a bank": lambda student, teacher, bank: pvl_loss(student, teacher, bank_images=bank),
    "pvl with a bank, plain": plain_pvl,
    "icl with a bank": lambda student, teacher, bank: icl_loss(student, teacher, bank_images=bank, threshold=0.9),
    "candidates": candidates,
}


def make_inputs(num_images: int, num_columns: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher images, and float16 columns made a piece at a time."""
    torch.manual_seed(0)
    teacher = torch.randn(num_images, width, device=device).half()
    student = torch.randn(num_images, width, device=device)
    columns = torch.empty(num_columns, width, device=device, dtype=torch.float16)
    for piece in columns.split(4096):
        piece.copy_(torch.randn(piece.shape, device=device))
    return student, teacher, columns


def loss_and_gradient(case: str, student: Tensor, teacher: Tensor, columns: Tensor) -> None:
    CASES[case](student.detach().requires_grad_(), teacher, columns).backward()


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def peak_bytes(case: str, num_images: int, num_columns: int, width: int, device: torch.device) -> int:
    """Peak memory of one loss and its gradient beyond the inputs, in this process."""
    loss_and_gradient(case, *make_inputs(8, 16, width, device))  # thread pools, kernels, libraries
    student, teacher, columns = make_inputs(num_images, num_columns, width, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradient(case, student, teacher, columns)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    loss_and_gradient(case, student, teacher, columns)
    return status_bytes("VmHWM") - before


def in_a_process(case: str, num_columns: int, options: argparse.Namespace, device: torch.device) -> int:
    """`peak_bytes` of a fresh interpreter."""
    numbers = [options.images, num_columns, options.width]
    command = [sys.executable, __file__, "--one", json.dumps([case, *numbers, str(device)])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is no longer resident
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def report_memory(options: argparse.Namespace, device: torch.device) -> bool:
    """Print a line for each loss and number of columns; returns whether memory stayed level."""
    level = True
    print(f"peak memory beyond the inputs, MiB: {options.images} images, width {options.width}, float16 columns")
    print(f"{'columns':<24}" + "".join(f"{num_columns:>12,}" for num_columns in options.columns))
    for case in CASES:
        taken: list[int | None] = []
        for num_columns in options.columns:
            # Three float32 copies of the columns and ten matrices of logits: what the plain formula came to.
            wanted = 4 * num_columns * (3 * options.width + 10 * options.images)
            fits = "plain" not in case or wanted < free_bytes(device) / 2
            taken.append(in_a_process(case, num_columns, options, device) if fits else None)
        cells = ("not run" if value is None else f"{value / MIB:.1f}" for value in taken)
        print(f"{case:<24}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
        if "plain" not in case:
            wide = [
                (n, size) for n, size in sorted(zip(options.columns, taken)) if n >= WIDE_COLUMNS and size is not None
            ]
            if len(wide) > 1:
                (fewest, base), (most, size) = wide[0], wide[-1]
                level &= size <= GROWTH_LIMIT * base + BYTES_PER_COLUMN.get(case, 0) * (most - fewest)
    print(f"inputs{'':<18}" + "".join(f"{2 * n * options.width / MIB:>12.1f}" for n in options.columns))
    return level


def seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report_time(options: argparse.Namespace, device: torch.device) -> None:
    """Print the ratio of ours to the plain formula, loss and gradient, at the first number of columns."""
    inputs = make_inputs(options.images, options.columns[0], options.width, device)
    print(f"time of loss and gradient / the plain formula's, {options.columns[0]:,} columns, {options.repeats} pairs")
    for case in ("vl", "pvl with a bank"):
        ratios = []
        for turn in range(options.repeats + 1):
            ours = seconds(lambda case=case: loss_and_gradient(case, *inputs), device)  # type: ignore[misc]
            plain = seconds(lambda case=case: loss_and_gradient(f"{case}, plain", *inputs), device)  # type: ignore[misc]
            if turn:  # the first pair warms up
                ratios.append(ours / plain)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{case:<24} median {middle:.2f}, quartiles {low:.2f} to {high:.2f}")


def step_share(device: torch.device, repeats: int) -> list[float]:
    """Time of vl and pvl with gradients / that of a ViT-B/32 bf16 step at 256 images, for each repeat. GPU only."""
    model = build_student("open_clip:ViT-B-32", TEACHER_WIDTH, 224).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(256, 3, 224, 224, device=device)
    student, teacher, sentences = make_inputs(256, 12_288, TEACHER_WIDTH, device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            embeddings = model(images)
        optimizer.zero_grad(set_to_none=True)
        embeddings.float().square().mean().backward()
        optimizer.step()

    def losses() -> None:
        leaf = student.detach().requires_grad_()
        (0.7 * vl_loss(leaf, teacher, sentences) + 0.3 * pvl_loss(leaf, teacher)).backward()

    for _ in range(3):
        step()
        losses()
    return [seconds(losses, device) / seconds(step, device) for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--width", type=int, default=TEACHER_WIDTH)
    parser.add_argument("--columns", type=int, nargs="+", default=[4096, 65_536, 1_000_000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=["memory", "time", "share"])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, num_images, num_columns, width, device = json.loads(options.one)
        print(peak_bytes(case, num_images, num_columns, width, torch.device(device)))
        return

    gpu = torch.cuda.is_available()
    print(f"{platform.processor() or 'CPU'}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"GPU: {torch.cuda.get_device_name() if gpu else 'none, not measured'}")
    good = True
    for device in [torch.device("cpu")] + ([torch.device("cuda")] if gpu else []):
        print(f"--- {device}")
        if options.only in (None, "memory"):
            good &= report_memory(options, device)
        if options.only in (None, "time"):
            report_time(options, device)
    if options.only in (None, "share"):
        print(f"losses / ViT-B/32 bf16 training step, 256 images, 12,288 sentences, {TEACHER_WIDTH} wide: ", end="")
        if gpu:
            shares = step_share(torch.device("cuda"), options.repeats)
            low, middle, high = statistics.quantiles(shares, n=4)
            print(f"median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
            good &= middle <= SHARE_LIMIT
        else:
            print("not measured")
    if options.check and not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
