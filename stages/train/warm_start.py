"""Warm start: a student takes what fits of weights that exist already, before its first step."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from sys import modules
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from ...cache.errors import InputError
from ..models.architectures import read_model_config
from ..models.checkpoint_states import State
from ..models.preprocessing import CONFIG_NAME, of_images
from ..models.pretrained_tags import Asked, quiet_open_clip, tag_weights
from ..models.weights_file import one_line, read_weights, weights_digest
from ..run_folder.checkpoint import load_checkpoint, weights_to_use
from ..run_folder.run_record import CHECKPOINT, read_run_record

_MIN_SHARE = 0.5
"""Of the student's parameters, its projection aside: with less it is another model's weights."""
_NAMES_SHOWN = 4
_BY_HAND = "give the path of the .safetensors file as init"


@dataclass(frozen=True)
class WarmStart:
    """What a warm start took.

    Attributes:
        num_taken: tensors of the student that have the weights' values now.
        fresh: names of those that keep their random ones.
        line: one line for the user.
        digest: of the weights as they were read, whatever file they came in.
        preprocess: what is known of the images that they were trained with; keys as in open_clip's `preprocess_cfg`.
    """

    num_taken: int
    fresh: list[str]
    line: str
    digest: str
    preprocess: Mapping[str, Any]

    def remark(self, preprocess: Mapping[str, Any]) -> str:
        """One line if the weights were trained with other mean or std than a student sees, the teacher's; else ""."""
        other = [key for key in ("mean", "std") if key in self.preprocess and key in preprocess]
        other = [key for key in other if not np.allclose(self.preprocess[key], preprocess[key], atol=0.02)]
        if not other:
            return ""
        of_init, of_teacher = (
            ", ".join(f"{key} {list(cfg[key])}" for key in other) for cfg in (self.preprocess, preprocess)
        )
        return f"init was trained on images of {of_init}; here it sees those of the teacher's {of_teacher}, and adapts"

    @property
    def record(self) -> dict[str, object]:
        """What `run.json` says of it."""
        return {"digest": self.digest, "taken": self.num_taken, "fresh": self.fresh}


def warm_start(student: nn.Module, spec: str, init: str, image_size: int) -> WarmStart:
    """Put existing weights into a student that was just built; for a run that begins, never for one that goes on.

    A tensor is taken where name and shape fit. Positions of another image size are interpolated, by timm's or
    open_clip's own functions.

    Args:
        student: from `build_student`, not compiled; changed in place, on whatever device it is.
        spec: what it was built from: `timm:NAME`, `open_clip:ARCH` or `package.module:function`.
        init: `run:FOLDER` (another run's last step, its averaged weights where it has some), `pretrained` (timm's own
            weights of a `timm:` model), `open_clip:TAG` (the image tower of the same architecture's tag), or a
            `.safetensors` or `.pt` file: of this tower, of timm's model, or of a CLIP that has it as `visual`, in any
            container that `choose_state` knows.
        image_size: side of the student's input, pixels.

    Raises:
        InputError: if the weights cannot be found or read, are not finite, or fit less than half of the student's
            parameters, its projection aside.
    """
    with quiet_open_clip():
        own = student.state_dict()
        sizes = {name: tensor.numel() for name, tensor in own.items() if name not in _projection(student)}

        def share(state: State) -> float:
            fit = _best_fit(student, own, {name: _widened(tensor) for name, tensor in state.items()})
            return sum(size for name, size in sizes.items() if name in fit) / max(1, sum(sizes.values()))

        read, said, preprocess = _read(spec, init, share)
        state = {name: _widened(tensor) for name, tensor in read.items()}
        taken = _best_fit(student, own, state)
    fresh = [name for name in own if name not in taken]
    _require_enough(student, taken, spec, said, image_size)
    if bad := [name for name, tensor in taken.items() if not tensor.isfinite().all()]:
        raise InputError(f"{said}: {_some(bad)} not finite; choose other weights")
    student.load_state_dict(taken, strict=False)
    line = f"{len(taken)} of {len(own)} tensors from {said}"
    as_read = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    if adapted := [name for name, tensor in taken.items() if tensor.untyped_storage().data_ptr() not in as_read]:
        line += f"; adapted: {_some(adapted)}"
    if fresh:
        line += f"; fresh: {_some(fresh)}"
    return WarmStart(len(taken), fresh, line, weights_digest(read), preprocess)


def _read(spec: str, init: str, share: Callable[[State], float]) -> tuple[dict[str, Tensor], str, Mapping[str, Any]]:
    """Weights under the names that they have, what to call them, and what is known of the images that they know.

    Args:
        share: how much of the student a state has.
    """
    kind, _, rest = init.partition(":")
    if kind == "run":
        return *_of_run(Path(rest)), read_run_record(Path(rest)).get("preprocess", {})
    if kind == "open_clip":
        architecture = spec.removeprefix("open_clip:")
        asked = Asked(f"model = {spec!r}", f"init = {init!r}", _BY_HAND, prefix="open_clip:")
        path, tag = tag_weights(architecture.replace("/", "-"), rest, asked)
        return read_weights(path, share)[0], f"{architecture}, {rest}", tag
    if init == "pretrained":
        cfg = timm.get_pretrained_cfg(spec.removeprefix("timm:"))
        return *_of_timm(spec), {} if cfg is None else {"mean": cfg.mean, "std": cfg.std}
    state, line = read_weights(Path(init), share)
    config = Path(init).parent / CONFIG_NAME
    preprocess = of_images(read_model_config(config, (), str(config))[1]) if config.is_file() else {}
    return state, f"{init} ({line})" if line else init, preprocess


