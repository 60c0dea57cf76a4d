"""A student is tried on every kind of batch that it will meet: what would fail in the run is refused before it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dimefm.cache import InputError
from dimefm.stages.run_folder.load_student import load_student
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.processes import World
from dimefm.stages.train.student import Student
from dimefm.stages.train.trial_step import piece_sizes

from ...support.small_cache import EMBED_DIM, make_cache
from ...support.training import train_one

WORLD = World(torch.device("cpu"))
STUDENTS = """
import torch
from torch import nn

class Emits(nn.Module):
    def __init__(self, width, while_training, always):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                   nn.Linear(8, width))
        self.other = nn.Linear(8, width)
        self.while_training, self.always = while_training, always
    def forward(self, images):
        out = self.inner(images)
        return self.while_training(out) if self.training else self.always(out)

def same(out): return out

WAYS = {
    "a_tuple": lambda out: (out, out), "a_list": lambda out: [out, out], "a_dict": lambda out: {"embedding": out},
    "features": lambda out: out[:, :, None, None], "too_wide": lambda out: torch.cat([out, out], 1),
    "one_row": lambda out: out.mean(0, keepdim=True), "squeezed": lambda out: out.squeeze(),
    "half": lambda out: out.half(), "double": lambda out: out.double(), "numbers": lambda out: out.long(),
    "nan": lambda out: out * float("nan"), "no_gradient": lambda out: out.detach(), "same": same,
    "noise": lambda out: out + torch.rand_like(out),
}

def __getattr__(name):
    if name not in globals().get("NAMES", ()):
        raise AttributeError(name)
    mode, way = name.split("__")
    def build(embed_dim, image_size):
        return Emits(embed_dim, WAYS[way] if mode != "scored" else same, WAYS[way] if mode != "training" else same)
    return build

NAMES = {f"{mode}__{way}" for mode in ("training", "scored", "both") for way in WAYS}

def norms(embed_dim, image_size):
    return nn.Sequential(nn.Conv2d(3, 8, image_size), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, embed_dim))

def pairs_only(embed_dim, image_size):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = norms(embed_dim, image_size)
        def forward(self, images):
            return self.inner(images.reshape(-1, 2, *images.shape[1:]).flatten(0, 1)) if self.training else \\
                self.inner(images)
    return Pairs()

def frozen(embed_dim, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, embed_dim)).requires_grad_(False)

def half_weights(embed_dim, image_size):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3 * image_size**2, embed_dim).half()
        def forward(self, images):
            return self.inner(images.flatten(1).half())
    return Half()

def uncopied(embed_dim, image_size):
    class Uncopied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = norms(embed_dim, image_size)
        def forward(self, images):
            return self.inner(images)
        def __deepcopy__(self, memo):
            raise TypeError("no copies")
    return Uncopied()
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "odd_students.py").write_text(STUDENTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("odd_students", None)


def make_student(name: str, world: World = WORLD, precision: str = "fp32", image_size: int = 8, **keys: Any) -> Student:
    model = name if ":" in name else f"odd_students:{name}"
    settings = DistillSettings(**{"batch_images": 8, **keys})
    return Student(
        StudentSettings(model=model, image_size=image_size), settings, 16, world, precision, 20.0, fresh=True
    )


def refusal(name: str, **keys: Any) -> str:
    with pytest.raises(InputError) as refused:
        make_student(name, **keys)
    text = str(refused.value)
    assert "\n" not in text
    return text


ODD = [
    ("a_tuple", "emits a tuple for"),
    ("a_list", "emits a list for"),
    ("a_dict", "emits a dict for"),
    ("features", "emits (2, 16, 1, 1) for"),
    ("too_wide", "emits (2, 32) for"),
    ("one_row", "emits (1, 16) for"),
    ("numbers", "emits torch.int64 for"),
    ("nan", "emits values that are not finite for"),
]


@pytest.mark.parametrize(("way", "words"), ODD)
def test_what_a_student_may_not_return_is_refused_in_both_modes_alike(way: str, words: str) -> None:
    assert f"{words} 2 images of 8 x 8 pixels while it trains; wanted" in refusal(f"training__{way}")
    assert f"{words} 2 images of 8 x 8 pixels; wanted" in refusal(f"scored__{way}")


@pytest.mark.parametrize("way", ["half", "double"])
def test_any_float_type_may_be_returned(way: str) -> None:
    make_student(f"both__{way}")


def test_a_student_that_cannot_learn_is_refused() -> None:
    assert "depend on no weight that learns" in refusal("training__no_gradient")
    assert "depend on no weight that learns" in refusal("frozen")


def test_weights_that_a_run_in_half_precision_cannot_scale_are_refused() -> None:
    assert "weights in float16, which distill.precision = 'fp16'" in refusal("half_weights", precision="fp16")


def test_one_image_is_scored_as_one_row() -> None:
    assert "emits (16,) for 1 images" in refusal("both__squeezed")


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        ({"batch_images": 9, "accumulate": 7}, [2, 2, 2, 2, 1]),
        ({"batch_images": 1}, [1]),
        ({"batch_images": 8, "accumulate": 8}, [1] * 8),
        ({"batch_images": 8, "accumulate": 30}, [1] * 8),
    ],
)
@pytest.mark.parametrize("name", ["norms", "timm:mobilenetv3_small_050", "timm:resnet10t"])
def test_pieces_of_one_image_are_refused_for_batch_norms_over_one_pixel(
    name: str, keys: dict[str, int], sizes: list[int]
) -> None:
    assert piece_sizes(DistillSettings(**keys), WORLD) == sizes
    if name == "timm:resnet10t":  # whose norms see 2 x 2 pixels and more
        make_student(name, image_size=64, **keys)
        return
    text = refusal(name, image_size=32 if ":" in name else 8, **keys)
    accumulate = keys.get("accumulate", 1)
    assert (
        f"distill.batch_images = {keys['batch_images']} and distill.accumulate = {accumulate} give pieces of 1" in text
    )
    assert "Expected more than 1 value per channel" in text


