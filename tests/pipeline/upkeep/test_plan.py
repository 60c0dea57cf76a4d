"""`dimefm plan` loads no model and no torch, and reports on sources that are not as they were."""

import json
import shutil
import subprocess
import sys

import pytest

from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.plan import describe_plan

from ...support.commands import run_dimefm
from ...support.worlds import make_world

PROMPTS = '[sentences.prompts]\nclasses = "classes.json"\ntemplates = "openai"\n[cache]'


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher):
    """A world whose stage one is done, with open_clip's templates among the sentences."""
    config = make_world(tmp_path_factory.mktemp("finished"), tiny_teacher, num_images=9, num_sentences=8)
    config.write_text(config.read_text().replace("[cache]", PROMPTS).replace("shard_rows = 4", "shard_rows = 64"))
    cache_teacher(load_config(config))
    return config


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path / "world", copy_function=shutil.copy2)
    return tmp_path / "world" / "run.toml"


@pytest.mark.parametrize("state", ["not started", "unfinished", "finished"])
def test_plan_runs_without_torch(copy, state):
    if state == "not started":
        shutil.rmtree(copy.parent / "cache")
    elif state == "unfinished":
        for name in ("manifest.json", "manifest.xxh3"):
            (copy.parent / "cache" / name).unlink()
    # A cache that was begun without kept pixels gets none before it is finished.
    words = ["plan", str(copy), "--json", *([] if state == "unfinished" else ["--set", "cache.pixels=jpeg-16"])]
    program = (
        "import sys; from dimefm.cli import app\n"
        f"sys.argv = ['dimefm', *{words!r}]\n"
        "try: app()\n"
        "except SystemExit as leave: assert not leave.code, leave.code\n"
        "loaded = {'torch', 'torchvision', 'open_clip', 'timm', 'distributed'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["arrays"]["sentences/embedding"]["rows"] == 8 + 4 * 80
    wanted = {"not started": ("not started", 9), "unfinished": ("unfinished", 0), "finished": ("unfinished", 0)}
    assert (found["state"], found["arrays"]["images/embedding"]["rows_left"]) == wanted[state]


def test_an_images_folder_that_is_empty_is_reported_by_plan_and_refused_by_stage_one(copy, capfd):
    for folder in ("images", "dev"):
        shutil.rmtree(copy.parent / folder)
        (copy.parent / folder).mkdir()
    found = describe_plan(load_config(copy))
    assert found["state"] == "finished" and found["rows_left"] == 0
    images, dev = found["notes"]
    assert images.startswith(f"images.source: not compared: {copy.parent / 'images'}: no image below it")
    assert dev.startswith(f"evaluate.dev.images: not compared: {copy.parent / 'dev'}: no image below it")
    assert run_dimefm(capfd, "plan", copy).code == 0
    assert run_dimefm(capfd, "cache-teacher", copy).code == 1


def test_what_is_set_is_planned_for_and_recorded_as_if_it_had_stood_in_the_file(copy, capfd):
    shutil.rmtree(copy.parent / "cache")
    done = run_dimefm(capfd, "cache-teacher", copy, "--set", "cache.shard_rows=5", "--set", "cache.dir=other")
    assert done.code == 0, done.lines
    edited = copy.with_name("edited.toml")
    edited.write_text(copy.read_text().replace("shard_rows = 64", "shard_rows = 5"))
    assert run_dimefm(capfd, "cache-teacher", edited).code == 0
    assert (copy.parent / "other/plan.json").read_bytes() == (copy.parent / "cache/plan.json").read_bytes()
    (copy.parent / "captions.txt").open("a").write("one more\n")
    done = run_dimefm(capfd, "cache", "append", copy.parent / "other")  # remembers what was set
    assert done.code == 0, done.lines
    wrong = run_dimefm(capfd, "cache", "append", copy.parent / "other", "--config", copy)
    assert wrong.code == 1 and "cache.shard_rows" in wrong.lines[-1]
    for words in (["verify"], ["repair"]):
        done = run_dimefm(capfd, "cache", *words, copy.parent / "other", "--set", "distill.epoch=1")
        assert done.code == 1 and "with --set distill.epoch=1: distill.epoch: no such key" in done.lines[-1]
        assert run_dimefm(capfd, "cache", *words, copy.parent / "other", "--set", "distill.epochs=1").code == 0


def test_runs_record_what_was_set_and_evaluate_takes_it(copy, capfd):
    done = run_dimefm(
        capfd, "distill", copy, "--student", "small", "--set", "distill.seed=7", "--set", "distill.epochs=1"
    )
    assert done.code == 0, done.lines
    assert json.loads((copy.parent / "runs/small/run.json").read_bytes())["distill"]["seed"] == 7
    done = run_dimefm(capfd, "evaluate", copy, "--json", "--set", "evaluate.dev.probe=dev")
    assert done.code == 1 and "with --set evaluate.dev.probe=dev: evaluate: dev.probe" in done.lines[-1]
    done = run_dimefm(capfd, "evaluate", copy.parent / "runs/small", "--set", "distill.seed=7")
    assert done.code == 1 and "name the config" in done.lines[-1]
