"""AdamW with the paper's grouping of parameters, and a learning rate that is a function of the step."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..settings.distill import DistillSettings

_NOT_DECAYED = (
    "pos_embed",
    "positional_embedding",
    "class_embedding",
    "cls_token",
    "dist_token",
    "reg_token",
    "relative_position_bias_table",
)
"""Ends of the names of positional embeddings and learned tokens, as timm and open_clip call them."""


def build_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.AdamW:
    """AdamW, β = (.9, .999), eps 1e-8; weight decay on matrices and filters only.

    Norms, biases, positional embeddings, learned tokens and what the model's own `no_weight_decay()` lists have none.
    """
    exempt = set(_exempt_names(student))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name not in exempt and not name.endswith(_NOT_DECAYED)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,  # one kernel instead of one for each parameter: small students are mostly overhead
    )


def _exempt_names(student: nn.Module) -> Iterator[str]:
    """Names that modules exempt themselves; open_clip's wrapper of timm models does not pass its trunk's on."""
    for prefix, module in student.named_modules():
        if callable(listed := getattr(module, "no_weight_decay", None)):
            for name in listed():
                yield f"{prefix}.{name}" if prefix else name


def lr_at(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float) -> float:
    """Learning rate of a step: up linearly to the peak, then down a half cosine to the floor.

    Args:
        step: from 0; step `warmup_steps` is at the peak, step `total_steps - 1` at the floor.
        warmup_steps: steps below the peak; the first is at peak / (warmup_steps + 1).

    >>> [round(lr_at(step, 7, 2, 0.3, 0.1), 3) for step in range(7)]
    [0.1, 0.2, 0.3, 0.271, 0.2, 0.129, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
