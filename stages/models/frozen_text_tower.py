"""The teacher's frozen text tower on its own: new prompts, and students that are exported, need no teacher."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...cache.disk.durable import make_folder, sync_file, sync_folder, write_bytes, write_json
from ...cache.errors import CacheError
from .open_clip_towers import build_text_tower
from .pretrained_tags import quiet_open_clip
from .teacher import ImageTeacher, SavesTextTower
from .teacher_source import CONFIG_NAME, LOCAL
from .text_encoder import TextEncoder
from .tokenizer import load_tokenizer

WEIGHTS_NAME = "open_clip_text.safetensors"
_SCALARS = ("logit_scale", "logit_bias")


def save_text_tower(teacher: ImageTeacher, folder: Path) -> None:
    """Write a teacher's text tower; nothing for a teacher that cannot save one (`SavesTextTower`).

    The folder appears under its name once all of it is on disk, and replaces one that is there.
    """
    if not isinstance(teacher, SavesTextTower):
        return
    unfinished = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)  # a killed run's
    make_folder(unfinished)
    teacher.save_text_tower(unfinished)
    for path in unfinished.iterdir():
        sync_file(path)  # transformers does not
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    sync_folder(folder.parent)


def text_tower_bytes(teacher: ImageTeacher) -> int:
    """About what `save_text_tower` takes on disk."""
    return teacher.text_tower_bytes() if isinstance(teacher, SavesTextTower) else 0


def write_text_tower(
    folder: Path, model: Any, tokenizer: Any, model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]
) -> None:
    """Write the text tower of an open_clip model, with tokenizer and preprocessing, into an empty folder.

    The weights have the key names of open_clip's `TextTransformer` (or of its Hugging Face tower), with the logit scale
    beside them, in the number format that the teacher was loaded in. The folder is open_clip's `local-dir:` for the
    tokenizer; as a whole model it lacks the image tower, and open_clip refuses it.
    """
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    if model_cfg["text_cfg"].get("hf_model_name"):
        model.text.config.save_pretrained(str(folder))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in text_state(model).items()}
    write_bytes(folder / WEIGHTS_NAME, save(tensors))
    write_json(folder / CONFIG_NAME, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})


def text_state(model: Any) -> dict[str, Tensor]:
    """Tensors of an open_clip model's text tower, and its logit scale and bias, by name."""
    text = getattr(model, "text", None)  # CLIP proper keeps its text tower's parts to itself
    state = model.state_dict() if text is None else text.state_dict()
    state |= {name: getattr(model, name) for name in _SCALARS}
    return {name: tensor for name, tensor in state.items() if tensor is not None and not name.startswith("visual.")}


def load_text_tower(folder: Path, device: torch.device) -> TextEncoder:
    """Load what `save_text_tower` wrote; needs no network.

    In batches of the same shape, on the same machine, its embeddings are the teacher's bit for bit.

    Raises:
        CacheError: if there is no text tower, or a file of it is missing or damaged.
        InputError: if the tokenizer needs a package that is not installed.
    """
    if not folder.exists():
        raise CacheError(
            f"{folder}: no text tower in this cache, so new prompts and captions cannot be embedded: its teacher saves "
            "none, or the folder was removed (`dimefm cache verify` tells which)"
        )
    try:
        model_cfg = json.loads((folder / CONFIG_NAME).read_bytes())["model_cfg"]
        state = load_file(folder / WEIGHTS_NAME)
        # Copied, since a tensor of a mapped file may lie at an odd address, and matrix products differ by alignment.
        weights = {name: tensor.clone() for name, tensor in state.items() if name not in _SCALARS}
        with quiet_open_clip():
            module = _build(folder, model_cfg, weights)
            # `assign` keeps the number format of each tensor: a half-precision teacher has some in float32.
            module.load_state_dict(weights, assign=True)
            tokenizer = load_tokenizer(f"{LOCAL}{folder}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CacheError(f"{folder}: the text tower cannot be loaded ({reason}); stage one writes it anew") from error
    return TextEncoder(module, tokenizer, device)


def _build(folder: Path, model_cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    text_cfg = dict(model_cfg["text_cfg"])
    if text_cfg.get("hf_model_name"):
        text_cfg |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    halves = [tensor.dtype for tensor in weights.values() if tensor.dtype in (torch.float16, torch.bfloat16)]
    return build_text_tower({**model_cfg, "text_cfg": text_cfg}, halves[0] if halves else None)
