"""Two processes with half of a batch each are one process with the batch: same losses, gradients, weights."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dimefm.stages.run_folder.checkpoint import load_checkpoint
from dimefm.stages.settings.distill import DistillSettings, LossSettings, PairSampling, TemperatureSettings
from dimefm.stages.settings.models import StudentSettings

from ...support.paths import ROOT
from ...support.small_cache import text_config
from ...support.small_pairs import add_pairs
from ...support.training import gradients_of, lines_of, train_one, weights_of

SETTINGS = DistillSettings(
    epochs=3,
    batch_images=8,
    batch_sentences=10,
    bank_images=6,
    lr=0.01,
    log_every=1,
    checkpoint_every=2,
    device="cpu",
    workers=1,
    loss=LossSettings(vl=0.7, pvl=0.3, udist=0.2, feature=1.0, mse=1.0, icl=0.1, icl_threshold=0.9),
)
LEARNED = TemperatureSettings(icl_learned=True)
WORKER = ROOT / "tests" / "support" / "one_of_several.py"


def two_processes(folder, run, model, steps, settings=SETTINGS, interrupt_at=0, text="teacher"):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(WORKER)]
    command += [str(folder), run, model, str(steps), settings.model_dump_json(), str(interrupt_at), text]
    env = {**os.environ, "PYTHONWARNINGS": "always"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "broadcast_buffers" not in done.stderr  # which torch has renamed
    return [torch.load(folder / f"{run}-gradients-{rank}.pt", weights_only=True) for rank in (0, 1)]


def one_process(world, run, model, steps=None, settings=SETTINGS, text="teacher"):
    cache, folder = world
    student = StudentSettings(model=f"own_students:{model}", image_size=8, text=text)
    notes = []
    train_one(cache, folder / "images", student, settings, folder / run, stop_after=steps, note=notes.append)
    return notes


def notes_of(folder, run, rank=0):
    return json.loads((folder / f"{run}-notes-{rank}.json").read_text())


MORE = {"accumulate": 2, "clip_grad_norm": 0.5, "ema": 0.9, "temperature": LEARNED, "evaluate_every": 2}


@pytest.mark.parametrize("own_text", [False, True])
@pytest.mark.parametrize("more", [{}, MORE])
def test_two_processes_give_losses_and_gradients_of_one(world, monkeypatch, more, own_text):
    settings = SETTINGS.model_copy(update={**more, "batch_texts": 6})
    folder = world[1]
    text = text_config(folder) if own_text else "teacher"
    alone = []

    def remember(self, *arguments):
        learn(self, *arguments)
        alone.append(gradients_of(self))

    from dimefm.stages.train.student import Student

    learn = Student.learn
    monkeypatch.setattr(Student, "learn", remember)
    one_process(world, "one", "plain", 3, settings, text)
    first, second = two_processes(folder, "two", "plain", 3, settings, text=text)
    for wanted, *found in zip(alone, first, second, strict=True):
        for name, gradient in wanted.items():
            assert torch.equal(found[0][name], found[1][name])
            torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-5)
    for wanted, found in zip(lines_of(folder / "one"), lines_of(folder / "two"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    if more:  # the first process scored, the other waited
        wanted, found = (lines_of(folder / run, "scores.jsonl") for run in ("one", "two"))
        assert [line["step"] for line in found] == [2]
        assert found[0]["cosine"] == pytest.approx(wanted[0]["cosine"], abs=1e-3)
    one, two = weights_of(folder / "one"), weights_of(folder / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameters_without_a_gradient_hold_no_process_up(world, accumulate):
    settings = SETTINGS.model_copy(update={"accumulate": accumulate})
    one_process(world, "one", "with_unused", 3, settings)
    two_processes(world[1], "two", "with_unused", 3, settings)
    for wanted, found in zip(lines_of(world[1] / "one"), lines_of(world[1] / "two"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_share_that_does_not_suit_a_student_is_refused_by_every_process_in_one_line(world):
    settings = SETTINGS.model_copy(update={"batch_images": 2, "batch_sentences": 2, "bank_images": 0})
    two_processes(world[1], "two", "norms_over_one_pixel", 3, settings)
    for rank in (0, 1):
        (line,) = notes_of(world[1], "two", rank)
        assert "distill.batch_images = 2 and distill.accumulate = 1 give pieces of 1 image in each of 2" in line


def test_two_processes_weigh_retrieved_sentences_as_one_does(world):
    pairs = PairSampling(per_image=1, correct=True)
    settings = SETTINGS.model_copy(update={"pairs": pairs, "loss": LossSettings(vl=1.0)})
    cache, folder = add_pairs(world[0]), world[1]
    one_process((cache, folder), "one", "plain", 3, settings)
    two_processes(folder, "two", "plain", 3, settings)
    for wanted, found in zip(lines_of(folder / "one"), lines_of(folder / "two"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4) and found["pairs_share"] > 0.1
    one, two = weights_of(folder / "one"), weights_of(folder / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)
    unweighted = settings.model_copy(update={"pairs": PairSampling(per_image=1)})
    one_process((cache, folder), "unweighted", "plain", 3, unweighted)
    assert lines_of(folder / "unweighted")[0]["loss"] != pytest.approx(lines_of(folder / "one")[0]["loss"], rel=1e-3)


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(world):
    folder = world[1]
    one_process(world, "one", "plain")
    one_process(world, "run", "plain", 3)
    two_processes(folder, "run", "plain", 4)
    assert any("trained by 1 processes before, by 2 now" in note for note in notes_of(folder, "run"))
    assert len(load_checkpoint(folder / "run/checkpoint.pt")["random"]) == 2
    notes = one_process(world, "run", "plain")
    assert any("trained by 2 processes before, by 1 now" in note and "no longer repeats" in note for note in notes)
    for wanted, found in zip(lines_of(folder / "one"), lines_of(folder / "run"), strict=True):
        assert found["step"] == wanted["step"] and found["loss"] == pytest.approx(wanted["loss"], rel=1e-2)


def test_processes_go_on_bit_for_bit_and_a_signal_to_one_stops_all_after_the_same_step(world):
    folder = world[1]
    two_processes(folder, "whole", "with_dropout", 100)
    assert any("statistics are those of 2 parts of the batch" in note for note in notes_of(folder, "whole"))
    assert notes_of(folder, "whole", 1) == []  # the first process talks for all
    two_processes(folder, "run", "with_dropout", 100, interrupt_at=3)
    said = notes_of(folder, "run")[-1]
    stopped_at = load_checkpoint(folder / "run/checkpoint.pt")["step"]
    assert said == f"interrupted: state saved at step {stopped_at} of 14" and 3 <= stopped_at <= 5
    two_processes(folder, "run", "with_dropout", 100)
    assert lines_of(folder / "run") == lines_of(folder / "whole")
    first, second = weights_of(folder / "run"), weights_of(folder / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.acceptance  # 40 s; `test_dev_scores.py` has it for one process
def test_a_signal_while_the_first_process_scores_stops_all_at_that_step_which_is_scored_when_they_go_on(world):
    folder, settings = world[1], SETTINGS.model_copy(update={"evaluate_every": 2})
    two_processes(folder, "whole", "plain", 100, settings)
    # Three batches a set: the second set, that of step 4, is left after its first batch.
    two_processes(folder, "run", "plain", 100, settings, interrupt_at=-4)
    assert notes_of(folder, "run")[-1] == "interrupted: state saved at step 4 of 14"
    assert [line["step"] for line in lines_of(folder / "run", "scores.jsonl")] == [2]
    two_processes(folder, "run", "plain", 100, settings)
    for file in ("metrics.jsonl", "scores.jsonl"):
        assert lines_of(folder / "run", file) == lines_of(folder / "whole", file)
