"""Students: many families end in the teacher's space; what does not fit is refused in one line."""

import json
import sys

import pytest
import torch

from dimefm.cache import InputError
from dimefm.stages.models.image_student import build_student, student_model_cfg
from dimefm.stages.models.open_clip_towers import build_image_tower

from ...support.small_cache import STUDENTS

TIMM = ["mobilenetv3_small_100", "resnet10t", "convnext_atto", "efficientvit_b0"]
SIZED = ["vit_tiny_patch16_224", "levit_128s"]
"""Models that are built for one image size."""
TOWER = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 224}


@pytest.fixture
def own_students(tmp_path, monkeypatch):
    """A module of the user's in the folder where the command is run."""
    (tmp_path / "own_students.py").write_text(STUDENTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_students", None)


@pytest.mark.parametrize("name", TIMM + SIZED)
def test_timm_families_train_at_64_pixels(name):
    student = build_student(f"timm:{name}", embed_dim=20, image_size=64)
    assert student.training
    student(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_open_clip_architectures_are_built_at_any_size_with_random_weights():
    first, second = (build_student("open_clip:RN50", embed_dim=20, image_size=64) for _ in range(2))
    assert not (first.conv1.weight == second.conv1.weight).all()


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_config_file_is_an_architecture(tmp_path, nested):
    config = {"embed_dim": 999, "vision_cfg": TOWER, "text_cfg": {}, "quick_gelu": True}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"model_cfg": config} if nested else config))
    student = build_student(f"open_clip:{path}", embed_dim=20, image_size=32)
    assert student(torch.zeros(2, 3, 32, 32)).shape == (2, 20)
    assert "QuickGELU" in repr(student)
    assert student_model_cfg(f"open_clip:{path}", 20, 32) == {
        "embed_dim": 20,
        "vision_cfg": {**TOWER, "image_size": 32},
        "quick_gelu": True,
    }


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "convnext_atto"])
def test_open_clip_rebuilds_a_timm_student_from_its_model_config(name):
    student = build_student(f"timm:{name}", embed_dim=20, image_size=64).eval()
    config = student_model_cfg(f"timm:{name}", 20, 64)
    again = build_image_tower(config).eval()
    again.load_state_dict(student.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert (again(images) == student(images)).all()


def test_weights_follow_the_seed_whether_or_not_the_model_was_built_before():
    def weights():
        torch.manual_seed(3)
        return build_student("timm:resnet18d", embed_dim=20, image_size=32).state_dict()

    first, second = weights(), weights()
    assert all((first[key] == second[key]).all() for key in first)


def test_black_images_give_finite_embeddings():
    student = build_student("timm:mobilenetv3_small_100", embed_dim=20, image_size=32)
    assert student(torch.zeros(2, 3, 32, 32)).isfinite().all()


def test_a_function_of_the_users_is_called(own_students):
    student = build_student("own_students:with_dropout", embed_dim=20, image_size=8)
    assert student(torch.zeros(2, 3, 8, 8)).shape == (2, 20)
    assert student_model_cfg("own_students:with_dropout", 20, 8) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "own_students:too_wide",
            r"emits \(2, 21\) for 2 images .*; wanted \(2, 20\), the width of the teacher",
        ),
        ("own_students:no_model", "returned a int, wanted a torch.nn.Module"),
        ("own_students:other_arguments", "cannot be called as function"),
        ("own_students:absent", "cannot be imported"),
        ("no_such_package:student", "cannot be imported"),
        ("timm:mobilenet_small", "no such model; did you mean mobilenetv3_small"),
        ("timm:zzz", "no such model$"),
        ("open_clip:ViT-B32", "no such architecture; did you mean ViT-B-32"),
        ("open_clip:nowhere.json", "no such file"),
    ],
)
def test_what_cannot_be_a_student_is_refused_in_one_line(own_students, spec, message):
    with pytest.raises(InputError, match=message) as refused:
        build_student(spec, embed_dim=20, image_size=24)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"text_cfg": {}}, "no vision_cfg in it"),
        ({"vision_cfg": {"depth": 3}}, "cannot be built for 32 x 32 pixels"),
        ({"vision_cfg": {**TOWER, "patch_size": 64}}, "cannot take images of 32 x 32 pixels"),
        ({"vision_cfg": {**TOWER, "output_tokens": True}}, "emits a tuple for 2 images of"),
        ({"vision_cfg": {"timm_model_name": "resnet10t", "timm_proj": "none"}}, r"emits \(2, 512\)"),
    ],
)
def test_model_configs_that_make_no_student_are_refused(tmp_path, document, message):
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        build_student(f"open_clip:{tmp_path / 'bad.json'}", embed_dim=20, image_size=32)
