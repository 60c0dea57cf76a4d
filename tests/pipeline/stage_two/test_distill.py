"""Stage two, whole: from the cache alone, for several students, scored without the teacher; and the commands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dimefm.cache import CacheError, FeatureCache, InputError
from dimefm.cache.disk.durable import write_json
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.stage_two.evaluate import evaluate

from ...support.worlds import make_world

WITHOUT_TEACHER = """
import socket, sys
import dimefm.stages.models.load_teacher

def refuse(*arguments, **options):
    raise AssertionError("a teacher was loaded, or the network was asked")

dimefm.stages.models.load_teacher.load_teacher = refuse
socket.socket.connect = refuse
import torch
torch.set_num_threads(1)
from dimefm.cli import main
sys.argv = ["dimefm", *sys.argv[1:]]
main()
"""


def dimefm(
    *arguments: object, program: str = "import torch; torch.set_num_threads(1)\nfrom dimefm.cli import main\nmain()"
):
    """The command in a process of its own."""
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_teacher):
    """A world with a finished cache, its teacher and its sentences gone."""
    folder = tmp_path_factory.mktemp("cached")
    config = make_world(folder, tiny_teacher)
    cache_teacher(load_config(config))
    (folder / "captions.txt").unlink()
    config.write_text(config.read_text().replace(str(tiny_teacher[1]), str(folder / "gone" / tiny_teacher[1].name)))
    return config


@pytest.fixture
def copy(cached, tmp_path):
    shutil.copytree(cached.parent, tmp_path / "world")
    return tmp_path / "world" / "run.toml"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_students_are_trained_and_scored_where_no_teacher_can_be_loaded(copy):
    done = dimefm("distill", copy, program=WITHOUT_TEACHER)
    assert done.returncode == 0, done.stderr
    for name in ("small", "vit"):
        lines = metrics(copy.parent / "runs" / name)
        assert [line["step"] for line in lines] == list(range(1, 8))  # 30 images x 2 epochs / 8 a step = 7.5
        assert all(np.isfinite(line["loss"]) for line in lines)
    runs = [copy.parent / "runs" / name for name in ("small", "vit")]
    scored = dimefm("evaluate", *runs, "--json", program=WITHOUT_TEACHER)
    assert scored.returncode == 0, scored.stderr
    scores = json.loads(scored.stdout)
    for run in runs:
        assert json.loads((run / "evaluation.json").read_bytes()) == scores[str(run)]
        item = scores[str(run)]["dev"]
        assert item["n"] == 12 and item["unreadable"] == 0
        for key in ("student_top1", "student_top5", "teacher_top1", "teacher_top5", "agreement"):
            assert 0 <= item[key] <= 1
        assert -1 <= item["cosine"] <= 1


def test_the_teachers_scores_are_those_of_the_cached_arrays_by_hand(copy):
    config = load_config(copy)
    distill(config, ["small"], stop_after=1)
    item = evaluate([copy.parent / "runs/small"])[str(copy.parent / "runs/small")]["dev"]
    dev = FeatureCache.open(config.cache.dir).evaluate["dev"]
    logits = dev.images.embeddings[:].astype(np.float64) @ dev.head.T
    assert item["teacher_top1"] == pytest.approx(np.mean(logits.argmax(1) == dev.labels))
    assert item["teacher_top5"] == 1.0  # there are four classes


def test_steps_stops_and_the_next_run_goes_on_to_the_same_losses(copy):
    config = load_config(copy)
    distill(config, ["small"])
    whole = [line["loss"] for line in metrics(config.distill.output / "small")]
    shutil.rmtree(config.distill.output)
    distill(config, ["small"], stop_after=3)
    assert len(metrics(config.distill.output / "small")) == 3
    distill(config, ["small"])
    assert [line["loss"] for line in metrics(config.distill.output / "small")] == whole


def test_a_finished_student_is_not_trained_again(copy):
    config = load_config(copy)
    distill(config, ["small"])
    before = (config.distill.output / "small/checkpoint.pt").stat().st_mtime_ns
    distill(config, ["small"])
    assert (config.distill.output / "small/checkpoint.pt").stat().st_mtime_ns == before


def test_an_unknown_student_is_refused_by_name(copy):
    with pytest.raises(InputError, match=r"--student tiny: not in the config; it has: small, vit"):
        distill(load_config(copy), ["tiny"])


def test_a_cache_of_another_teacher_is_refused(copy):
    copy.write_text(copy.read_text().replace("[images]", 'precision = "bf16"\n[images]'))
    with pytest.raises(CacheError, match=r"teacher\.precision = fp32, but the config asks for bf16"):
        distill(load_config(copy), ["small"])


def test_an_unfinished_cache_is_one_line_and_exit_code_1(copy):
    (copy.parent / "cache/manifest.json").unlink()
    done = dimefm("distill", copy)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "cache-teacher" in done.stderr


def test_a_run_of_another_cache_is_not_scored(copy):
    config = load_config(copy)
    distill(config, ["small"], stop_after=1)
    plan = json.loads((config.cache.dir / "plan.json").read_bytes())
    write_json(config.cache.dir / "plan.json", {**plan, "touched": True})
    with pytest.raises(CacheError, match=r"plan\.json"):
        evaluate([config.distill.output / "small"])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    done = dimefm("evaluate", tmp_path)
    assert done.returncode == 1 and "not a run" in done.stderr


@pytest.mark.parametrize("text", ["{", "[]", '{"cache": "cache"}', '{"cache": 1, "evaluate": {}}'])
def test_a_note_of_the_sources_that_says_nothing_is_one_line(copy, text):
    distill(load_config(copy), ["small"], stop_after=1)
    run = copy.parent / "runs/small"
    (run / "source.json").write_text(text)
    with pytest.raises(InputError, match=r"source\.json: .*wanted where the cache and the labelled images are"):
        evaluate([run])


def test_wrong_usage_is_exit_code_2():
    assert dimefm("distill").returncode == 2


def test_plan_counts_what_is_done_without_loading_a_model(copy):
    done = dimefm("plan", copy, "--json", program=WITHOUT_TEACHER)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["state"] == "finished" and found["rows_left"] == 0
    assert found["arrays"]["images/embedding"]["shards_done"] == 8


def test_weights_of_sources_are_part_of_the_config_and_reach_the_run(copy):
    copy.write_text(
        copy.read_text() + '\n[images.weights]\n0 = 0.5\n"1" = 0\n\n[sentences.weights]\n"captions.txt" = 2\n'
    )
    distill(load_config(copy), ["small"], stop_after=1)
    record = json.loads((copy.parent / "runs/small/run.json").read_bytes())
    wanted = {"images": {"0": 0.5, "1": 0.0}, "sentences": {"captions.txt": 2.0}}
    assert record["row_weights"] == wanted and record["rows"]["images"] == 20
    copy.write_text(copy.read_text().replace('"captions.txt" = 2', '"web.txt" = 2'))
    with pytest.raises(InputError, match=r"sentences\.weights\.web\.txt: no sentences come from there; there is: "):
        distill(load_config(copy), ["small"], stop_after=1)
    copy.write_text(copy.read_text().replace("0 = 0.5", "0 = -1"))
    with pytest.raises(InputError, match=r"images\.weights\.0: Input should be greater than or equal to 0"):
        load_config(copy)
