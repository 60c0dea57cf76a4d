"""A timm checkpoint of the image tower alone, the projection as its classifier: `timm.create_model` loads it."""

from collections.abc import Iterator
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors.torch import save
from torch import Tensor, nn

from ...cache.disk.durable import write_bytes, write_json
from ...cache.errors import InputError
from ..models.image_student import student_model_cfg
from ..models.pretrained_tags import quiet_open_clip
from .export_job import (
    OPEN_CLIP_TOLERANCE,
    Exported,
    ExportJob,
    at_precision,
    emitted,
    largest_difference,
    require_same,
)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
"""open_clip's resize mode -> timm's crop mode, at a crop of the whole."""
_CLIP_VIT = {False: "vit_base_patch32_clip_224", True: "vit_base_patch32_clip_quickgelu_224"}
"""timm's vision transformer as CLIP has it, by QuickGELU; its sizes are arguments."""

Twin = tuple[str, dict[str, Any], dict[str, Tensor]]
"""Name, arguments and tensors of the timm model that a tower is."""


def write_timm(job: ExportJob) -> Exported:
    """Write weights and config of the image tower, and open them with timm.

    Raises:
        InputError: if timm has no model of this tower.
    """
    name, arguments, state = _twin(job)
    write_bytes(job.folder / WEIGHTS, save(at_precision(state, job.precision), {"format": "pt"}))
    preprocess = job.preprocess
    pretrained_cfg = {
        "input_size": [3, job.image_size, job.image_size],
        "interpolation": preprocess["interpolation"],
        "mean": preprocess["mean"],
        "std": preprocess["std"],
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES.get(preprocess["resize_mode"], "center"),
        "num_classes": job.embed_dim,
        **{key: value for key, value in _traits(name).items() if key in ("first_conv", "classifier")},
    }
    config = {"architecture": name, "num_classes": job.embed_dim, "pretrained_cfg": pretrained_cfg}
    write_json(job.folder / CONFIG, {**config, **({"model_args": arguments} if arguments else {})})
    with quiet_open_clip():
        model = timm.create_model(f"local-dir:{job.folder}", pretrained=True).eval()
    check = require_same(model, job.student, job.example_images(), job.precision, OPEN_CLIP_TOLERANCE)
    extra = "".join(f", {key}={value!r}" for key, value in arguments.items())
    usage = [
        "import timm",
        'model = timm.create_model("local-dir:.", pretrained=True)',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
    ]
    by_file = (
        f'By file: `timm.create_model("{name}", num_classes={job.embed_dim}{extra}, pretrained=True, '
        f'pretrained_cfg_overlay=dict(file="{WEIGHTS}", num_classes={job.embed_dim}))`. timm drops the classifier, '
        "which is the projection, of a file whose overlay does not say `num_classes`."
    )
    return Exported(model, None, usage, {"check": {"image": check}, "timm": {"model": name, **arguments}}, [by_file])


def _traits(name: str) -> dict[str, Any]:
    """What timm says of a model's weights: names of its first convolution and of its classifier."""
    known = timm.get_pretrained_cfg(name)
    return dict(known.to_dict()) if known else {}


def _twin(job: ExportJob) -> Twin:
    """The timm model that the student is, tried until one emits the same."""
    tried = False
    images = job.example_images()
    for name, arguments, state in _candidates(job):
        tried = True
        with quiet_open_clip(), torch.random.fork_rng(devices=[]):
            try:
                model = timm.create_model(name, num_classes=job.embed_dim, **arguments)
                model.load_state_dict(state)
                found = emitted(model.eval(), images)
            except (RuntimeError, TypeError, AssertionError, ValueError):
                continue
        if largest_difference(found, emitted(job.student, images)) <= OPEN_CLIP_TOLERANCE:
            return name, arguments, state
    why = "with these settings" if tried else "at all"
    raise InputError(
        f"--format timm: {job.spec}: timm cannot build this tower {why}; take --format open_clip, onnx or torch"
    )


def _candidates(job: ExportJob) -> Iterator[Twin]:
    student = job.student
    config = student_model_cfg(job.spec, job.embed_dim, job.image_size)
    assert config is not None, "the table of exporters lets only open_clip's own students in"
    vision = config["vision_cfg"]
    if isinstance(student, TimmModel):
        state = _trunk_state(student)
        if state is None:
            return
        name = vision["timm_model_name"]
        default = getattr(timm.create_model(name), "global_pool", None)
        pool = vision.get("timm_pool", "avg")
        base = {} if pool in (default, "") else {"global_pool": pool}
        yield name, base, state
        yield name, {**base, "img_size": job.image_size}, state
    elif isinstance(student, VisionTransformer):
        heads = student.transformer.resblocks[0].attn.num_heads
        arguments = {
            "img_size": job.image_size,
            "patch_size": vision.get("patch_size", 16),
            "embed_dim": vision.get("width", 768),
            "depth": vision.get("layers", 12),
            "num_heads": heads,
            "mlp_ratio": vision.get("mlp_ratio", 4.0),
        }
        yield _CLIP_VIT[bool(config["quick_gelu"])], arguments, _clip_vit_state(student)


def _trunk_state(student: TimmModel) -> dict[str, Tensor] | None:
    """Tensors of a timm model whose classifier is the projection; None where the head is more than one."""
    state = dict(student.trunk.state_dict())
    head = dict(student.head.named_children())
    if not head:
        return state
    if set(head) - {"drop", "proj"}:
        return None
    classifier = _classifier(student)
    weight, bias = student.head.proj.weight, student.head.proj.bias
    state[f"{classifier}.weight"] = weight
    state[f"{classifier}.bias"] = torch.zeros(len(weight)) if bias is None else bias
    return state


def _classifier(student: TimmModel) -> str:
    name = student.trunk.pretrained_cfg.get("classifier") or "fc"
    return str(name if isinstance(name, str) else name[0])


_CLIP_NAMES = (
    ("conv1.", "patch_embed.proj."),
    ("transformer.resblocks.", "blocks."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
"""open_clip's names of a vision transformer's parts, and timm's."""


def _clip_vit_state(student: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, tensor in student.state_dict().items():
        if name == "proj":
            state["head.weight"] = tensor.T
            state["head.bias"] = torch.zeros(tensor.shape[1])
        elif name == "class_embedding":
            state["cls_token"] = tensor[None, None]
        elif name == "positional_embedding":
            state["pos_embed"] = tensor[None]
        else:
            for ours, theirs in _CLIP_NAMES:
                name = name.replace(ours, theirs)
            state[name] = tensor
    return state
