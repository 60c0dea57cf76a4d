"""The teacher's frozen text tower on its own: new prompts, and students that are exported, need no teacher."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.model import _build_text_tower
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...cache.disk.durable import make_folder, sync_folder, write_bytes, write_json
from ...cache.errors import CacheError
from .open_clip_teacher import Teacher
from .pretrained_tags import quiet_open_clip
from .teacher_source import CONFIG_NAME, LOCAL
from .tokenizer import load_tokenizer, tokenize

WEIGHTS_NAME = "open_clip_text.safetensors"
_SCALARS = ("logit_scale", "logit_bias")


class TextTower:
    """A teacher's text tower without its image tower.

    Attributes:
        module: the tower, in evaluation mode: (B, context_length) int64 token ids to (B, D).
        model_cfg: the teacher's architecture, both towers, as in open_clip's model configs.
        preprocess_cfg: the teacher's image preprocessing.
        logit_scale: what cosines are multiplied by.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any, config: Mapping[str, Any], logit_scale: float, device: torch.device
    ) -> None:
        """Put a loaded tower on a device."""
        self.module = module.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.model_cfg: dict[str, Any] = config["model_cfg"]
        self.preprocess_cfg: dict[str, Any] = config["preprocess_cfg"]
        self.logit_scale = logit_scale
        self.device = device

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """The teacher's embeddings of these sentences, before normalisation: (B, D) float32 on the CPU.

        In batches of the same shape, on the same machine, they are the teacher's bit for bit.
        """
        embeddings = self.module(tokenize(self.tokenizer, sentences).to(self.device))
        # CoCa's tower returns its tokens as well.
        pooled: Tensor = embeddings[0] if isinstance(embeddings, tuple) else embeddings
        return pooled.float().cpu()


def save_text_tower(teacher: Teacher, folder: Path) -> None:
    """Write a teacher's text tower, tokenizer and preprocessing; equal teachers give equal bytes.

    The folder appears under its name once all of it is on disk, and replaces one that is there.

    The weights have the key names of open_clip's `TextTransformer` (or of its Hugging Face tower), with the logit scale
    beside them, in the number format that the teacher was loaded in. The folder is open_clip's `local-dir:` for the
    tokenizer; as a whole model it lacks the image tower, and open_clip refuses it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _text_state(teacher).items()}
    unfinished = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)  # a killed run's
    make_folder(unfinished)
    if hasattr(teacher.tokenizer, "save_pretrained"):
        teacher.tokenizer.save_pretrained(str(unfinished))
    if teacher.model_cfg["text_cfg"].get("hf_model_name"):
        teacher.model.text.config.save_pretrained(str(unfinished))
    for path in list(unfinished.iterdir()):
        write_bytes(path, path.read_bytes())  # transformers does not fsync
    write_bytes(unfinished / WEIGHTS_NAME, save(tensors))
    write_json(unfinished / CONFIG_NAME, {"model_cfg": teacher.model_cfg, "preprocess_cfg": teacher.preprocess_cfg})
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    sync_folder(folder.parent)


def text_tower_bytes(teacher: Teacher) -> int:
    """About what `save_text_tower` takes on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _text_state(teacher).values())


def _text_state(teacher: Teacher) -> dict[str, Tensor]:
    text = getattr(teacher.model, "text", None)  # CLIP proper keeps its text tower's parts to itself
    state = teacher.model.state_dict() if text is None else text.state_dict()
    state |= {name: getattr(teacher.model, name) for name in _SCALARS}
    return {name: tensor for name, tensor in state.items() if tensor is not None and not name.startswith("visual.")}


def load_text_tower(folder: Path, device: torch.device) -> TextTower:
    """Load what `save_text_tower` wrote; needs no network.

    Raises:
        CacheError: if a file is missing or damaged.
        InputError: if the tokenizer needs a package that is not installed.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
        state = load_file(folder / WEIGHTS_NAME)
        logit_scale = float(state["logit_scale"].exp())
        # Copied, since a tensor of a mapped file may lie at an odd address, and matrix products differ by alignment.
        weights = {name: tensor.clone() for name, tensor in state.items() if name not in _SCALARS}
        with quiet_open_clip():
            module = _build(folder, config["model_cfg"], weights)
            # `assign` keeps the number format of each tensor: a half-precision teacher has some in float32.
            module.load_state_dict(weights, assign=True)
            tokenizer = load_tokenizer(f"{LOCAL}{folder}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CacheError(f"{folder}: the text tower cannot be loaded ({reason}); stage one writes it anew") from error
    return TextTower(module, tokenizer, config, logit_scale, device)


def _build(folder: Path, model_cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    text_cfg = dict(model_cfg["text_cfg"])
    if text_cfg.get("hf_model_name"):
        text_cfg |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    halves = [tensor.dtype for tensor in weights.values() if tensor.dtype in (torch.float16, torch.bfloat16)]
    module: nn.Module = _build_text_tower(
        model_cfg["embed_dim"], text_cfg, model_cfg.get("quick_gelu", False), halves[0] if halves else None
    )
    return module
