"""The commands: help without torch, one JSON document, exit codes, and what an interruption leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from dimefm.cache import FeatureCache
from dimefm.cli import app
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher

from .support.commands import refused, run_dimefm, tree
from .support.paths import ROOT
from .support.worlds import make_world


def commands(group: typer.core.TyperGroup, words: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Words of every command there is, those of groups too."""
    yield list(words)
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


COMMANDS = list(commands(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher) -> Path:
    """A world whose stage one is done; nobody changes it."""
    config = make_world(tmp_path_factory.mktemp("finished"), tiny_teacher, num_images=12, num_sentences=14)
    cache_teacher(load_config(config))
    return config


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "world", copy_function=shutil.copy2)
    return tmp_path / "world" / "run.toml"


def test_the_commands_are_those_of_the_contract():
    contract = (ROOT / "docs/contract.md").read_text()
    for words in COMMANDS[1:]:
        *group, name = words
        assert f"dimefm {' '.join(words)}" in contract or (group and f"|{name}" in contract.replace("\\|", "|"))


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words))
def test_help_answers_without_loading_anything_heavy(words):
    program = (
        "import sys; from dimefm.cli import app\n"
        f"sys.argv = ['dimefm', *{words!r}, '--help']\n"
        "try: app()\n"
        "except SystemExit as leave: assert not leave.code\n"
        "assert not {'torch', 'zarr', 'faiss', 'pyarrow', 'numpy', 'distributed'} & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith(('dimefm.pipeline', 'dimefm.stages.settings'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: dimefm" in done.stdout


def test_help_shows_keys_in_brackets_as_they_are_written(capfd):
    assert "[evaluate.*]" in run_dimefm(capfd, "evaluate", "--help").out


@pytest.mark.parametrize("words", [[], ["cache"], ["nonsense"], ["plan"], ["cache", "verify"], ["plan", "--no-such"]])
def test_wrong_usage_is_exit_code_2(capfd, words):
    assert run_dimefm(capfd, *words).code == 2


REPORTS = [
    ["plan", "run.toml"],
    ["cache", "inspect", "cache"],
    ["cache", "verify", "cache"],
    ["cache", "verify", "cache", "--teacher", "--sources"],
    ["cache", "repair", "cache"],
    ["cache", "duplicates", "cache", "--threshold", "0.9"],
    ["cache", "duplicates", "cache", "--threshold", "0.9", "--side", "sentences", "--mask", "few"],
    ["cache", "leakage", "cache", "--threshold", "0.9"],
]


@pytest.mark.parametrize("words", REPORTS, ids=lambda words: " ".join(words).replace(" cache", "", 1))
def test_a_command_that_reports_prints_one_json_document_and_nothing_else(copy, capfd, words):
    paths = {"run.toml": copy, "cache": copy.parent / "cache"}
    done = run_dimefm(capfd, words[0], *(paths.get(word, word) for word in words[1:]), "--json")
    assert done.code == 0, done.lines
    assert json.loads(done.out)["cache"] == str(copy.parent / "cache")
    assert json.loads(done.out, parse_constant=pytest.fail)  # NaN is no JSON


def test_damage_is_reported_as_json_with_exit_code_1_and_its_line_elsewhere(copy, capfd):
    (copy.parent / "cache/index/images.faiss").unlink()
    done = run_dimefm(capfd, "cache", "verify", copy.parent / "cache", "--json")
    assert done.code == 1 and done.lines[-1].startswith("error: ")
    assert [finding["where"] for finding in json.loads(done.out)["findings"]] == ["index/images.faiss"]
    done = run_dimefm(capfd, "cache", "repair", copy.parent / "cache", "--json")
    assert done.code == 0 and list(json.loads(done.out)["mended"]) == ["index/images.faiss"]


def test_a_plan_knows_no_sizes_where_only_a_hub_knows_the_width(copy, capfd):
    text = copy.read_text().splitlines()
    text = [line for line in text if not line.startswith("pretrained")]
    text = ['model = "hf-hub:nobody/nothing"' if line.startswith("model = ") else line for line in text]
    config = copy.with_name("hub.toml")
    config.write_text("\n".join(text).replace('dir = "cache"', 'dir = "hub"').partition("[student.small]")[0])
    found = json.loads(run_dimefm(capfd, "plan", config, "--json").out)
    assert found["state"] == "not started" and found["rows_left"] == 12 + 14
    assert found["disk"]["cache_bytes"] is None and found["memory_bytes"] is None
    assert [item["bytes"] for item in found["arrays"].values()] == [None, None]
    shown = run_dimefm(capfd, "plan", config).out
    assert "disk: unknown before the teacher is loaded" in shown and "26 rows" in shown


def test_masks_of_the_config_choose_the_rows_of_a_run(copy, capfd):
    rows = copy.parent / "keep.txt"
    rows.write_text("".join(f"{row}\n" for row in range(9)))
    text = copy.read_text().replace("batch_sentences = 12", "batch_sentences = 9")
    for name, side in (("first", "images"), ("short", "sentences")):
        done = run_dimefm(capfd, "cache", "mask", copy.parent / "cache", name, "--keep", rows, "--side", side)
        assert done.code == 0 and "keeps 9 of" in done.out
        text = text.replace(f"[{side}]", f'[{side}]\nmask = "{name}"')
    copy.write_text(text)
    done = run_dimefm(capfd, "distill", copy, "--student", "small", "--steps", "1")
    assert done.code == 0, done.lines
    record = json.loads((copy.parent / "runs/small/run.json").read_bytes())
    assert record["rows"]["images"] == record["rows"]["sentences"] == 9
    assert {side: mask["name"] for side, mask in record["masks"].items()} == {"images": "first", "sentences": "short"}
    copy.write_text(copy.read_text().replace('"first"', '"frist"'))
    assert "it has: first" in refused(capfd, "distill", copy)


def test_what_make_distill_runs_does_nothing_the_second_time(copy, capfd, monkeypatch):
    def everything() -> str:
        for command in ("cache-teacher", "distill"):
            done = run_dimefm(capfd, command, copy)
            assert done.code == 0, done.lines
        return run_dimefm(capfd, "evaluate", copy).out

    def refuse(*arguments: object) -> None:
        raise AssertionError("a teacher was loaded")

    table = everything()
    assert {"small", "vit"} <= {word for line in table.splitlines() for word in line.split()[:1]}
    cache, runs = copy.parent / "cache", copy.parent / "runs"
    files = [*cache.rglob("*"), *runs.rglob("checkpoint.pt"), *runs.rglob("metrics.jsonl")]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}
    monkeypatch.setattr("dimefm.stages.models.load_teacher.load_teacher", refuse)
    assert everything() == table
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files} == before


