"""Teachers that cannot be one are refused before they are asked a million times."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dimefm.cache import InputError
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher
from dimefm.stages.models.teacher_check import check_teacher
from dimefm.stages.settings.models import TeacherSettings

SENTENCES = ["a cat", "two dogs on a boat", "12:30"]
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)).resize((40, 40))
    for seed in range(4)
]


def crops_of(teacher: OpenClipTeacher, images: list[Image.Image]) -> list[np.ndarray]:
    return [teacher.crop(image) for image in images]


@pytest.fixture
def teacher(tiny_teacher: tuple[Path, Path]) -> OpenClipTeacher:
    settings = TeacherSettings(model=str(tiny_teacher[0]), pretrained=str(tiny_teacher[1]))
    return load_teacher(settings, torch.device("cpu"))


def test_a_sound_teacher_passes_and_says_what_was_seen(teacher: OpenClipTeacher) -> None:
    lines = check_teacher(teacher, crops_of(teacher, IMAGES), SENTENCES)
    assert len(lines) == 4 and lines[0] == "teacher: 32 dimensions, logit scale 14.29"
    assert lines[1].startswith("4 images: norm ") and lines[2].startswith("3 sentences: norm ")
    (_, _, norm, image_std), (_, _, _, sentence_std), (low, high, mean) = (
        map(float, re.findall(r"-?\d+\.\d+", line)) for line in lines[1:]
    )
    images = torch.stack([teacher.encode_images(teacher.preprocess(image)[None])[0] for image in IMAGES])
    assert norm == pytest.approx(images.norm(dim=1).mean().item(), abs=1e-3)
    assert -1 <= low <= mean <= high <= 1 and image_std > 0 and sentence_std > 0


def test_the_numbers_of_a_hand_made_teacher(teacher: OpenClipTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    # Images (3, 0) and (0, 4), sentences (1, 0) and (0, 2): norms 3, 4 and 1, 2; cosines 1, 0, 0, 1.
    monkeypatch.setattr(teacher, "embed_dim", 2)
    monkeypatch.setattr(teacher, "encode_images", lambda _: torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    monkeypatch.setattr(teacher, "encode_tokens", lambda _: torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert check_teacher(teacher, crops_of(teacher, IMAGES[:2]), SENTENCES[:2])[1:] == [
        "2 images: norm 3.000 to 4.000, mean 3.500; std over rows 0.5000",
        "2 sentences: norm 1.000 to 2.000, mean 1.500; std over rows 0.5000",
        "cosine of image and sentence: 0.000 to 1.000, mean 0.500",
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[float("nan"), 1.0], [1.0, 0.0]], "NaN or infinite"),
        ([[float("inf"), 1.0], [1.0, 0.0]], "NaN or infinite"),
        ([[0.0, 0.0], [1.0, 0.0]], "all zero"),
        ([[70_000.0, 0.0], [0.0, 1.0]], "values up to 7e\\+04; the cache holds float16"),
        ([[1.0, 0.0], [2.0, 0.01]], "the same for all 2"),
        ([[1.0], [2.0]], "1 dimensions; the teacher says embed_dim = 2"),
    ],
)
@pytest.mark.parametrize("tower", ["images", "sentences"])
def test_a_broken_teacher_is_refused(
    teacher: OpenClipTeacher, monkeypatch: pytest.MonkeyPatch, rows: list[list[float]], words: str, tower: str
) -> None:
    sound = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    monkeypatch.setattr(teacher, "embed_dim", 2)
    for name, method in (("images", "encode_images"), ("sentences", "encode_tokens")):
        output = torch.tensor(rows) if name == tower else sound
        monkeypatch.setattr(teacher, method, lambda _, output=output: output)
    with pytest.raises(InputError, match=f"embeddings of {tower}: {words}"):
        check_teacher(teacher, crops_of(teacher, IMAGES[:2]), SENTENCES[:2])


def test_one_image_and_one_sentence_cannot_look_constant(teacher: OpenClipTeacher) -> None:
    assert check_teacher(teacher, crops_of(teacher, IMAGES[:1]), SENTENCES[:1])[1].startswith("1 images: ")


def test_nothing_to_look_at_is_the_callers_mistake(teacher: OpenClipTeacher) -> None:
    with pytest.raises(ValueError, match="0 images and 3 sentences"):
        check_teacher(teacher, [], SENTENCES)
