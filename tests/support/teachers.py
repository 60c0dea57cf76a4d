"""A teacher for tests: random weights, small enough to embed a picture in a millisecond."""

import json
from pathlib import Path

import torch
from open_clip import CLIP, CustomTextCLIP
from safetensors.torch import save_file

IMAGE_SIZE = 32
EMBED_DIM = 32


def teacher_config(*, quick_gelu: bool = False, custom_text: bool = False, timm: bool = False) -> dict[str, object]:
    """An open_clip model config; with `timm` the image tower is timm's smallest ResNet."""
    vision: dict[str, object] = {"image_size": IMAGE_SIZE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    if timm:
        vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": IMAGE_SIZE}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config: dict[str, object] = {"embed_dim": EMBED_DIM, "vision_cfg": vision, "text_cfg": text}
    return config | ({"quick_gelu": True} if quick_gelu else {}) | ({"custom_text": True} if custom_text else {})


def make_teacher(
    folder: Path, *, quick_gelu: bool = False, custom_text: bool = False, timm: bool = False, seed: int = 0
) -> tuple[Path, Path]:
    """Write `tiny.json`, a model config, and `tiny.safetensors`, random weights for it, into a folder; return both."""
    folder.mkdir(parents=True, exist_ok=True)
    config = teacher_config(quick_gelu=quick_gelu, custom_text=custom_text, timm=timm)
    config_path, weights_path = folder / "tiny.json", folder / "tiny.safetensors"
    config_path.write_text(json.dumps(config))
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (CustomTextCLIP if custom_text else CLIP)(**arguments)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights_path)
    return config_path, weights_path
