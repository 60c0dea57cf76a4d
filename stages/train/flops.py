"""FLOPs of a training step, and which share of a device's peak that is (MFU of PaLM, arXiv 2204.02311, appendix B)."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..settings.distill import DistillSettings
from .processes import World
from .student import Student

PASSES = 3
"""A step costs three forward passes, of which backward is two. What `accumulate` embeds twice counts once."""


@dataclass(frozen=True)
class Peak:
    """Dense TFLOP/s of one GPU. Tensor cores add in float32, as torch does; None where a format has no hardware."""

    half: float
    fp32: float
    tf32: float | None = None
    bf16: bool = True


PEAKS = {
    r"B200\b": Peak(2250, 75, 1125),  # NVIDIA DGX B200 datasheet, an eighth of it, dense
    r"H200\b|GH200\b|H100 80GB HBM3": Peak(989.4, 66.9, 494.7),  # NVIDIA H100 and H200 datasheets, SXM
    r"H100 NVL": Peak(835.5, 60, 417.5),  # NVIDIA H100 NVL product brief
    r"H100 PCIe": Peak(756, 51, 378),  # NVIDIA H100 datasheet, PCIe
    r"A100\b": Peak(312, 19.5, 156),  # NVIDIA A100 datasheet
    r"A30$": Peak(165, 10.3, 82),  # NVIDIA A30 datasheet
    r"A40$": Peak(149.7, 37.4, 74.8),  # NVIDIA A40 datasheet
    r"RTX A6000$": Peak(154.8, 38.7, 77.4),  # NVIDIA Ampere GA102 whitepaper
    r"A10$": Peak(125, 31.2, 62.5),  # NVIDIA A10 datasheet
    r"L40S$": Peak(362, 91.6, 183),  # NVIDIA L40S datasheet
    r"L4$": Peak(121, 30.3, 60),  # NVIDIA L4 datasheet, half of what it has with sparsity
    r"V100-SXM": Peak(125, 15.7, bf16=False),  # NVIDIA V100 datasheet, SXM2
    r"V100-PCIE": Peak(112, 14, bf16=False),  # NVIDIA V100 datasheet, PCIe
    r"T4$": Peak(65, 8.1, bf16=False),  # NVIDIA T4 datasheet
    r"RTX 3090$": Peak(71, 35.6, 35.6),  # NVIDIA Ampere GA102 whitepaper, FP32 accumulate
    r"RTX 4090$": Peak(165.2, 82.6, 82.6),  # NVIDIA Ada whitepaper, FP32 accumulate
}
"""By what stands in a GPU's name; a part of one (MIG) is none of these."""


def peak_flops_per_s(gpu: str, precision: str, *, tf32: bool) -> float | None:
    """Most dense FLOP/s of a GPU; None where that is not known.

    Args:
        gpu: its name, as `torch.cuda.get_device_name` has it.
        precision: `fp32`, `fp16` or `bf16`.
        tf32: whether torch may compute in TF32 where fp32 is asked for.

    >>> peak_flops_per_s("NVIDIA A100-SXM4-80GB", "bf16", tf32=False)
    312000000000000.0
    """
    peak = next((peak for name, peak in PEAKS.items() if re.search(rf"\b(?:{name})", gpu) and "MIG" not in gpu), None)
    if peak is None or (precision == "bf16" and not peak.bf16):
        return None
    fp32 = peak.tf32 if tf32 and peak.tf32 is not None else peak.fp32
    return 1e12 * (fp32 if precision == "fp32" else peak.half)


def forward_flops(model: nn.Module, example: Tensor) -> int | None:
    """FLOPs of one forward pass, two for a multiplication with addition; None for a model that cannot be copied or run.

    Counted once, on a copy on the CPU: weights, statistics of batch norms and random numbers stay as they are.

    Args:
        model: a tower, on any device.
        example: an input of it, on the CPU.
    """
    try:
        # With gradients and plain attention: fused kernels are no operations that the counter knows.
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            copy.deepcopy(model).to("cpu").eval()(example)
    except Exception:  # a user's own module may refuse in any way, and no run should end for a number in its log
        return None
    return int(counter.get_total_flops())


def step_flops(student: Student, image_size: int, settings: DistillSettings) -> int:
    """FLOPs of a step of one student, over all processes; 0 where they cannot be counted."""
    image = forward_flops(student.image.model, torch.zeros(1, 3, image_size, image_size))
    text: int | None = 0
    if student.text is not None:
        tower: Any = student.text.model
        text = forward_flops(tower, torch.zeros(1, tower.context_length, dtype=torch.int64))
    if image is None or text is None:
        return 0
    return PASSES * (settings.batch_images * image + settings.batch_texts * text)


def flop_metrics(flops: int, step_s: float, precision: str, world: World) -> dict[str, float]:
    """What a line of metrics says: `flops_per_s` of all processes, and where the peak is known `flop_utilisation`."""
    if not flops:
        return {}
    metrics = {"flops_per_s": flops / step_s}
    if world.device.type == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        peak = peak_flops_per_s(torch.cuda.get_device_name(world.device), precision, tf32=tf32)
        if peak is not None:
            metrics["flop_utilisation"] = flops / step_s / (peak * world.size)
    return metrics
