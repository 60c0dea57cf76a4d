"""Students: small image encoders that end in the teacher's embedding space.

`open_clip:` and `timm:` students are built by open_clip's own tower builder, so that their weights carry the names
under which open_clip loads them again.
"""

from contextlib import suppress
from functools import lru_cache
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from torch import nn

from ...cache.errors import InputError, did_you_mean
from ..settings.models import STUDENTS
from ..settings.plugins import load_function
from .architectures import model_config
from .open_clip_towers import build_image_tower
from .tower_check import require_embeddings
from .weights_file import one_line


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
    scheme, _, name = spec.partition(":")
    sizes = {"embed_dim": embed_dim, "image_size": image_size}
    if scheme in STUDENTS:
        student = load_function(STUDENTS[scheme], ["name", *sizes])(name=name, **sizes)
    else:
        student = load_function(spec, sizes)(**sizes)
    if not isinstance(student, nn.Module):
        raise InputError(f"{spec}: returned a {type(student).__name__}, wanted a torch.nn.Module")
    black = torch.zeros(2, 3, image_size, image_size)
    require_embeddings(student, black, embed_dim, spec, f"images of {image_size} x {image_size} pixels")
    return student


def student_model_cfg(spec: str, embed_dim: int, image_size: int) -> dict[str, Any] | None:
    """What open_clip's model config says about the student.

    Returns:
        `{"embed_dim": …, "vision_cfg": {…}}` and, for `open_clip:`, "quick_gelu"; None where open_clip cannot build it.
        open_clip builds a `timm:` tower at timm's own image size: weights of a student whose parameters
        depend on the size (a ViT's positions) fit only after `visual.set_input_size(image_size)`.

    Raises:
        InputError: if there is no such model.
    """
    scheme, _, name = spec.partition(":")
    config_of = {"timm": _timm_cfg, "open_clip": _open_clip_cfg}.get(scheme)
    return config_of(name, embed_dim, image_size) if config_of else None


def timm_student(name: str, embed_dim: int, image_size: int) -> nn.Module:
    """A timm model whose classifier is the projection, in open_clip's wrapper."""
    return _build(f"timm:{name}", _timm_cfg(name, embed_dim, image_size))


def open_clip_student(name: str, embed_dim: int, image_size: int) -> nn.Module:
    """The image tower of an open_clip architecture, or of a model config file."""
    return _build(f"open_clip:{name}", _open_clip_cfg(name, embed_dim, image_size))


def _build(spec: str, config: dict[str, Any]) -> nn.Module:
    image_size = config["vision_cfg"]["image_size"]
    try:
        student = build_image_tower(config)
        if isinstance(student, TimmModel) and student.trunk.default_cfg["input_size"][-1] != image_size:
            _resize_timm(student, config["embed_dim"], config["vision_cfg"])
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"{spec}: cannot be built for {image_size} x {image_size} pixels ({one_line(error)})"
        ) from error
    return student


def _resize_timm(student: TimmModel, embed_dim: int, vision: dict[str, Any]) -> None:
    """Bring a timm tower to its image size, which open_clip has no way to pass on."""
    name, pool, size = vision["timm_model_name"], vision.get("timm_pool", "avg"), vision["image_size"]
    if vision.get("timm_proj") != "":
        student.set_input_size(size)
        return
    with suppress(TypeError):  # models without this argument take any size
        student.trunk = timm.create_model(name, num_classes=embed_dim, global_pool=pool, img_size=size)


def _timm_cfg(name: str, embed_dim: int, image_size: int) -> dict[str, Any]:
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise InputError(f"timm:{name}: timm {timm.__version__} has no such model{hint}")
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
    config = model_config(name, ["vision_cfg"], shown=f"open_clip:{name}")
    vision = {**config["vision_cfg"], "image_size": image_size}
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    return {"embed_dim": embed_dim, "vision_cfg": vision, "quick_gelu": bool(config.get("quick_gelu", False))}
