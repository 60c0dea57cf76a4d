"""Training: a run that was stopped anywhere and continued is the run that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dimefm.cache import InputError
from dimefm.cache.disk.durable import append_line
from dimefm.stages.losses.clip_kd import icl_loss, mse_loss
from dimefm.stages.losses.dime import feature_loss, pvl_loss, vl_loss
from dimefm.stages.losses.info_nce import masked_share
from dimefm.stages.losses.terms import loss_terms
from dimefm.stages.run_folder.checkpoint import load_checkpoint, save_checkpoint
from dimefm.stages.sample.order import Stream
from dimefm.stages.settings.distill import DistillSettings, LossSettings, TemperatureSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.interrupt import Interrupted, StopSignals

from ...support.paths import ROOT
from ...support.small_cache import make_cache
from ...support.training import TIMES, lines_of, train_one, weights_of

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
    loss=LossSettings(vl=0.7, pvl=0.3, udist=0.1, feature=1.0),
)
STEPS = 13  # 39 usable images, 3 epochs, 9 a step
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads({threads})
sys.path[:0] = [{folder!r}, {repository!r}]
from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.settings.models import StudentSettings
from tests.support.training import train_one
folder = Path({folder!r})
student, settings = StudentSettings.model_validate_json({student!r}), DistillSettings.model_validate_json({settings!r})

def kill(done, total, text):
    if done == 6 * settings.batch_images:
        os.kill(os.getpid(), signal.SIGKILL)

train_one(FeatureCache.open(folder / "cache"), folder / "images", student, settings, folder / "run", progress=kill)
"""


def train(world, run="run", settings=SETTINGS, student=STUDENT, **options):
    cache, folder = world
    return train_one(cache, folder / "images", student, settings, folder / run, **options)


def lines(world, run="run"):
    return lines_of(world[1] / run)


def weights(world, run="run"):
    return weights_of(world[1] / run)


def same_weights(world, first, second):
    before, after = weights(world, first), weights(world, second)
    return all(torch.equal(before[key], after[key]) for key in before)


