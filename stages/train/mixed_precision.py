"""A tower's embeddings under autocast, in a format that losses can be computed in."""

import torch
from torch import Tensor, nn

from ..profiling import phase

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


@phase("forward")
def embed(tower: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """A tower's embeddings of a batch, (B, D) float32 at least.

    Args:
        inputs: what the tower takes, on its device.
        precision: `fp32`, `fp16` or `bf16`.
    """
    with torch.autocast(inputs.device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
        embeddings: Tensor = tower(inputs)
    # Once, here: each loss would cast for itself, and gradients would be rounded for each and added in few bits.
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
