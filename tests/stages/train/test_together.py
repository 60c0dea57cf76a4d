"""Several students, one stream of batches: each ends with the weights that it gets alone."""

import pytest
import torch

from dimefm.cache import InputError
from dimefm.stages.images import views as augment
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.load.batches import BatchLoader
from dimefm.stages.settings.distill import DistillSettings, LossSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.loop import train
from dimefm.stages.train.processes import open_world
from dimefm.stages.train.student_run import Run

from ...support.training import lines_of, weights_of

SETTINGS = DistillSettings(
    epochs=2,
    batch_images=9,
    batch_sentences=7,
    lr=0.01,
    log_every=1,
    checkpoint_every=3,
    device="cpu",
    workers=2,
    loss=LossSettings(vl=0.7, pvl=0.3, feature=1.0),
)
STUDENTS = {
    "dropout": StudentSettings(model="own_students:with_dropout", image_size=8),
    "larger": StudentSettings(model="own_students:with_dropout", image_size=12),
    "plain": StudentSettings(model="own_students:plain", image_size=8),
}


def train_some(world, names, output, settings=SETTINGS, students=STUDENTS, **options):
    cache, folder = world
    runs = [Run(name, students[name], folder / output / name) for name in names]
    with open_world("cpu") as processes:
        return train(cache, ImageFolder(folder / "images"), runs, settings, processes, **options)


def assert_same(world, name, first="alone", second="together"):
    before, after = (weights_of(world[1] / output / name) for output in (first, second))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert lines_of(world[1] / first / name) == lines_of(world[1] / second / name)


def test_students_that_learn_together_are_those_that_learned_alone(world):
    for name in STUDENTS:
        train_some(world, [name], "alone")
    results = train_some(world, STUDENTS, "together")
    assert [result.finished for result in results] == [True] * 3
    for name in STUDENTS:
        assert_same(world, name)


def test_one_that_is_ahead_waits_for_the_others(world):
    for name in ("dropout", "plain"):
        train_some(world, [name], "alone")
    train_some(world, ["plain"], "together", stop_after=5)
    first, second = train_some(world, ["dropout", "plain"], "together")
    assert (first.steps_now, second.steps_now) == (8, 3)
    for name in ("dropout", "plain"):
        assert_same(world, name)


def test_one_that_breaks_does_not_stop_the_others(world):
    students = STUDENTS | {"broken": StudentSettings(model="own_students:broken", image_size=8)}
    train_some(world, ["plain"], "alone")
    with pytest.raises(InputError, match=r"together/broken: the loss of step 3 is not finite"):
        train_some(world, ["broken", "plain"], "together", students=students)
    assert_same(world, "plain")


def test_an_image_is_decoded_once_for_all_of_them(world, monkeypatch):
    """The small cache's images are too small for scaled decoding, which would depend on the student's size."""
    decoded = []

    def counted(data):
        decoded.append(1)
        return decode(data)

    decode = augment.decode_image
    monkeypatch.setattr(augment, "decode_image", counted)
    settings = SETTINGS.model_copy(update={"workers": 0})
    train_some(world, STUDENTS, "together", settings, stop_after=2)
    together = len(decoded)
    train_some(world, ["plain"], "alone", settings, stop_after=2)
    assert together == len(decoded) - together


def test_steps_that_nobody_stands_at_are_not_decoded(world, monkeypatch):
    train_some(world, ["plain"], "together", stop_after=6)
    drawn = []

    def remember(self, first, end):
        drawn.append((first, end))
        return batches(self, first, end)

    batches = BatchLoader.batches
    monkeypatch.setattr(BatchLoader, "batches", remember)
    train_some(world, ["dropout", "plain"], "together", stop_after=2)
    assert drawn == [(0, 2), (6, 8)]
