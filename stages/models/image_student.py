"""Students: small image encoders that end in the teacher's embedding space.

`open_clip:` and `timm:` students are built by open_clip's own tower builder, so that their weights carry the names
under which open_clip loads them again.
"""

from contextlib import suppress
from functools import lru_cache
from typing import Any

import timm
import torch
from open_clip.model import _build_vision_tower
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from ...cache.errors import InputError
from ..settings.plugins import load_function
from .architectures import close_to, model_config


def build_student(spec: str, embed_dim: int, image_size: int) -> nn.Module:
    """Build a student with fresh weights, from torch's current random state.

    Args:
        spec: `timm:NAME`, `open_clip:ARCH` (the image tower of an architecture or of a model config file, .json) or
            `package.module:function`, called as `function(embed_dim=…, image_size=…)`.
        embed_dim: width of the teacher's embeddings.
        image_size: side of the square input, pixels.

    Returns:
        Module from (B, 3, image_size, image_size) float32 to (B, embed_dim), not normalised.

    Raises:
        InputError: if there is no such model, it cannot be built at this size, or it emits something else.
    """
    kind, _, name = spec.partition(":")
    if kind == "timm":
        student = _build_tower(spec, _timm_cfg(name, embed_dim, image_size))
    elif kind == "open_clip":
        student = _build_tower(spec, _open_clip_cfg(name, embed_dim, image_size))
    else:
        student = _call_function(spec, embed_dim, image_size)
    _check_output(spec, student, embed_dim, image_size)
    return student


def student_model_cfg(spec: str, embed_dim: int, image_size: int) -> dict[str, Any] | None:
    """What open_clip's model config says about the student.

    Returns:
        `{"embed_dim": …, "vision_cfg": {…}}` and, for `open_clip:`, "quick_gelu"; None for a function of the user's.
        open_clip builds a `timm:` tower at timm's own image size: weights of a student whose parameters
        depend on the size (a ViT's positions) fit only after `visual.set_input_size(image_size)`.

    Raises:
        InputError: if there is no such model.
    """
    kind, _, name = spec.partition(":")
    if kind == "timm":
        return _timm_cfg(name, embed_dim, image_size)
    if kind == "open_clip":
        return _open_clip_cfg(name, embed_dim, image_size)
    return None


def _build_tower(spec: str, config: dict[str, Any]) -> nn.Module:
    embed_dim, vision = config["embed_dim"], config["vision_cfg"]
    image_size = vision["image_size"]
    try:
        student: nn.Module = _build_vision_tower(embed_dim, vision, quick_gelu=config.get("quick_gelu", False))
        if isinstance(student, TimmModel) and student.trunk.default_cfg["input_size"][-1] != image_size:
            _resize_timm(student, embed_dim, vision)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"{spec}: cannot be built for {image_size} x {image_size} pixels ({_reason(error)})"
        ) from error
    return student


def _resize_timm(student: TimmModel, embed_dim: int, vision: dict[str, Any]) -> None:
    """Bring a timm tower to its image size, which open_clip has no way to pass on."""
    if vision.get("timm_proj") == "":
        with suppress(TypeError):  # models without this argument take any size
            student.trunk = timm.create_model(
                vision["timm_model_name"],
                num_classes=embed_dim,
                global_pool=vision.get("timm_pool", "avg"),
                img_size=vision["image_size"],
            )
    else:
        student.set_input_size(vision["image_size"])


def _timm_cfg(name: str, embed_dim: int, image_size: int) -> dict[str, Any]:
    if not timm.is_model(name):
        raise InputError(f"timm:{name}: timm {timm.__version__} has no such model{close_to(name, timm.list_models())}")
    # The classifier as projection: `timm_proj = "linear"` miscounts the features of some models.
    vision = {"timm_model_name": name, "timm_pool": _timm_pool(name), "timm_proj": "", "image_size": image_size}
    return {"embed_dim": embed_dim, "vision_cfg": vision}


@lru_cache
def _timm_pool(name: str) -> str:
    """The model's own way to pool; "" would leave some families unpooled."""
    with torch.random.fork_rng(devices=[]):  # asking must not change which weights the student starts from
        pool = getattr(timm.create_model(name), "global_pool", None)
    return pool if isinstance(pool, str) and pool else "avg"


def _open_clip_cfg(name: str, embed_dim: int, image_size: int) -> dict[str, Any]:
    config = model_config(name, "vision_cfg", shown=f"open_clip:{name}")
    vision = {**config["vision_cfg"], "image_size": image_size}
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    return {"embed_dim": embed_dim, "vision_cfg": vision, "quick_gelu": bool(config.get("quick_gelu", False))}


def _call_function(spec: str, embed_dim: int, image_size: int) -> nn.Module:
    function = load_function(spec, takes=("embed_dim", "image_size"))
    student = function(embed_dim=embed_dim, image_size=image_size)
    if not isinstance(student, nn.Module):
        raise InputError(f"{spec}: returned a {type(student).__name__}, wanted a torch.nn.Module")
    return student


def _check_output(spec: str, student: nn.Module, embed_dim: int, image_size: int) -> None:
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            output = student(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"{spec}: cannot take {image_size} x {image_size} pixels ({_reason(error)})") from error
    finally:
        student.train(was_training)
    wanted = f"wanted (2, {embed_dim}), the width of the teacher's embeddings"
    if not isinstance(output, Tensor):
        raise InputError(f"{spec}: emits a {type(output).__name__} for 2 images; {wanted}")
    if output.shape != (2, embed_dim):
        raise InputError(f"{spec}: emits {tuple(output.shape)} for 2 images; {wanted}")
    if not output.isfinite().all():
        raise InputError(f"{spec}: emits values that are not finite for black images; wanted numbers")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
