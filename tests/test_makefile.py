"""`make` on a fresh clone: every target of the contract sets up what it needs by itself. What it would run, not run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dimefm

ROOT = Path(dimefm.__file__).parent
FROM_OUTSIDE = {"MAKELEVEL", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "CONFIG", "VENV", "PYTHON3"}
SETUP = ["-m venv .venv", "pip install", "touch .venv/.installed"]
DEMO, STAGE_ONE = "dimefm demo data/demo", "dimefm cache-teacher data/demo/demo.toml"
STAGE_TWO = ["dimefm distill data/demo/demo.toml", "dimefm evaluate data/demo/demo.toml"]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


@pytest.fixture
def clone(tmp_path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def would_run(clone: Path, *words: str) -> list[str]:
    # `make test` runs this very file: what it tells its children is not a fresh shell's.
    env = {name: value for name, value in os.environ.items() if name not in FROM_OUTSIDE}
    done = subprocess.run(["make", "-n", *words], cwd=clone, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("setup", []),
        ("cache-teacher", [DEMO, STAGE_ONE]),
        ("distill", [DEMO, STAGE_ONE, *STAGE_TWO]),
        ("evaluate", [DEMO, STAGE_ONE, *STAGE_TWO]),
        ("demo-teacher", ["python -m dimefm.stages.demo.tiny_teacher"]),
        ("test", ["pytest"]),
        ("acceptance", ["pytest -m acceptance"]),
        ("lint", ["ruff check", "ruff format", "mypy"]),
        ("bench", ["benchmarks/gather.py", "benchmarks/stage_one.py"]),
    ],
)
def test_each_target_sets_up_what_it_needs_in_order(clone, target, wanted):
    lines = would_run(clone, target)
    for i, part in enumerate([*SETUP, *wanted]):
        assert part in lines[i], lines


def test_a_config_of_ones_own_needs_no_demo(clone):
    (clone / "my.toml").write_text("")
    lines = would_run(clone, "distill", "CONFIG=my.toml")
    assert not any("demo" in line for line in lines) and lines[-1].endswith("dimefm evaluate my.toml")


def test_what_is_set_up_is_not_set_up_again(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv/.installed").touch()
    assert would_run(clone, "lint")[0].endswith("ruff check .")


def test_clean_leaves_caches_and_runs_alone(clone):
    assert not {"data", "runs", ".venv", "cache"} & set(" ".join(would_run(clone, "clean")).split())
