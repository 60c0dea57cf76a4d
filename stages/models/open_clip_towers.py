"""The one file that knows open_clip's private builders: `pyproject.toml` bounds its version on their account."""

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import _build_text_tower, _build_vision_tower
from torch import nn


def build_image_tower(config: Mapping[str, Any]) -> nn.Module:
    """An image tower alone, with fresh weights, from `embed_dim`, `vision_cfg` and `quick_gelu` of a model config.

    Raises:
        TypeError, ValueError, RuntimeError, AssertionError: for a config that makes no tower.
    """
    quick_gelu = config.get("quick_gelu", False)
    tower: nn.Module = _build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu=quick_gelu)
    return tower


def build_text_tower(config: Mapping[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """A text tower alone, with fresh weights, from `embed_dim`, `text_cfg` and `quick_gelu` of a model config.

    Args:
        dtype: the format that its norms cast their input to; None for float32.

    Raises:
        ZeroDivisionError and those of `build_image_tower`: for a config that makes no tower.
    """
    quick_gelu = config.get("quick_gelu", False)
    tower: nn.Module = _build_text_tower(config["embed_dim"], config["text_cfg"], quick_gelu, dtype)
    return tower
