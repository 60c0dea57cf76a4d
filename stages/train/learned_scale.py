"""What `icl` multiplies cosines by, as a number that a run learns."""

import math

import torch
from torch import Tensor, nn

_LARGEST = 100.0  # CLIP's bound (Radford et al., ICML 2021, section 2.5): beyond it training was unstable


class LearnedScale(nn.Module):
    """A factor above 0, learned through its logarithm as CLIP's own logit scale is.

    A module so that it is saved like one; it is no part of the student, and nothing that is exported needs it.
    """

    def __init__(self, start: float, device: torch.device) -> None:
        """Begin with `start`: logit scale / temperature."""
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start), dtype=torch.float32, device=device))
        self._largest = math.log(max(_LARGEST, start))

    def forward(self) -> Tensor:
        """The factor, a float32 scalar that passes gradients on."""
        return self.log.exp()

    @torch.no_grad()
    def keep_within_bounds(self) -> None:
        """At most 100, or what it began with if that was more."""
        self.log.clamp_(max=self._largest)
