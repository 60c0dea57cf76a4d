"""Stage one under SIGKILL: whatever was on disk at that moment, the next run ends with the bytes of an unbroken one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .worlds import make_world

PROGRAM = Path(__file__).with_name("kill_stage_one.py")


def kill_at(config, fractions):
    words = [sys.executable, str(PROGRAM), str(config), *map(str, fractions)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(reports, num_kills):
    assert len(reports) == num_kills
    for report in reports:
        assert report["killed"] and report["resumed"], report
        assert report["same"], report
    return reports


@pytest.fixture
def config(tmp_path, tiny_teacher):
    """84 images and 60 sentences in shards of 4 and more in pairs: over 36 shards of embeddings alone."""
    return make_world(tmp_path, tiny_teacher, num_images=84, num_sentences=60)


def test_a_killed_run_goes_on_to_the_same_bytes(config):
    reports = check(kill_at(config, [0.0, 0.1, 0.3, 0.5, 0.65, 0.8, 0.95, 1.0]), 8)
    shards = [report["shards_at_kill"] for report in reports]
    assert shards[0] == 0 and shards[-1] == 21 + 15 + 3 + 1
    assert sorted(set(shards)) == sorted(shards) or len(set(shards)) >= 4  # the kills fell into different moments


@pytest.mark.acceptance
def test_killed_at_every_step_it_goes_on_to_the_same_bytes(config):
    (first,) = kill_at(config, [0.5])
    check(kill_at(config, [(step + 0.5) / first["steps"] for step in range(first["steps"])]), first["steps"])
