"""A text tower with its tokenizer, ready to embed sentences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .tokenizer import tokenize

BATCH_SIZE = 256


class TextEncoder:
    """A text tower and its tokenizer, in evaluation mode on a device.

    Attributes:
        tower: (B, context_length) int64 token ids to (B, D).
    """

    def __init__(self, tower: nn.Module, tokenizer: Any, device: torch.device) -> None:
        self.tower = tower.eval().requires_grad_(False).to(device)
        self.tokenizer, self.device = tokenizer, device

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """(M, D) embeddings of some sentences, at least one, before normalisation: `BATCH_SIZE` at a time."""
        blocks = []
        for first in range(0, len(sentences), BATCH_SIZE):
            emitted = self.tower(tokenize(self.tokenizer, sentences[first : first + BATCH_SIZE]).to(self.device))
            # CoCa's tower returns its tokens as well.
            embeddings = emitted[0] if isinstance(emitted, tuple) else emitted
            blocks.append(embeddings.float().cpu().numpy())
        return np.concatenate(blocks)
