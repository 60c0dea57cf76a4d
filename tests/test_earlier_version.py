"""What version 0.1.0 left on disk still works: a finished cache, and a run that stopped at step 5 of 12.

`data/made_by_0_1_0.tar.xz` was made once, with the tree before the rooms: 19 images (one unreadable), 22 sentences,
kept pixels, one crop of each image, a labelled set, a student of 8 channels. `expected.json` in it is what that tree
went on to: the losses of all 12 steps and evaluation.json.
"""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from .support.commands import run_dimefm
from .support.paths import DATA


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with tarfile.open(DATA / "made_by_0_1_0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / "runs/small/source.json"
    source.write_text(source.read_text().replace("@FOLDER@", str(tmp_path)))
    monkeypatch.chdir(tmp_path)  # modules of one's own are found there
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("fixture_students", None)


def expected(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


def test_its_cache_is_sound_and_finished(folder, capsys):
    found = json.loads(run_dimefm(capsys, "cache", "verify", folder / "cache", "--json").out)
    assert found["sound"], found
    before = {path: path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file()}
    done = run_dimefm(capsys, "cache-teacher", folder / "run.toml")
    assert done.code == 0 and done.lines[-1].endswith("finished; nothing to do"), done
    assert all(path.read_bytes() == data for path, data in before.items())


def test_its_cache_takes_in_more_and_is_mended(folder, capsys):
    shutil.copy(folder / "images/0/000.jpg", folder / "images/0/new.jpg")
    assert run_dimefm(capsys, "cache", "append", folder / "cache", "--config", folder / "run.toml").code == 0
    shard = folder / "cache/teacher.zarr/sentences/embedding/c/1/0"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    assert run_dimefm(capsys, "cache", "verify", folder / "cache").code == 1
    assert run_dimefm(capsys, "cache", "repair", folder / "cache", "--config", folder / "run.toml").code == 0
    found = json.loads(run_dimefm(capsys, "cache", "inspect", folder / "cache", "--json").out)
    assert found["arrays"]["images/embedding"]["rows"] == 20


def test_its_run_goes_on_and_is_scored_as_it_would_have_been(folder, capsys):
    done = run_dimefm(capsys, "distill", folder / "run.toml")
    assert done.code == 0, done
    lines = [json.loads(line) for line in (folder / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    # Other processors and versions have other last bits; on the machine that made it they are equal.
    assert [line["loss"] for line in lines] == pytest.approx(expected(folder)["losses"], rel=1e-3)
    assert run_dimefm(capsys, "evaluate", folder / "runs/small").code == 0
    scores = json.loads((folder / "runs/small/evaluation.json").read_text())["dev"]
    wanted = expected(folder)["evaluation"]["dev"]
    assert scores.keys() == wanted.keys()
    assert (scores["n"], scores["step"], scores["weights"]) == (wanted["n"], wanted["step"], wanted["weights"])
    assert scores["cosine"] == pytest.approx(wanted["cosine"], abs=1e-3)
