"""Scores while a student learns: they change nothing, and the best step is the same however the run was interrupted."""

import itertools
import json
import os
import shutil
import signal
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from dimefm.cache import InputError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.stage_two.score_table import score_table
from dimefm.stages.images.decode import decode_image
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.run_folder import best_weights
from dimefm.stages.run_folder.best_weights import BEFORE, BEST, BestWeights, load_best
from dimefm.stages.run_folder.checkpoint import load_checkpoint
from dimefm.stages.run_folder.load_student import load_student, load_text_student
from dimefm.stages.run_folder.metrics_log import MetricsLog
from dimefm.stages.score.labelled_pictures import LabelledPictures
from dimefm.stages.settings.distill import DistillSettings, LossSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train import dev_scores
from dimefm.stages.train import speed as meter
from dimefm.stages.train.dev_scores import DevScores
from dimefm.stages.train.interrupt import Interrupted
from dimefm.stages.train.loop import train
from dimefm.stages.train.processes import open_world
from dimefm.stages.train.student import Student
from dimefm.stages.train.student_run import Run

from ...support.commands import refused, run_dimefm
from ...support.scoring import evaluate_student
from ...support.small_cache import TEACHER, text_config
from ...support.training import PROMPTS, lines_of, train_one, weights_of
from ...support.worlds import make_world

STUDENT = StudentSettings(model="own_students:with_dropout", image_size=8)
SETTINGS = DistillSettings(
    seed=2,  # one of those whose best step changes on the way: all of 1 to 13 but 5, if each is scored
    epochs=3,
    batch_images=9,
    batch_sentences=7,
    lr=0.01,
    log_every=1,
    checkpoint_every=4,
    evaluate_every=3,
    device="cpu",
    workers=2,
    loss=LossSettings(vl=0.7, pvl=0.3, feature=1.0),
)
STEPS = 13  # 39 usable images, 3 epochs, 9 a step


def learn(world, run="run", settings=SETTINGS, student=STUDENT, **options):
    cache, folder = world
    return train_one(cache, folder / "images", student, settings, folder / run, **options)


def changed(**keys):
    return SETTINGS.model_copy(update=keys)


def lines(world, run="run", file="scores.jsonl"):
    return lines_of(world[1] / run, file)


