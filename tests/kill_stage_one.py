"""Kill stage one at chosen steps and run it again. A program of its own: it forks, so it must not have run torch yet.

    python tests/kill_stage_one.py CONFIG STEP [STEP ...]

Runs the config once uninterrupted and counts the steps: each fsync and each rename, before and after it happens. Then,
for each STEP (a fraction of all steps), starts over in an empty cache, is killed with SIGKILL at that step, and runs
again. Prints one JSON line for each: what was on disk at the kill, and whether the bytes at the end are the same.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dimefm.cache.durable import digest
from dimefm.pipeline.cache_teacher import cache_teacher
from dimefm.pipeline.config import load_config

torch.set_num_threads(1)  # no thread pool before the forks, and the same last bits in every run


def tree(root: Path) -> dict[str, str]:
    """Digest of every file of a cache but its log, which has times in it."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    found = {str(path.relative_to(root)): digest(path.read_bytes()) for path in files}
    return {name: value for name, value in found.items() if not name.startswith("log/")}


def in_a_fork(work: Callable[[], None]) -> int:
    """Run something in a child; returns its exit status, -9 when it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(config: Path, kill_at: int | None = None, count_into: Path | None = None) -> None:
    """Stage one, counting steps; killed when the count reaches `kill_at`."""
    steps = 0

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*arguments: object, **options: object) -> None:
            step()
            function(*arguments, **options)
            step()

        return wrapper

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    cache_teacher(load_config(config))
    if count_into:
        count_into.write_text(str(steps))


def main() -> None:
    config = Path(sys.argv[1])
    root = load_config(config).cache.dir
    counter = root.parent / "steps"
    assert in_a_fork(lambda: run(config, count_into=counter)) == 0
    wanted, total = tree(root), int(counter.read_text())
    for fraction in map(float, sys.argv[2:]):
        shutil.rmtree(root)
        kill_at = max(1, min(total, round(fraction * total)))
        killed = in_a_fork(lambda at=kill_at: run(config, kill_at=at))
        at_kill = sorted(tree(root)) if root.exists() else []
        resumed = in_a_fork(lambda: run(config))
        report = {
            "step": kill_at,
            "steps": total,
            "killed": killed == -signal.SIGKILL,
            "resumed": resumed == 0,
            "files_at_kill": len(at_kill),
            "shards_at_kill": sum("teacher.zarr" in name and "/c/" in name for name in at_kill),
            "same": tree(root) == wanted,
            "differs": sorted(name for name in wanted if tree(root).get(name) != wanted[name]),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
