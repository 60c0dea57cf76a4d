"""The one file that knows open_clip's private builders: `pyproject.toml` bounds its version on their account."""

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    _build_text_tower,
    _build_vision_tower,
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from torch import Tensor, nn


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


def in_open_clips_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of a whole CLIP model under the names that this version of open_clip gives them.

    Apple's own MobileCLIP and text towers of before `custom_text` are renamed, as `open_clip.load_checkpoint` does.
    """
    named: dict[str, Tensor] = convert_state_dict(model, dict(state))
    if "positional_embedding" in named and not hasattr(model, "positional_embedding"):
        named = convert_to_custom_text_state_dict(named)
    return named


def load_into_clip(model: Any, state: Mapping[str, Tensor]) -> None:
    """Fill a whole CLIP model with a state that is already read: the second half of `open_clip.load_checkpoint`.

    Args:
        model: CLIP or CustomTextCLIP.
        state: of all its parameters, in any naming that open_clip takes; positions may be of another number.

    Raises:
        RuntimeError: for names or shapes of another architecture.
    """
    named = in_open_clips_names(model, state)
    for scalar in ("logit_scale", "logit_bias"):
        own = getattr(model, scalar)
        if own is not None and scalar in named:
            named[scalar] = named[scalar].reshape(own.shape)
    if model.logit_bias is not None and "logit_bias" not in named and "logit_scale" in named:
        named["logit_bias"] = torch.zeros_like(named["logit_scale"])  # a softmax model's, for training as a sigmoid one
    named.pop("text.transformer.embeddings.position_ids", None)  # transformers no longer has them
    resize_pos_embed(named, model)
    resize_text_pos_embed(named, model)
    model.load_state_dict(named)
