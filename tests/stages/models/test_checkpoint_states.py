"""Weights as people write them: containers, wrappers' names, averages. Told by whether they fit the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dimefm.cache import InputError
from dimefm.stages.models.checkpoint_states import choose_state
from dimefm.stages.models.image_student import build_student
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher
from dimefm.stages.settings.models import TeacherSettings
from dimefm.stages.train.warm_start import warm_start

State = dict[str, torch.Tensor]


def below(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """Weights of the same names and shapes that are not these."""
    return {name: tensor + 1 for name, tensor in state.items()}


def optimizer(state: State) -> dict[str, Any]:
    return {"state": dict(enumerate({"exp_avg": tensor} for tensor in state.values())), "param_groups": [{"lr": 1.0}]}


def averaging_optimizer(state: State) -> dict[str, Any]:
    return {"grad_ema": other(state), "param_groups": [{"lr": 1.0}]}


WRITTEN = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"epoch": 3, "state_dict": w, "optimizer": optimizer(w)},
    "model": lambda w: {"model": w, "optimizer": optimizer(w), "epoch": torch.tensor(3)},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": optimizer(w)},
    "a name of its own": lambda w: {"net": {"weights": w}, "step": 3},
    "an optimizer that averages": lambda w: {"state_dict": w, "optimizer": averaging_optimizer(w)},
    "DDP": lambda w: below("module.", w),
    "compiled": lambda w: {"model": below("_orig_mod.", w)},
    "compiled in DDP": lambda w: below("module._orig_mod.", w),
    "DDP compiled": lambda w: {"state_dict": below("_orig_mod.module.", w)},
    "a compiled tower": lambda w: {
        name.replace("visual.", "visual._orig_mod."): tensor
        for name, tensor in (below("visual.", w) if "proj" in w else w).items()
    },
    "FSDP": lambda w: below("_fsdp_wrapped_module.", w),
    "Lightning": lambda w: {"state_dict": below("model.", w) | {"criterion.weight": torch.ones(3)}, "callbacks": {}},
    "Lightning, compiled": lambda w: {"state_dict": below("model._orig_mod.", w)},
    "Lightning, deeper": lambda w: {"state_dict": below("net.clip.", w)},
    "DeepSpeed": lambda w: {"module": below("module.", w)},
    "EMA by timm": lambda w: {"state_dict": other(w), "state_dict_ema": below("module.", w)},
    "ema": lambda w: {"model": other(w), "ema": w},
    "model_ema": lambda w: {"model": other(w), "model_ema": {"module": w, "decay": 0.9}},
    "ema_state_dict": lambda w: {"model_state_dict": below("module.", other(w)), "ema_state_dict": w},
    "EMA by torch": lambda w: {"model": other(w), "ema": {"n_averaged": torch.tensor(7), **below("module.", w)}},
    "EMA by Lightning": lambda w: {"state_dict": below("model.", other(w)) | below("ema_model.", w)},
}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_teacher_is_loaded_from_what_people_write(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, written: str
) -> None:
    config, weights = tiny_teacher
    torch.save(WRITTEN[written](load_file(weights)), tmp_path / "w.pt")
    plain, found = (load(config, path) for path in (weights, tmp_path / "w.pt"))
    assert found.identity()["weights"] == plain.identity()["weights"]
    is_ema = "ema" in written.lower()
    assert len(found.notes) == is_ema and all("averaged weights under" in note for note in found.notes)


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("spec", ["timm:mobilenetv3_small_050", "open_clip"])
def test_a_student_begins_with_the_same(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, spec: str, written: str
) -> None:
    spec = f"open_clip:{tiny_teacher[0]}" if spec == "open_clip" else spec
    source, student = (build_student(spec, 768, 32) for _ in range(2))  # of which half is the projection
    torch.save(WRITTEN[written](dict(source.state_dict())), tmp_path / "w.pt")
    warm = warm_start(student, spec, str(tmp_path / "w.pt"), 32)
    assert warm.fresh == [] and all(
        torch.equal(tensor, source.state_dict()[name]) for name, tensor in student.state_dict().items()
    )
    assert ("averaged weights under" in warm.line) == ("ema" in written.lower())


def load(config: Path, weights: Path) -> OpenClipTeacher:
    return load_teacher(TeacherSettings(model=str(config), pretrained=str(weights)), torch.device("cpu"))


def fraction(model: nn.Module, state: Any) -> float:
    own = model.state_dict()
    return sum(name in state and state[name].shape == tensor.shape for name, tensor in own.items()) / len(own)


def test_averages_of_parameters_alone_do_not_count_for_a_model_with_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    averaged = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    document = {"model": model.state_dict(), "ema": averaged}
    state, line = choose_state(document, lambda state: fraction(model, state))  # type: ignore[misc]
    assert torch.equal(state["0.weight"], model[0].weight)
    assert line == "the weights under `model` are taken; others are under `ema`"


def test_a_model_that_has_a_wrappers_name_itself_keeps_it() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 3), "head": nn.Linear(3, 2)})
    state, line = choose_state(model.state_dict(), lambda state: fraction(model, state))  # type: ignore[misc]
    assert state.keys() == model.state_dict().keys() and line == ""


def test_torchs_own_average_of_a_model_is_that_model() -> None:
    model = nn.Linear(2, 3)
    state, _ = choose_state(AveragedModel(model).state_dict(), lambda state: fraction(model, state))  # type: ignore[misc]
    assert state.keys() == {"weight", "bias"}


def test_of_several_that_fit_a_line_says_which(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    config, weights = tiny_teacher
    state = load_file(weights)
    torch.save({"student": other(state), "model": state}, tmp_path / "two.pt")
    teacher = load(config, tmp_path / "two.pt")
    assert teacher.identity()["weights"] == load(config, weights).identity()["weights"]
    assert "the weights under `model` are taken; others are under `student`" in teacher.notes[0]


def test_another_model_is_refused_whatever_it_is_in(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    for document in ({"model": {"a.weight": torch.ones(3)}}, {"ema": {"b": torch.ones(2)}}):
        torch.save(document, tmp_path / "w.pt")
        with pytest.raises(InputError, match="not the weights of this architecture") as refused:
            load(tiny_teacher[0], tmp_path / "w.pt")
        assert "\n" not in str(refused.value)


def test_a_text_tower_of_another_width_is_refused_in_one_line(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    state = load_file(tiny_teacher[1])
    state["positional_embedding"] = torch.zeros(16, 48)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match="not the weights of this architecture"):
        load(tiny_teacher[0], tmp_path / "w.pt")


def test_another_models_weights_are_one_line_whatever_open_clip_makes_of_their_names(
    tiny_teacher: tuple[Path, Path], tmp_path: Path
) -> None:
    """open_clip takes these names for Apple's MobileCLIP and looks for its tower."""
    names = ("image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight", "text_encoder.projection_layer", "logit_scale")
    torch.save({name: torch.ones(2, 2) for name in names}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt"):
        load(tiny_teacher[0], tmp_path / "w.pt")
