"""Numbers out of a sound file that no model was trained with: refused or remarked, with the number and the key."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dimefm.cache import InputError
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher
from dimefm.stages.models.plausible import bias_remark, scale_remark
from dimefm.stages.models.teacher_check import check_teacher
from dimefm.stages.settings.models import TeacherSettings


def load(files: tuple[Path, Path], folder: Path, changes: dict[str, Any], **keys: Any) -> OpenClipTeacher:
    """The tiny teacher with some numbers of its weights changed."""
    state = {**load_file(files[1]), **{name: torch.as_tensor(value) for name, value in changes.items()}}
    save_file(state, folder / "w.safetensors")
    settings = TeacherSettings(model=str(files[0]), pretrained=str(folder / "w.safetensors"), **keys)
    return load_teacher(settings, torch.device("cpu"))


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (1 / 0.07, "is 1.6e+06, the exponential of 14.29"),
        (100.0, "is 2.688e+43, the exponential of 100"),
        (117.3, "the exponential of 117.3"),
        (math.inf, "logit scale is inf"),
        (math.nan, "logit scale is nan"),
        (-math.inf, "logit scale is 0"),
    ],
)
def test_a_scale_that_is_not_its_logarithm_is_refused_until_the_key_is_set(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, stored: float, said: str
) -> None:
    with pytest.raises(InputError, match=r"set teacher\.logit_scale to the right number") as refused:
        load(tiny_teacher, tmp_path, {"logit_scale": stored})
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert (f"{stored:.4g} itself looks like one" in str(refused.value)) == (1 < stored < math.inf)
    teacher = load(tiny_teacher, tmp_path, {"logit_scale": stored}, logit_scale=14.29)
    assert teacher.logit_scale == teacher.identity()["logit_scale"] == 14.29
    assert teacher.model.logit_scale.exp().item() == pytest.approx(14.29, rel=1e-6)  # the text tower's file has it too


@pytest.mark.parametrize("scale", [1.0, 10.0, 1 / 0.07, 65.0, 100.0, 112.7, 117.3, 121.0, 500.0])
def test_no_scale_that_a_model_may_have_is_refused(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, scale: float
) -> None:
    assert load(tiny_teacher, tmp_path, {"logit_scale": math.log(scale)}).logit_scale == pytest.approx(scale, rel=1e-4)
    assert bool(scale_remark(scale, "teacher.logit_scale")) == (scale in (1.0, 500.0))


def test_an_unusual_scale_is_remarked_with_the_number_and_the_key(
    tiny_teacher: tuple[Path, Path], tmp_path: Path
) -> None:
    crops = [np.full((32, 32, 3), value, np.uint8) for value in (0, 255)]
    for changes, keys, remarks in (({"logit_scale": 0.07}, {}, 1), ({"logit_scale": 0.07}, {"logit_scale": 14.3}, 0)):
        lines = check_teacher(load(tiny_teacher, tmp_path, changes, **keys), crops, ["a cat", "two dogs"])
        found = [line for line in lines if "unusual" in line]
        assert len(found) == remarks
        assert all("logit scale 1.073" in line and "set teacher.logit_scale" in line for line in found)


@pytest.mark.parametrize(
    ("bias", "remarked"), [(None, False), (-10.0, False), (-16.5, False), (12.0, True), (-1e6, True)]
)
def test_a_sigmoid_models_bias(bias: float | None, remarked: bool) -> None:
    assert bool(bias_remark(None if bias is None else torch.tensor([bias]))) == remarked


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, bad: float
) -> None:
    rows = load_file(tiny_teacher[1])["token_embedding.weight"]
    rows[40_000, 3] = bad  # of a token that no sampled sentence has
    with pytest.raises(InputError, match=r"token_embedding\.weight: NaN or infinite in fp32"):
        load(tiny_teacher, tmp_path, {"token_embedding.weight": rows})


def test_weights_beyond_half_precision_name_the_precision(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    large = {"visual.proj": torch.full_like(load_file(tiny_teacher[1])["visual.proj"], 1e5)}
    with pytest.raises(InputError, match=r"visual\.proj: NaN or infinite in fp16.* set teacher\.precision = 'fp32'"):
        load(tiny_teacher, tmp_path, large, precision="fp16")
    assert load(tiny_teacher, tmp_path, large).embed_dim


def test_embeddings_too_small_for_half_precision_are_refused(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # float16 has steps of 6e-8 near 0: of 2e-7 and 1e-7 it keeps 3 and 2 of them.
    teacher = load(tiny_teacher, tmp_path, {})
    monkeypatch.setattr(teacher, "embed_dim", 2)
    monkeypatch.setattr(teacher, "encode_images", lambda _: torch.tensor([[2e-7, 1e-7], [1e-7, -2e-7]]))
    monkeypatch.setattr(teacher, "encode_tokens", lambda _: torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    crops = [np.full((32, 32, 3), value, np.uint8) for value in (0, 255)]
    with pytest.raises(InputError, match=r"embeddings of images: norms down to 2.24e-07.*lose their direction"):
        check_teacher(teacher, crops, ["a cat", "two dogs"])