def _of_run(run_dir: Path) -> tuple[dict[str, Tensor], str]:
    read_run_record(run_dir)  # refuses a folder that is no run
    checkpoint = load_checkpoint(run_dir / CHECKPOINT)
    key = weights_to_use(checkpoint)
    words = "averaged weights at" if key == "ema" else "at"
    return dict(checkpoint[key]), f"{run_dir}, {words} step {checkpoint['step']:,}"


def _of_timm(spec: str) -> tuple[dict[str, Tensor], str]:
    name = spec.removeprefix("timm:")
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise InputError(f"init = 'pretrained': timm {timm.__version__} has no weights for {name}; remove the key")
    try:
        with torch.random.fork_rng(devices=[]):  # dropout draws what it draws without a warm start
            model = timm.create_model(name, pretrained=True)  # with its own classifier, at its own size
    except Exception as error:  # hub, network and disk errors have no type in common
        raise InputError(
            f"init = 'pretrained': timm cannot load its weights of {name} ({one_line(error)}); fetch them where there "
            f"is a network and {_BY_HAND}"
        ) from error
    return model.state_dict(), f"timm's {name}.{cfg.tag}" if cfg.tag and "." not in name else f"timm's {name}"


def _widened(tensor: Tensor) -> Tensor:
    """Half precision as float32: a CPU cannot interpolate fp16, and the student gets its own format either way."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def _best_fit(student: nn.Module, own: State, state: State) -> dict[str, Tensor]:
    """The tensors that a student can take of a state, its names meant in the way in which most fit."""
    fits = (_fit(own, named) for named in _namings(student, state))
    return max(fits, key=lambda fit: sum(tensor.numel() for tensor in fit.values()))


def _namings(student: nn.Module, state: State) -> Iterator[State]:
    """The ways in which a checkpoint's names may be meant, each with positions in the student's number."""
    for named in (state, _below("visual.", state)):
        yield _resized_by_open_clip(student, named)
        if not isinstance(student, TimmModel):
            yield _converted_by_timm(student, named)
            continue
        head = {name: tensor for name, tensor in named.items() if name.startswith("head.")}
        for inner in (named, _below("trunk.", named)):
            trunk = _converted_by_timm(student.trunk, inner)
            yield {**head, **{f"trunk.{name}": tensor for name, tensor in trunk.items()}}


def _below(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _converted_by_timm(model: nn.Module, state: State) -> State:
    """A checkpoint in the names, and for the image size, of a timm model, by the family's own function."""
    convert: Callable[[dict[str, Tensor], nn.Module], State] | None
    convert = getattr(modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is None or not state:
        return state
    try:
        with torch.no_grad():
            return convert(dict(state), model)
    except Exception:  # written for its own family's checkpoints: on others it may trip over anything
        return state


def _resized_by_open_clip(student: nn.Module, state: State) -> State:
    """Positions of open_clip's own towers in the student's number: in all of them a grid behind one token."""
    state = dict(state)
    for name in ("positional_embedding", "attnpool.positional_embedding"):
        old, own = state.get(name), student.state_dict().get(name)
        if old is None or own is None or old.ndim != 2 or own.ndim != 2 or len(old) == len(own):
            continue
        if not (old.is_floating_point() and _is_square(len(old) - 1) and _is_square(len(own) - 1)):
            continue  # it stays as it is and will not fit
        side = isqrt(len(own) - 1)
        wrapped = {"visual.positional_embedding": old}
        resize_pos_embed(wrapped, SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side))))
        state[name] = wrapped["visual.positional_embedding"]
    return state


def _is_square(number: int) -> bool:
    return number > 0 and isqrt(number) ** 2 == number


def _fit(own: State, named: State) -> dict[str, Tensor]:
    """The tensors that a student can take."""
    return {
        name: named[name]
        for name, tensor in own.items()
        if name in named
        and isinstance(named[name], Tensor)
        and named[name].shape == tensor.shape
        and named[name].is_floating_point() == tensor.is_floating_point()
    }


def _require_enough(student: nn.Module, taken: State, spec: str, said: str, image_size: int) -> None:
    projection = _projection(student)
    sizes = {name: parameter.numel() for name, parameter in student.named_parameters() if name not in projection}
    share = sum(size for name, size in sizes.items() if name in taken) / max(1, sum(sizes.values()))
    if share < _MIN_SHARE:
        raise InputError(
            f"{said}: {share:.0%} of the parameters of {spec} at {image_size} px (projection aside) fit in name and "
            f"shape; wanted at least {_MIN_SHARE:.0%}: choose weights of the same architecture, or remove init"
        )


def _projection(student: nn.Module) -> set[str]:
    """Names of the parameters whose shape is the embedding's width: where that differs they have to start anew."""
    outputs: list[nn.Module | nn.Parameter | None] = [getattr(student, "proj", None)]
    outputs.append(getattr(getattr(student, "attnpool", None), "c_proj", None))
    if isinstance(student, TimmModel):
        outputs = [student.head]
        classifier = getattr(student.trunk, "get_classifier", lambda: None)()
        outputs += classifier if isinstance(classifier, tuple | list) else [classifier]
    ids = set()
    for output in outputs:
        ids |= {id(output)} | (set(map(id, output.parameters())) if isinstance(output, nn.Module) else set())
    return {name for name, parameter in student.named_parameters() if id(parameter) in ids}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
