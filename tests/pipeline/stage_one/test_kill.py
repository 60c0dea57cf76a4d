"""SIGKILL: whatever was on disk at that moment, the next run ends with the bytes of an undisturbed one.

`benchmarks/crash.py` does it; here a few kills of each job, in a small world.
"""

import json
import subprocess
import sys

import pytest

from ...support.paths import ROOT

PROGRAM = ROOT / "benchmarks" / "crash.py"


def kill(*words):
    done = subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, check=False)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    for report in reports:
        assert report["killed"] and report["resumed"] and report["same"] and report["old_rows_served"], report
    assert done.returncode == 0, done.stderr
    return reports


@pytest.mark.parametrize(
    ("job", "moments", "steps"),
    [("stage-one", 1, 2), ("pixels", 1, 2), ("append", 1, 2), ("repair", 1, 2), ("give-up", 1, 2)],
)
def test_killed_anywhere_the_next_run_ends_with_the_same_bytes(job, moments, steps):
    """42 images and 33 sentences in shards of 4: 24 shards of embeddings; append begins with a third of them.

    Images are kept as pixels too; in `pixels` later than they were embedded.
    """
    words = ["--moments", str(moments), "--steps", str(steps), "--images", "42", "--sentences", "33"]
    reports = kill("--jobs", job, *words)
    assert len(reports) == moments + steps
    assert len({report["moment"] for report in reports}) == len(reports)


@pytest.mark.acceptance
def test_killed_at_fifty_moments_and_at_every_named_step():
    reports = kill()
    assert len(reports) > 4 * 50