def test_a_processs_share_of_one_image_is_named_with_the_processes() -> None:
    text = refusal("norms", world=World(torch.device("cpu"), 0, 2), batch_images=2)
    assert "give pieces of 1 image in each of 2 processes" in text


def test_a_student_from_outside_is_tried_on_pieces_of_every_size() -> None:
    assert "give pieces of 3 images, which" in refusal("pairs_only", batch_images=6, accumulate=2)
    make_student("pairs_only", batch_images=8, accumulate=2)


@pytest.mark.parametrize("name", ["norms", "uncopied", "training__noise", "timm:resnet10t", "open_clip:RN50"])
def test_a_trial_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: Any) -> bool:
        return False

    size = 32 if ":" in name else 8
    tried = make_student(name, image_size=size)
    drawn = torch.rand(3)
    monkeypatch.setattr("dimefm.stages.train.student.try_step", without)
    untried = make_student(name, image_size=size)
    assert torch.equal(drawn, torch.rand(3))
    states = [one.image.model.state_dict() for one in (tried, untried)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(parameter.grad is None for parameter in tried.image.model.parameters())
    assert tried.image.model.training


def test_a_run_is_refused_before_it_writes_anything(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    settings = DistillSettings(batch_images=8, batch_sentences=8, device="cpu", workers=1)
    student = StudentSettings(model="odd_students:training__a_tuple", image_size=8)
    with pytest.raises(InputError, match="emits a tuple"):
        train_one(cache, tmp_path / "images", student, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_that_has_changed_since_is_refused_where_it_is_loaded_and_scored(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    settings = DistillSettings(batch_images=8, batch_sentences=8, device="cpu", workers=1)
    student = StudentSettings(model="odd_students:both__same", image_size=8)
    train_one(cache, tmp_path / "images", student, settings, tmp_path / "run", stop_after=1)
    source = tmp_path / "odd_students.py"
    source.write_text(STUDENTS.replace('"same": same', '"same": lambda out: (out, out)'))
    sys.modules.pop("odd_students", None)
    with pytest.raises(InputError, match="emits a tuple for 2 images of 8 x 8 pixels; wanted"):
        load_student(tmp_path / "run")


def test_a_text_students_image_tower_is_tried_as_well(tmp_path: Path) -> None:
    settings = DistillSettings(batch_images=8)
    student = StudentSettings(model="odd_students:training__a_dict", image_size=8, text="ViT-S-32-alt")
    with pytest.raises(InputError, match="emits a dict"):
        Student(student, settings, EMBED_DIM, WORLD, "fp32", 20.0, fresh=True)


def test_a_scale_that_can_be_none_is_remarked_where_a_student_would_use_it() -> None:
    settings = DistillSettings(batch_images=8)
    student = StudentSettings(model="odd_students:both__same", image_size=8)
    for scale, said in ((1.6e6, True), (100.0, False)):
        notes = list(Student(student, settings, 16, WORLD, "fp32", scale, fresh=True).notes())
        assert any(
            "logit scale 1.6e+06 is unusual" in note and "distill.loss.logit_scale" in note for note in notes
        ) == (said)