def kill_at_step_6(world):
    program = KILLED.format(
        threads=torch.get_num_threads(),
        folder=str(world[1]),
        repository=str(ROOT),
        student=STUDENT.model_dump_json(),
        settings=SETTINGS.model_dump_json(),
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_run_writes_a_line_a_step_with_losses_signs_and_speed(world):
    result = train(world)
    assert (result.steps, result.total_steps, result.steps_now, result.finished) == (STEPS, STEPS, STEPS, True)
    assert [line["step"] for line in lines(world)] == list(range(1, STEPS + 1))
    first = json.loads((world[1] / "run/metrics.jsonl").read_text().splitlines()[0])
    assert set(first) == TIMES | {
        "step", "epoch", "loss", "vl", "pvl", "udist", "feature", "lr", "cosine",
        "vl_candidates", "vl_candidates_sentences", "pvl_candidates", "udist_candidates",
    }  # fmt: skip
    weighted = 0.7 * first["vl"] + 0.3 * first["pvl"] + 0.1 * first["udist"] + first["feature"]
    assert first["loss"] == pytest.approx(weighted, rel=1e-6)
    assert first["cosine"] == pytest.approx(1 - first["feature"], abs=1e-6)
    assert first["epoch"] == pytest.approx(9 / 39) and 0 <= first["data_wait"] <= 1
    assert 1 <= first["vl_candidates"] <= 7 and 1 <= first["vl_candidates_sentences"] <= 9
    assert list((world[1] / "run/tensorboard").iterdir())


def test_the_student_learns(world):
    train(world, settings=SETTINGS.model_copy(update={"epochs": 30.0, "loss": LossSettings(feature=1.0)}))
    losses = [line["loss"] for line in lines(world)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_run_repeats_bit_for_bit_dropout_and_views_included(world):
    train(world, "first")
    torch.rand(100)  # whatever happened to the generator in between
    train(world, "second")
    assert lines(world, "first") == lines(world, "second") and same_weights(world, "first", "second")


def test_another_seed_is_another_run(world):
    train(world, "first", stop_after=1)
    train(world, "second", SETTINGS.model_copy(update={"seed": 1}), stop_after=1)
    assert lines(world, "first")[0]["loss"] != lines(world, "second")[0]["loss"]


def test_a_run_stopped_after_some_steps_goes_on_as_if_it_had_not(world):
    train(world, "whole")
    for steps in (1, 5, 2, None):
        torch.manual_seed(99)
        result = train(world, stop_after=steps)
    assert result.finished and result.steps_now == STEPS - 8
    assert lines(world) == lines(world, "whole") and same_weights(world, "run", "whole")


def test_a_killed_run_goes_on_as_if_it_had_not_and_writes_no_line_twice(world):
    train(world, "whole")
    kill_at_step_6(world)
    assert [line["step"] for line in lines(world)] == [1, 2, 3, 4, 5, 6]  # the checkpoint is of step 4
    assert load_checkpoint(world[1] / "run/checkpoint.pt")["step"] == 4
    assert train(world).steps_now == STEPS - 4
    assert lines(world) == lines(world, "whole") and same_weights(world, "run", "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(world):
    train(world, "whole")
    (world[1] / "run").mkdir()
    append_line(world[1] / "run/metrics.jsonl", {"step": 1, "loss": 0.0})
    train(world)
    assert lines(world) == lines(world, "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_the_state_and_says_so(world, number):
    train(world, "whole")
    before = signal.getsignal(number)

    def interrupt(done, total, text):
        if done == 3 * 9:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=r"interrupted: state saved at step 4 of 13"):
        train(world, progress=interrupt)
    assert signal.getsignal(number) == before
    train(world)
    assert lines(world) == lines(world, "whole") and same_weights(world, "run", "whole")


def test_a_signal_in_the_last_step_is_not_lost(world):
    with pytest.raises(Interrupted, match=r"state saved at step 2 of 13"):
        train(world, stop_after=2, progress=lambda done, *_: done == 2 * 9 and os.kill(os.getpid(), signal.SIGINT))
    assert load_checkpoint(world[1] / "run/checkpoint.pt")["step"] == 2


def test_a_second_signal_is_not_held_back():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_is_left_alone(world):
    train(world)
    before = {path: path.stat().st_mtime_ns for path in (world[1] / "run").rglob("*")}
    result = train(world)
    assert result.finished and result.steps_now == 0 and "nothing to do" in result.line()
    assert {path: path.stat().st_mtime_ns for path in (world[1] / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, r"distill\.lr = 0\.01, but this run asks for 0\.5"),
        ({"seed": 3}, r"distill\.seed = 0, but this run asks for 3"),
        ({"loss": LossSettings(vl=1.0)}, r"distill\.loss\.vl = 0\.7, but this run asks for 1\.0"),
    ],
)
def test_a_run_of_other_settings_is_refused_naming_the_key(world, change, message):
    train(world, stop_after=1)
    with pytest.raises(InputError, match=message):
        train(world, settings=SETTINGS.model_copy(update=change))


def test_another_student_or_cache_in_the_same_folder_is_refused(world, tmp_path):
    train(world, stop_after=1)
    with pytest.raises(InputError, match=r"student\.own\.image_size = 8, but this run asks for 12"):
        train(world, student=StudentSettings(model=STUDENT.model, image_size=12))
    other = make_cache(tmp_path / "other", num_sentences=31)
    with pytest.raises(InputError, match=r"before it grew; .*rows\.sentences = 30, but this run asks for 31"):
        train((other, world[1]))


def test_what_does_not_change_training_may_change(world):
    train(world, "whole")
    train(world, stop_after=3)
    free = {"log_every": 2, "checkpoint_every": 1, "workers": 1, "output": Path("elsewhere")}
    train(world, settings=SETTINGS.model_copy(update=free))
    whole = {line["step"]: line for line in lines(world, "whole")}
    assert [line["step"] for line in lines(world)] == [1, 2, 3, 4, 6, 8, 10, 12, 13]
    assert all(line == whole[line["step"]] for line in lines(world)) and same_weights(world, "run", "whole")


def test_a_student_of_another_width_is_refused(world):
    with pytest.raises(InputError, match=r"emits \(2, 17\) .* wanted \(2, 16\)"):
        train(world, student=StudentSettings(model="own_students:too_wide", image_size=8))


def test_a_damaged_checkpoint_is_refused(world):
    train(world, stop_after=1)
    (world[1] / "run/checkpoint.pt").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(InputError, match=r"checkpoint\.pt: not a readable checkpoint; delete it"):
        train(world)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(world):
    train(world, stop_after=2)
    path = world[1] / "run/checkpoint.pt"
    good_state, state = path.read_bytes(), load_checkpoint(path)
    state["model"]["5.bias"][0] = torch.inf
    save_checkpoint(path, {key: value for key, value in state.items() if key != "format"})
    before = path.read_bytes()
    good = r"the last good checkpoint is .*run/checkpoint\.pt; in another distill\.output, lower distill\.lr, .*run:"
    with pytest.raises(InputError, match=rf"the loss of step 3 is not finite \(rows \d+, .* and 5 more, .*\); {good}"):
        train(world)
    bad = json.loads((world[1] / "run/not_finite.json").read_bytes())
    order = Stream(world[0].images.usable, 9, SETTINGS.seed, "images")
    assert bad == {"step": 3, "rows": order.draw(2).rows.tolist()}
    assert path.read_bytes() == before and [line["step"] for line in lines(world)] == [1, 2]
    path.write_bytes(good_state)
    assert train(world).finished and not (world[1] / "run/not_finite.json").exists()


def test_sentences_may_be_off_where_vl_is(world):
    pvl = LossSettings(pvl=1.0)
    train(world, settings=SETTINGS.model_copy(update={"batch_sentences": 0, "loss": pvl}), stop_after=1)
    assert "vl" not in lines(world)[0]
    with pytest.raises(InputError, match=r"distill\.batch_sentences = 0, but distill\.loss\.vl is on"):
        train(world, "other", SETTINGS.model_copy(update={"batch_sentences": 0}))


def test_the_teachers_logit_scale_comes_from_the_cache(world):
    train(world, "teacher", stop_after=1)
    number = SETTINGS.loss.model_copy(update={"logit_scale": 20.0})  # the small cache's teacher has 20
    train(world, "number", SETTINGS.model_copy(update={"loss": number}), stop_after=1)
    assert lines(world, "teacher") == lines(world, "number")
    assert json.loads((world[1] / "teacher/run.json").read_bytes())["logit_scale"] == 20.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_and_goes_on_bit_for_bit(world, precision):
    settings = SETTINGS.model_copy(update={"precision": precision})
    train(world, "whole", settings)
    train(world, settings=settings, stop_after=5)
    train(world, settings=settings)
    assert lines(world) == lines(world, "whole") and same_weights(world, "run", "whole")


def test_the_logged_losses_are_those_of_the_pure_functions(world, monkeypatch):
    loss = LossSettings(vl=1.0, pvl=1.0, feature=1.0, mse=1.0, icl=1.0, icl_threshold=0.5, logit_scale=5.0)
    settings = SETTINGS.model_copy(
        update={"bank_images": 11, "loss": loss, "temperature": TemperatureSettings(icl=2.0)}
    )
    seen = []

    def keep(inputs, *rest):
        seen.append(inputs)
        return loss_terms(inputs, *rest)

    monkeypatch.setattr("dimefm.stages.train.tower.loss_terms", keep)
    train(world, settings=settings, stop_after=1)
    (line,), (inputs,) = lines(world), seen
    student, teacher, sentences, bank = (
        getattr(inputs, name).detach() for name in ("local_student", "local_teacher", "local_others", "bank")
    )
    assert (student.shape, teacher.shape, sentences.shape, bank.shape) == ((9, 16), (9, 16), (7, 16), (11, 16))
    assert line["vl"] == pytest.approx(vl_loss(student, teacher, sentences, logit_scale=5.0).item(), rel=1e-6)
    assert line["pvl"] == pytest.approx(pvl_loss(student, teacher, 3.0, 5.0, bank_images=bank).item(), rel=1e-6)
    assert line["feature"] == pytest.approx(feature_loss(student, teacher).item(), rel=1e-6)
    assert line["mse"] == pytest.approx(mse_loss(student, teacher).item(), rel=1e-6)
    assert line["icl"] == pytest.approx(icl_loss(student, teacher, 2.0, 5.0, bank, 0.5).item(), rel=1e-6)
    assert line["icl_masked"] == pytest.approx(masked_share(teacher, (teacher, bank), 0, 0.5).item(), rel=1e-6)
    assert 0 < line["icl_masked"] < 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_all_that_a_step_can_do_goes_on_bit_for_bit(world, precision):
    """fp16 leaves out its first steps, until its scale is low enough; their gradient's norm is no number."""
    more = {"ema": 0.9, "clip_grad_norm": 0.05, "accumulate": 2, "bank_images": 6, "precision": precision}
    more |= {"loss": LossSettings(vl=0.7, pvl=0.3, icl=1.0), "temperature": TemperatureSettings(icl_learned=True)}
    settings = SETTINGS.model_copy(update=more)
    train(world, "whole", settings)
    train(world, settings=settings, stop_after=5)
    train(world, settings=settings)
    assert lines(world) == lines(world, "whole") and same_weights(world, "run", "whole")
    first, second = (load_checkpoint(world[1] / run / "checkpoint.pt")["ema"] for run in ("run", "whole"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert lines(world)[-1]["gradient_norm"] > 0.05
    assert ("gradient_norm" in lines(world)[0]) == (precision == "bf16")
    assert ("gradient_scale" in lines(world)[0]) == (precision == "fp16")
    scales = [line["icl_scale"] for line in lines(world)]
    skipped = precision == "fp16"
    assert scales[0] == pytest.approx(20.0) and len(set(scales[4 * skipped :])) == len(scales[4 * skipped :])
    with pytest.raises(InputError, match=r"distill\.temperature\.icl_learned = True, but this run asks for False"):
        train(world, settings=settings.model_copy(update={"temperature": TemperatureSettings()}))


def test_a_run_of_before_a_key_came_goes_on_with_its_default(world):
    train(world, stop_after=2)
    path = world[1] / "run/run.json"
    record = json.loads(path.read_bytes())
    for key in ("accumulate", "bank_images", "ema", "compile", "clip_grad_norm"):
        del record["distill"][key]
    del record["distill"]["loss"]["icl"]  # off before it had a name, whatever the default is now
    del record["pixels"], record["order"], record["warm_start"]
    path.write_text(json.dumps(record))
    assert train(world).finished
    with pytest.raises(InputError, match=r"distill\.accumulate = 1, but this run asks for 3"):
        train(world, settings=SETTINGS.model_copy(update={"accumulate": 3}))


def test_the_record_says_how_rows_are_drawn(world):
    train(world, settings=SETTINGS.model_copy(update={"bank_images": 5}), stop_after=1)
    record = json.loads((world[1] / "run/run.json").read_bytes())
    assert set(record["order"]) == {"images", "sentences", "bank"}
    assert (record["pixels"], record["processes"], record["warm_start"]) == ("files", 1, None)


def test_a_warm_start_begins_with_the_other_runs_weights(world):
    train(world, "first", stop_after=2)
    notes = []
    init = STUDENT.model_copy(update={"init": f"run:{world[1] / 'first'}"})
    settings = SETTINGS.model_copy(update={"lr": 1e-30, "lr_min": 0.0, "weight_decay": 0.0})
    train(world, student=init, settings=settings, stop_after=1, note=notes.append)
    before, after = weights(world, "first"), weights(world)
    assert all(torch.equal(before[key], after[key]) for key in before if "running" not in key and "num_" not in key)
    assert "first" in notes[0]
    record = json.loads((world[1] / "run/run.json").read_bytes())
    assert record["warm_start"]["fresh"] == [] and record["warm_start"]["digest"]


def test_progress_counts_images(world):
    told = []
    train(world, stop_after=3, progress=lambda *facts: told.append(facts))
    assert [facts[:2] for facts in told] == [(9, 117), (18, 117), (27, 117)]
    assert told[-1][2].startswith("loss ")
