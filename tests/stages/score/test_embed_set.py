"""Zero-shot scores of a student: one that is the teacher scores as the teacher does."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dimefm.cache import InputError
from dimefm.stages.models.image_student import build_student
from dimefm.stages.run_folder.checkpoint import save_checkpoint
from dimefm.stages.run_folder.load_student import load_student
from dimefm.stages.run_folder.run_record import write_run_record
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.settings.models import StudentSettings

from ...support.scoring import evaluate_student
from ...support.small_cache import STUDENTS, TEACHER, make_cache
from ...support.training import train_one

RECORD = {
    "name": "own",
    "student": {"own": {"model": "own_students:with_dropout", "image_size": 8}},
    "preprocess": TEACHER["preprocess"],
    "teacher": {"model": TEACHER["model"], "pretrained": TEACHER["pretrained"]},
}


class Recall(torch.nn.Module):
    """Says what the teacher said, in the order in which the images come: rows 0, 2, 3, … (row 1 cannot be read)."""

    def __init__(self, cache):
        super().__init__()
        answers = cache.evaluate["dev"].images.embeddings[:].astype(np.float32)
        self.answers, self.said, self.inputs = torch.from_numpy(np.delete(answers, 1, axis=0)), 0, []

    def forward(self, images):
        self.inputs.append(images)
        self.said += len(images)
        return self.answers[self.said - len(images) : self.said]


@pytest.fixture
def world(tmp_path):
    return make_cache(tmp_path), tmp_path


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_a_student_that_says_what_the_teacher_said_agrees_with_it(world, batch_size):
    cache, folder = world
    scores = evaluate_student(
        Recall(cache), RECORD, cache, "dev", folder / "dev", batch_size=batch_size, device="cpu", workers=2
    )
    assert scores["agreement"] == 1.0 and scores["cosine"] == pytest.approx(1.0)
    assert scores["retention"] == 1.0
    assert scores["student_top1"] == scores["teacher_top1"] and scores["student_top5"] == scores["teacher_top5"]


def test_an_unreadable_image_is_counted_and_wrong_for_both(world):
    cache, folder = world
    scores = evaluate_student(Recall(cache), RECORD, cache, "dev", folder / "dev", device="cpu")
    dev = cache.evaluate["dev"]
    logits = dev.images.embeddings[:].astype(np.float64) @ dev.head.T
    right = np.delete(logits.argmax(axis=1) == dev.labels, 1)
    assert (scores["n"], scores["unreadable"]) == (9, 1)
    assert scores["teacher_top1"] == scores["student_top1"] == pytest.approx(right.sum() / 9)
    assert scores["teacher_top5"] == pytest.approx(8 / 9)  # three classes: every readable image is among five


def test_the_student_sees_the_teachers_preprocessing_at_its_own_size(world):
    cache, folder = world
    student = Recall(cache)
    evaluate_student(student, RECORD, cache, "dev", folder / "dev", device="cpu")
    image = Image.open(folder / "dev" / cache.evaluate["dev"].images.rows.column("source")[0].as_py())
    assert image.size == (28, 24)  # the shorter side to 8 pixels, then the middle of the 9 columns
    pixels = np.asarray(image.resize((9, 8), Image.Resampling.BICUBIC))[:, 0:8]
    wanted = (pixels / 255 - TEACHER["preprocess"]["mean"]) / TEACHER["preprocess"]["std"]
    np.testing.assert_allclose(student.inputs[0][0].permute(1, 2, 0).numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_a_set_without_a_readable_image_scores_0_and_no_agreement(world):
    cache, folder = world
    for path in (folder / "dev").rglob("*.png"):
        path.unlink()
    scores = evaluate_student(Recall(cache), RECORD, cache, "dev", folder / "dev", device="cpu")
    assert scores["unreadable"] == scores["n"] == 9
    assert scores["student_top1"] == scores["teacher_top5"] == 0.0
    assert scores["agreement"] is None and scores["cosine"] is None
    assert scores["retention"] is None and scores["retention_interval"] is None
    assert scores["student_top1_interval"] == [0.0, 0.0] and scores["student_class_mean"] == 0.0


def test_unknown_sets_other_teachers_and_missing_folders_are_refused(world):
    cache, folder = world
    with pytest.raises(InputError, match="no evaluation set 'test', there is dev"):
        evaluate_student(Recall(cache), RECORD, cache, "test", folder / "dev")
    other = {**RECORD, "teacher": {"model": "ViT-L-14", "pretrained": "openai"}}
    with pytest.raises(InputError, match=r"the student learned from .*ViT-L-14"):
        evaluate_student(Recall(cache), other, cache, "dev", folder / "dev")
    with pytest.raises(InputError, match="no such folder"):
        evaluate_student(Recall(cache), RECORD, cache, "dev", folder / "absent")


@pytest.mark.parametrize(
    ("emits", "words"),
    [
        (lambda rows: rows.mean(0, keepdim=True), r"emits \(1, 16\) for 8 images; wanted \(8, 16\)"),
        (lambda rows: (rows, rows), "emits a tuple for 8 images"),
        (lambda rows: rows[:, :8], r"emits \(8, 8\) for 8 images"),
    ],
)
def test_a_student_that_emits_no_row_for_each_image_is_refused(world, emits, words):
    class Odd(torch.nn.Module):
        def forward(self, images):
            return emits(torch.ones(len(images), 16))

    with pytest.raises(InputError, match=words):
        evaluate_student(Odd(), RECORD, world[0], "dev", world[1] / "dev", device="cpu")


def test_a_trained_student_comes_back_from_its_run_alone(world, monkeypatch):
    cache, folder = world
    (folder / "own_students.py").write_text(STUDENTS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    student = StudentSettings(model="own_students:with_dropout", image_size=8)
    settings = DistillSettings(epochs=1, batch_images=8, batch_sentences=8, device="cpu")
    train_one(cache, folder / "images", student, settings, folder / "run", stop_after=2)
    module, record = load_student(folder / "run")
    assert not module.training and record["step"] == 2 and record["total_steps"] == 4
    scores = evaluate_student(module, record, cache, "dev", folder / "dev", device="cpu")
    assert scores == evaluate_student(module, record, cache, "dev", folder / "dev", device="cpu")
    json.dumps(scores, allow_nan=False)
    sys.modules.pop("own_students", None)


@pytest.mark.parametrize("averaged", [False, True])
def test_averaged_weights_are_scored_where_a_run_keeps_some(world, averaged):
    cache, folder = world
    spec = "timm:resnet10t"
    last, average = (build_student(spec, cache.images.embeddings.shape[-1], 32) for _ in range(2))
    record = {**RECORD, "student": {"own": {"model": spec, "image_size": 32}}, "embed_dim": 16}
    write_run_record(folder / "run", record)
    state = {"step": 3, "model": last.state_dict()} | ({"ema": average.state_dict()} if averaged else {})
    save_checkpoint(folder / "run" / "checkpoint.pt", state)
    student, read = load_student(folder / "run")
    wanted = average if averaged else last
    assert torch.equal(student.trunk.fc.weight, wanted.trunk.fc.weight)
    scores = evaluate_student(student, read, cache, "dev", folder / "dev", device="cpu")
    assert scores["weights"] == read["weights"] == ("ema" if averaged else "model")


def test_averaged_weights_of_another_model_are_refused(world):
    _, folder = world
    record = {**RECORD, "student": {"own": {"model": "timm:resnet10t", "image_size": 32}}, "embed_dim": 16}
    write_run_record(folder / "run", record)
    model = build_student("timm:resnet10t", 16, 32).state_dict()
    for ema in ({"weight": torch.zeros(2)}, 0.999):
        save_checkpoint(folder / "run" / "checkpoint.pt", {"step": 3, "model": model, "ema": ema})
        with pytest.raises(InputError, match="do not fit the student that run"):
            load_student(folder / "run")


def test_a_folder_that_is_no_run_or_has_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"run\.json: no such file; wanted the folder of a run"):
        load_student(tmp_path)