def start(*words: object, program: str = "") -> subprocess.Popen:
    text = f"import torch; torch.set_num_threads(1)\n{program}\nfrom dimefm.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", text, *map(str, words)], stderr=subprocess.PIPE, text=True)


INTERRUPT_AT_THE_FIFTH_SHARD = """
import os, signal
from dimefm.cache.version.journal import Journal
add, counted = Journal.add, []
def counting(self, *arguments):
    add(self, *arguments)
    counted.append(1)
    if len(counted) == 5:
        os.kill(os.getpid(), signal.SIGINT)
Journal.add = counting
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
"""


def test_an_interrupted_stage_one_is_exit_code_130_and_goes_on_to_the_same_bytes(copy):
    wanted = tree(copy.parent / "cache")
    shutil.rmtree(copy.parent / "cache")
    done = start("cache-teacher", copy, program=INTERRUPT_AT_THE_FIFTH_SHARD)
    lines = done.communicate(timeout=300)[1].splitlines()
    assert done.returncode == 130 and lines[-1].startswith("interrupted: "), lines
    assert not any("Traceback" in line for line in lines)
    assert not (copy.parent / "cache/manifest.json").exists()
    cache_teacher(load_config(copy))
    assert tree(copy.parent / "cache") == wanted
    assert len(FeatureCache.open(copy.parent / "cache").images) == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_is_exit_code_130_with_its_state_saved(copy, number):
    copy.write_text(copy.read_text().replace("epochs = 2", "epochs = 5000"))
    running, metrics = start("distill", copy, "--student", "small"), copy.parent / "runs/small/metrics.jsonl"
    while running.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
        time.sleep(0.05)
    os.kill(running.pid, number)
    lines = running.communicate(timeout=300)[1].splitlines()
    assert running.returncode == 130 and "state saved at step" in lines[-1], lines
    assert (copy.parent / "runs/small/checkpoint.pt").exists()