def same(first, second):
    """Whether two states hold the same, to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_ends_as(world, whole, run="run"):
    folder = world[1]
    assert lines(world, run) == lines(world, whole)
    assert same(load_best(folder / run), load_best(folder / whole))
    assert same(*(load_checkpoint(folder / name / "checkpoint.pt") for name in (run, whole)))
    assert not (folder / run / BEFORE).exists()


@pytest.mark.parametrize("more", [{}, {"ema": 0.9}, {"precision": "bf16", "accumulate": 2}])
def test_a_run_that_is_scored_is_bit_for_bit_the_run_that_is_not(world, more):
    learn(world, "blind", changed(evaluate_every=0, **more))
    learn(world, "run", changed(evaluate_every=1, **more))
    states = [load_checkpoint(world[1] / run / "checkpoint.pt") for run in ("run", "blind")]
    assert same(*states) and {"optimizer", "random", "model"} <= states[0].keys()
    assert lines(world, "run", "metrics.jsonl") == lines(world, "blind", "metrics.jsonl")
    assert not (world[1] / "blind/scores.jsonl").exists() and not (world[1] / "blind" / BEST).exists()


@pytest.mark.parametrize("ema", [None, 0.9])
def test_every_so_many_steps_and_the_last_are_scored_as_evaluate_scores_them(world, ema):
    settings = changed(ema=ema)
    result = learn(world, settings=settings)
    scored = lines(world)
    assert [line["step"] for line in scored] == [3, 6, 9, 12, 13]
    keys = {"step", "set", "student_top1", "student_top5", "agreement", "cosine", "best", "weights"}
    assert all(set(line) == keys for line in scored)
    for line in scored:
        learn(world, "part", settings, stop_after=3 if line["step"] < STEPS else 1)
        student, record = load_student(world[1] / "part", "last")
        wanted = evaluate_student(student, record, world[0], "dev", world[1] / "dev", device="cpu")
        assert record["step"] == line["step"]
        said = {"step": line["step"], "set": "dev", "best": line["best"]}
        assert line == {**said, **{key: wanted[key] for key in keys - said.keys()}}
        assert line["weights"] == ("model" if ema is None else "ema")
    assert "best on dev at step " in result.line()


def test_the_best_step_is_the_first_of_those_with_the_most_right_and_then_the_highest_cosine(world):
    learn(world, settings=changed(evaluate_every=1))
    best = None
    for line in lines(world):
        is_best = best is None or (line["student_top1"], line["cosine"]) > (best["student_top1"], best["cosine"])
        assert line["best"] == is_best
        best = line if is_best else best
    kept = load_best(world[1] / "run")
    assert kept["step"] == best["step"] and {**kept["scores"], "best": True} == best
    learn(world, "part", stop_after=best["step"])
    assert same(kept["model"], weights_of(world[1] / "part"))


def offer(best, step, top1, cosine=0.5, name="dev"):
    scores = {"step": step, "set": name, "student_top1": top1, "cosine": cosine}
    return best.offer(scores, "model", {"model": {"weight": torch.tensor([float(step)])}})


def test_of_equal_scores_the_higher_cosine_and_then_the_earlier_step_stays(tmp_path):
    best = BestWeights(tmp_path, 0)
    told = [offer(best, 1, 0.5), offer(best, 2, 0.5), offer(best, 3, 0.5, 0.6), offer(best, 4, 0.4, 0.9)]
    assert told == [True, False, True, False] and load_best(tmp_path)["step"] == 3
    assert offer(best, 5, 0.1, None, "other") and not offer(best, 6, 0.1, None, "other")
    assert load_best(tmp_path)["scores"]["set"] == "other"


def test_what_was_best_at_the_checkpoint_comes_back_though_a_later_step_took_its_place(tmp_path):
    """The steps after it may come out worse when they are done again."""
    best = BestWeights(tmp_path, 0)
    offer(best, 3, 0.5)
    best.settle()  # a checkpoint of step 4
    offer(best, 5, 0.6)
    offer(best, 6, 0.7)
    assert load_best(tmp_path)["step"] == 6
    again = BestWeights(tmp_path, 4)
    assert load_best(tmp_path)["step"] == again.scores["step"] == 3 and not (tmp_path / BEFORE).exists()
    assert offer(again, 5, 0.51)
    assert BestWeights(tmp_path, 2).scores is None and not (tmp_path / BEST).exists()


class KilledError(BaseException):
    """What a run cannot recover from."""


def kill_after(monkeypatch, owner, name, call, *, before=False):
    """Die in the given call of a function, from 1, once it is done or before it begins."""
    function, calls = getattr(owner, name), itertools.count(1)

    def dying(*arguments, **options):
        now = next(calls) == call
        if now and before:
            raise KilledError
        result = function(*arguments, **options)
        if now:
            raise KilledError
        return result

    monkeypatch.setattr(owner, name, dying)


MOMENTS = {
    "before a step's scores": (DevScores, "score", True),
    "between the weights and the line": (MetricsLog, "write_scores", True),
    "after the line": (MetricsLog, "write_scores", False),
    "before the weights are written": (best_weights, "save_checkpoint", True),
    "before the old best is put aside": (best_weights, "write_bytes", True),
    "after the old best is put aside": (best_weights, "write_bytes", False),
    "before the checkpoint": (Student, "save", True),
    "between the checkpoint and what follows it": (Student, "save", False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_it_ends_with_the_scores_and_the_best_of_a_run_that_was_not(world, moment):
    settings = changed(evaluate_every=1)
    learn(world, "whole", settings)
    owner, name, before = MOMENTS[moment]
    deaths = 0
    for call in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch, suppress(KilledError):
            kill_after(patch, owner, name, call, before=before)
            deaths += 1
            learn(world, settings=settings)
            deaths -= 1  # there were not that many calls until its end
    assert deaths >= 2
    learn(world, settings=settings)
    assert_ends_as(world, "whole")


def test_a_student_with_a_text_tower_is_scored_and_kept_with_it(world):
    cache, folder = world
    student = STUDENT.model_copy(update={"text": text_config(folder)})
    settings = changed(batch_texts=6, ema=0.5)
    learn(world, "blind", settings.model_copy(update={"evaluate_every": 0}), student)
    learn(world, "run", settings, student)
    assert same(*(load_checkpoint(folder / run / "checkpoint.pt") for run in ("run", "blind")))
    found = {"best": load_best(folder / "run")["scores"], "last": lines(world)[-1]}
    for which, scores in found.items():
        module, record = load_student(folder / "run", which)
        head = load_text_student(folder / "run", "cpu", which=which).class_head(PROMPTS)
        wanted = evaluate_student(module, record, cache, "dev", folder / "dev", device="cpu", student_head=head)
        assert record["step"] == scores["step"]
        keys = ("student_top1", "student_top5", "agreement", "cosine", "weights")
        assert {key: scores[key] for key in keys} == {key: wanted[key] for key in keys}
        assert wanted != evaluate_student(module, record, cache, "dev", folder / "dev", device="cpu")


def test_a_run_stopped_after_some_steps_has_the_scores_of_one_that_was_not(world):
    learn(world, "whole")
    for steps in (2, 3, 1, 6, None):
        learn(world, stop_after=steps)
    assert_ends_as(world, "whole")
    assert [line["step"] for line in lines(world)] == [3, 6, 9, 12, 13]


def test_how_often_and_on_what_it_is_scored_may_change_and_going_back_drops_what_was_later(world, monkeypatch):
    kill_after(monkeypatch, DevScores, "score", 3)
    with pytest.raises(KilledError):
        learn(world)  # after step 9; the checkpoint is of step 8
    monkeypatch.undo()
    best = world[1] / "run" / BEST
    state = load_checkpoint(best)
    torch.save({**state, "step": 9}, best)  # as if step 9 had been the best, and nothing kept of before
    learn(world, settings=changed(evaluate_every=0))
    assert not best.exists() and [line["step"] for line in lines(world)] == [3, 6]
    shutil.copytree(world[1] / "run", world[1] / "done")
    learn(world, settings=changed(evaluate_every=1))  # nothing is left to do
    assert lines(world) == lines(world, "done")


def test_nothing_is_scored_or_kept_after_a_loss_that_is_not_a_number(world):
    with pytest.raises(InputError, match="the loss of step 3 is not finite"):
        learn(world, student=StudentSettings(model="own_students:broken", image_size=8))
    assert not (world[1] / "run/scores.jsonl").exists() and not (world[1] / "run" / BEST).exists()


def test_students_that_learn_together_are_scored_as_alone(world):
    cache, folder = world
    students = {"own": STUDENT, "plain": StudentSettings(model="own_students:plain", image_size=12)}
    told = []
    with open_world("cpu") as processes:
        dev = DevScores(cache, "dev", folder / "dev", processes.device)
        runs = [Run(name, student, folder / "both" / name) for name, student in students.items()]
        source = ImageFolder(folder / "images")
        train(cache, source, runs, SETTINGS, processes, dev=dev, progress=lambda *facts: told.append(facts[2]))
    learn(world, "alone")
    assert_ends_as(world, "alone", "both/own")
    last = {name: lines(world, f"both/{name}")[-1]["student_top1"] for name in students}
    scored = ", ".join(f"{name} {100 * one:.1f} %" for name, one in last.items())
    assert told[-1].startswith("loss own ") and told[-1].endswith(f"dev {scored}")
    assert "dev" not in told[1]


@pytest.mark.parametrize(("batch", "step", "scored"), [(2, 3, False), (3, 3, True), (5, 6, False)])
def test_stopped_while_it_is_scored_a_run_saves_its_state_and_that_step_is_scored_when_it_goes_on(
    world, monkeypatch, batch, step, scored
):
    monkeypatch.setattr(dev_scores, "LabelledPictures", partial(LabelledPictures, batch_size=3))
    learn(world, "whole")
    normalise, calls = LabelledPictures.normalise, itertools.count(1)

    def stopping(self, pictures):
        if next(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return normalise(self, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(LabelledPictures, "normalise", stopping)
        with pytest.raises(Interrupted, match=f"state saved at step {step} of 13"):
            learn(world)
    # Three batches a set: the signal comes in the first step's second, its last (nothing is left to stop), the next's.
    file = world[1] / "run/scores.jsonl"
    assert (file.exists() and lines(world)[-1]["step"] == step) == scored
    learn(world)
    assert_ends_as(world, "whole")


def test_a_set_that_is_small_is_decoded_once_to_what_open_clip_gives(world):
    cache, folder = world
    labelled = cache.evaluate["dev"]
    options = {"image_size": 8, "batch_size": 3, "workers": 2}
    kept = LabelledPictures(labelled, folder / "dev", TEACHER["preprocess"], keep_bytes=9 * 3 * 8 * 8, **options)
    not_kept = LabelledPictures(labelled, folder / "dev", TEACHER["preprocess"], keep_bytes=9 * 3 * 64 - 1, **options)
    transform = image_transform_v2(PreprocessCfg(**{**TEACHER["preprocess"], "size": 8}), is_train=False)
    sources = labelled.images.rows.column("source").to_pylist()
    first = list(kept)
    assert [rows for rows, _ in first] == [[0, 2], [3, 4, 5], [6, 7, 8]]  # row 1 cannot be read
    for rows, pictures in first:
        wanted = torch.stack([transform(decode_image((folder / "dev" / sources[row]).read_bytes())) for row in rows])
        assert pictures.dtype == torch.uint8 and torch.equal(kept.normalise(pictures), wanted)
    assert len(list(not_kept)) == 3
    shutil.rmtree(folder / "dev")
    assert all(torch.equal(old, new) for (_, old), (_, new) in zip(first, kept, strict=True))
    assert not list(not_kept)


def test_time_that_went_to_scores_is_no_step_s(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    counter = meter.Meter()
    counter.add(8, 0.5)
    now[0] = 112.0
    counter.leave_out(10.0)
    speed = counter.read()
    assert (speed.step_s, speed.images_per_s, speed.wait_s, speed.compute_s) == (2.0, 4.0, 0.5, 1.5)


def test_a_set_that_the_cache_or_the_disk_has_not_is_refused_before_a_step(world):
    with pytest.raises(InputError, match=r"cache: no evaluation set 'test', there is dev; `dimefm cache append`"):
        learn(world, settings=changed(evaluate_on="test"))
    shutil.rmtree(world[1] / "dev")
    with pytest.raises(InputError, match=r"dev: no such folder; wanted the images of evaluate\.dev"):
        learn(world)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_teacher):
    """A world of which one student was trained, scored at each of its 7 steps."""
    path = make_world(tmp_path_factory.mktemp("scored"), tiny_teacher)
    path.write_text(path.read_text().replace("[distill]\n", "[distill]\nevaluate_every = 1\n"))
    config = load_config(path)
    cache_teacher(config)
    distill(config, ["small"])
    return path


def test_a_set_that_the_config_has_not_is_one_line_before_anything_loads(config, tmp_path):
    path = tmp_path / "run.toml"
    text = config.read_text()
    path.write_text(text.replace("evaluate_every = 1\n", 'evaluate_every = 1\nevaluate_on = "val"\n'))
    with pytest.raises(InputError, match=r"distill\.evaluate_on: 'val': no such set, there is dev; name one of"):
        load_config(path)
    path.write_text(text.partition("[evaluate.dev]")[0])
    with pytest.raises(InputError, match=r"distill\.evaluate_on: 'dev': no such set, there is none"):
        load_config(path)
    path.write_text(path.read_text().replace("evaluate_every = 1\n", ""))
    assert load_config(path).distill.evaluate_every == 0


def test_evaluate_scores_the_best_step_and_says_that_it_was_chosen_on_that_set(config, capsys):
    run = config.parent / "runs/small"
    found = json.loads(run_dimefm(capsys, "evaluate", run, "--json").out)[str(run)]["dev"]
    kept = load_best(run)
    said = {key: found[key] for key in ("step", "checkpoint", "weights", "chosen_on")}
    assert said == {"step": kept["step"], "checkpoint": "best", "weights": "model", "chosen_on": True}
    assert found["student_top1"] == kept["scores"]["student_top1"] and found["cosine"] == kept["scores"]["cosine"]
    assert json.loads((run / "evaluation.json").read_bytes()) == {"dev": found}
    note = score_table({"runs/small": {"dev": found}}).splitlines()[-1]
    assert note.startswith("Optimistic") and note.endswith(f"small on dev (step {kept['step']}).")


def test_evaluate_scores_the_last_step_when_asked(config, capsys):
    run = config.parent / "runs/small"
    done = run_dimefm(capsys, "evaluate", run, "--weights", "last", "--json")
    found = json.loads(done.out)[str(run)]["dev"]
    line = json.loads((run / "scores.jsonl").read_text().splitlines()[-1])
    assert (found["step"], found["checkpoint"], found["chosen_on"]) == (7, "last", False)
    assert all(found[key] == line[key] for key in ("student_top1", "student_top5", "agreement", "cosine", "weights"))
    assert "Optimistic" not in run_dimefm(capsys, "evaluate", run, "--weights", "last").out


def test_a_run_that_keeps_no_best_has_its_last_step_scored(config, tmp_path, capsys):
    run = tmp_path / "small"
    shutil.copytree(config.parent / "runs/small", run)
    (run / BEST).unlink()
    found = json.loads(run_dimefm(capsys, "evaluate", run, "--json").out)[str(run)]["dev"]
    assert (found["step"], found["checkpoint"], found["chosen_on"]) == (7, "last", False)
    line = refused(capsys, "evaluate", run, "--weights", "best")
    assert "best.pt: missing; a run keeps its best weights where distill.evaluate_every is set" in line
    (run / BEST).write_bytes(b"PK\x03\x04 damaged")
    assert "best.pt: not a readable checkpoint; delete it; the next step that is scored" in refused(
        capsys, "evaluate", run
    )
    assert run_dimefm(capsys, "evaluate", run, "--weights", "last").code == 0


def test_scores_are_on_the_board(world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn(world)
    board = EventAccumulator(str(world[1] / "run/tensorboard")).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("dev/student_top1")]
    wanted = [(line["step"], np.float32(line["student_top1"])) for line in lines(world)]
    assert shown == wanted
