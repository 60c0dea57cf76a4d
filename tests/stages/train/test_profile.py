"""A profile says where a step's time went, whatever the number of steps, and changes nothing of the training."""

import gzip
import json

import pytest
import torch

from dimefm.stages import profiling
from dimefm.stages.profiling import PhaseTimes, phase, recording
from dimefm.stages.settings.distill import DistillSettings, LossSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.profile import PHASES

from ...support.training import train_one, weights_of

STUDENT = StudentSettings(model="own_students:with_dropout", image_size=8)
SETTINGS = DistillSettings(
    epochs=3,
    batch_images=9,
    batch_sentences=7,
    lr=0.01,
    log_every=1,
    checkpoint_every=4,
    device="cpu",
    workers=2,
    accumulate=2,
    loss=LossSettings(vl=0.7, pvl=0.3, feature=1.0),
)
PROFILED = SETTINGS.model_copy(update={"profile": True})


def profile_of(run):
    return json.loads((run / "profile/steps.json").read_bytes())


def test_a_profiled_run_is_bit_for_bit_the_run_that_is_not(world):
    cache, folder = world
    train_one(cache, folder / "images", STUDENT, SETTINGS, folder / "plain")
    train_one(cache, folder / "images", STUDENT, PROFILED, folder / "profiled")
    expected, found = weights_of(folder / "plain"), weights_of(folder / "profiled")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (folder / "plain/profile").exists()


def test_the_table_and_the_trace_name_every_phase_of_a_step(world):
    cache, folder = world
    said = []
    train_one(cache, folder / "images", STUDENT, PROFILED, folder / "run", note=said.append)
    document = profile_of(folder / "run")
    assert [(one["step"], one["traced"]) for one in document["steps"]] == [
        *((step, True) for step in (4, 5, 6)),
        *((step, False) for step in (7, 8, 9)),
    ]
    for step in document["steps"]:
        assert all(step["phases"][name] > 0 for name in PHASES)
        assert sum(step["phases"].values()) == pytest.approx(step["seconds"])
    assert sum(of["share"] for of in document["phases"].values()) == pytest.approx(1)
    table = (folder / "run/profile/table.txt").read_text().splitlines()
    assert [line for line in said if line in table] == table
    assert [line.split()[0] for line in table[1:]] == [*PHASES, "other"]
    with gzip.open(folder / "run/profile/trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {*PHASES, "aten::convolution"} <= names
    assert not (folder / "run/profile/memory.pickle").exists()  # of a GPU alone


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_short_call_is_profiled_too(world, num_steps):
    cache, folder = world
    train_one(cache, folder / "images", STUDENT, PROFILED, folder / "run", stop_after=num_steps)
    document = profile_of(folder / "run")
    assert document["steps"][-1]["step"] == num_steps
    assert document["steps"][0]["traced"] and (folder / "run/profile/trace.json.gz").exists()


def test_a_run_that_goes_on_may_be_profiled(world):
    cache, folder = world
    train_one(cache, folder / "images", STUDENT, SETTINGS, folder / "run", stop_after=4)
    train_one(cache, folder / "images", STUDENT, PROFILED, folder / "run")
    assert profile_of(folder / "run")["steps"][0]["step"] == 8
    assert "profile" not in json.loads((folder / "run/run.json").read_bytes())["distill"]


def test_a_phase_within_another_counts_as_itself_alone(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock))
    times = PhaseTimes([torch.device("cpu")])
    with recording(times), phase("backward"), phase("losses"):
        pass
    assert times.seconds == {"backward": 8.0, "losses": 2.0}


def test_nothing_is_recorded_where_no_profile_is_asked_for():
    times = PhaseTimes([])
    with phase("data"):
        pass
    with recording(times):
        pass
    assert not times.seconds
