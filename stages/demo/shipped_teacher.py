"""The demo's teacher as the package ships it: trained once by `make demo-teacher`, and packed to a tenth of its size.

Matrices are float16, and of CLIP's 49,408 tokens there are only those that a caption or a prompt of the demo uses.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

SHIPPED = Path(__file__).with_name("teacher.safetensors")

VOCABULARY = 49408
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "text_cfg": {"context_length": 28, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2},
}
"""As open_clip reads it, with CLIP's own tokenizer and, since nothing else is said, OpenAI's mean and deviation."""

_TABLE, _TOKENS = "token_embedding.weight", "token_ids"


def pack(weights: Mapping[str, NDArray[Any]], tokens: NDArray[np.int64]) -> bytes:
    """A file of the teacher's weights as it is shipped.

    Args:
        weights: the state dict in open_clip's names, its token table (T, width) that of the used tokens alone.
        tokens: (T,) ids of those, ascending.
    """
    halved = {name: value.astype(np.float16) if value.ndim > 1 else value for name, value in weights.items()}
    return save({**halved, _TOKENS: tokens})


def unpack(packed: bytes) -> bytes:
    """The same weights as a checkpoint that open_clip loads: float32, the whole vocabulary, zeros for unused tokens."""
    weights = load(packed)
    tokens = weights.pop(_TOKENS)
    whole = {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in weights.items()}
    table = np.zeros((VOCABULARY, whole[_TABLE].shape[1]), np.float32)
    table[tokens] = whole[_TABLE]
    return save({**whole, _TABLE: table})
