"""An open_clip folder: `open_clip.create_model_and_transforms("local-dir:PATH")` and `get_tokenizer` load it."""

import math
import shutil
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from safetensors.torch import save
from torch import nn

from ...cache.disk.durable import write_bytes, write_json
from ...cache.errors import InputError
from ..models.image_student import student_model_cfg
from ..models.open_clip_towers import build_image_tower
from ..models.pretrained_tags import quiet_open_clip
from ..models.teacher_source import CONFIG_NAME, LOCAL
from .export_job import OPEN_CLIP_TOLERANCE, Exported, ExportJob, OneTensor, at_precision, require_same
from .text_side import TextSide

WEIGHTS = "open_clip_model.safetensors"
_OTHERS = "take --format onnx or torch, which write each tower by itself"


def write_open_clip(job: ExportJob) -> Exported:
    """Write config, weights and tokenizer of both towers, and open them with open_clip.

    Raises:
        InputError: if the two cannot stand in one open_clip model: which, and what to take instead.
    """
    text = _text_of(job)
    image_cfg = student_model_cfg(job.spec, job.embed_dim, job.image_size)
    assert image_cfg is not None, "the table of exporters lets only open_clip's own students in"
    _require_fit(job, image_cfg)
    assert text.model_cfg is not None
    model_cfg = {
        "embed_dim": job.embed_dim,
        "vision_cfg": image_cfg["vision_cfg"],
        "text_cfg": {**text.model_cfg["text_cfg"], "output_tokens": False},  # CoCa's would return its tokens too
        "quick_gelu": _quick_gelu(job, image_cfg, text.model_cfg),
        "custom_text": True,  # a text tower of its own, whatever class the teacher's model had
    }
    if text.logit_bias is not None:
        model_cfg["init_logit_bias"] = text.logit_bias
    state = {f"visual.{name}": tensor for name, tensor in job.student.state_dict().items()}
    state |= {f"text.{name}": tensor for name, tensor in text.encoder.tower.state_dict().items()}
    state["logit_scale"] = torch.tensor(math.log(job.logit_scale))
    if text.logit_bias is not None:
        state["logit_bias"] = torch.tensor(text.logit_bias)
    write_config(job, model_cfg)
    write_bytes(job.folder / WEIGHTS, save(at_precision(state, job.precision), {"format": "pt"}))
    with quiet_open_clip():
        model = open_clip.create_model(f"{LOCAL}{job.folder}").eval()
    sentences = text.tokens(["a photo of a goldfish.", "two men stand near a fence"])
    image = require_same(model.visual, job.student, job.example_images(), job.precision, OPEN_CLIP_TOLERANCE)
    words = require_same(model.text, OneTensor(text.encoder.tower), sentences, job.precision, OPEN_CLIP_TOLERANCE)
    usage = [
        "import open_clip",
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")',
        'tokenizer = open_clip.get_tokenizer("local-dir:.")',
    ]
    return Exported(model.visual, model.text, usage, {"check": {"image": image, "text": words}})


def write_config(job: ExportJob, model_cfg: dict[str, Any]) -> None:
    """Write `open_clip_config.json` and the tokenizer's files: `open_clip.get_tokenizer` needs no more."""
    write_json(job.folder / CONFIG_NAME, {"model_cfg": model_cfg, "preprocess_cfg": job.preprocess})
    for path in job.text.tokenizer_files if job.text else ():
        shutil.copyfile(path, job.folder / path.name)


def _text_of(job: ExportJob) -> TextSide:
    text = job.text
    if text is None:
        raise InputError(
            "--format open_clip: the cache keeps no text tower of this teacher, and an open_clip model has two; take "
            "--format timm for the image tower alone, or onnx"
        )
    if text.model_cfg is None or "text_cfg" not in text.model_cfg:
        raise InputError(
            f"--format open_clip: the {text.owner}'s text tower was not made by open_clip ({_class(text)}); {_OTHERS}"
        )
    if name := text.model_cfg["text_cfg"].get("hf_model_name"):
        raise InputError(
            f"--format open_clip: the {text.owner}'s text tower is the hub's {name}, which open_clip would fetch from "
            f"there each time; {_OTHERS}"
        )
    return text


def _class(text: TextSide) -> str:
    return type(text.encoder.tower).__name__


def _require_fit(job: ExportJob, config: dict[str, Any]) -> None:
    """Refuse weights that open_clip's own tower of this config cannot hold: it builds timm models at their own size."""
    with quiet_open_clip(), torch.random.fork_rng(devices=[]):
        tower = build_image_tower(config)
    found = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in job.student.state_dict().items()}
    if found == wanted and _takes(tower, job):
        return
    native = tower.trunk.default_cfg["input_size"][-1] if isinstance(tower, TimmModel) else "another"
    raise InputError(
        f"--format open_clip: {job.spec} at {job.image_size} px: open_clip builds this timm model for {native} px "
        f"alone, and its weights depend on the size; take --format timm, onnx or torch, or train it at "
        f"image_size = {native}"
    )


@torch.inference_mode()
def _takes(tower: nn.Module, job: ExportJob) -> bool:
    try:
        tower.eval()(job.example_images())
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _quick_gelu(job: ExportJob, image_cfg: dict[str, Any], text_cfg: dict[str, Any]) -> bool:
    """open_clip has one switch for both towers; timm's towers and ResNets do not look at it."""
    vision = image_cfg["vision_cfg"]
    image_looks = not vision.get("timm_model_name") and not isinstance(vision.get("layers"), list | tuple)
    of_text = bool(text_cfg.get("quick_gelu", False))
    of_image = bool(image_cfg.get("quick_gelu", False))
    if image_looks and of_image != of_text:
        owner = job.text.owner if job.text else "teacher"
        words = {True: "QuickGELU", False: "GELU"}
        raise InputError(
            f"--format open_clip: {job.spec} has {words[of_image]} and the {owner}'s text tower {words[of_text]}, and "
            f"an open_clip model has one of them for both; {_OTHERS}, or train an architecture with {words[of_text]}"
        )
    return of_text
