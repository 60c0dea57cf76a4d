"""Kill a repair at chosen steps and repeat it. A program of its own: it forks, so it must not have run torch yet.

    python tests/kill_repair.py CACHE DAMAGED STEP [STEP ...]

DAMAGED is a damaged copy of CACHE, which is replaced by it before every repair. Repairs once uninterrupted and counts
the steps: each fsync and each rename, before and after it happens. Then, for each STEP (a fraction of all steps), is
killed with SIGKILL at that step and repairs again. Prints one JSON line for each: whether the bytes are the same.
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
from dimefm.pipeline.repair import repair

torch.set_num_threads(1)  # no thread pool before the forks, and the same last bits in every run


def tree(root: Path) -> dict[str, str]:
    """Digest of every file of a cache but its log."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: digest(path.read_bytes()) for name, path in files.items() if not name.startswith("log/")}


def repair_in_a_fork(root: Path, kill_at: int = -1, count_into: Path | None = None) -> int:
    """Repair in a child, counting steps; returns its exit status, -9 when it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*arguments: object, **options: object) -> None:
            step()
            function(*arguments, **options)
            step()

        return wrapper

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    try:
        repair(root)
        if count_into:
            count_into.write_text(str(steps))
        os._exit(0)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main() -> None:
    root, damaged = Path(sys.argv[1]), Path(sys.argv[2])
    counter = root.parent / "steps"

    def damage() -> None:
        shutil.rmtree(root)
        shutil.copytree(damaged, root)

    damage()
    assert repair_in_a_fork(root, count_into=counter) == 0
    wanted, total = tree(root), int(counter.read_text())
    for fraction in map(float, sys.argv[3:]):
        damage()
        kill_at = max(1, min(total, round(fraction * total)))
        killed, again = repair_in_a_fork(root, kill_at), repair_in_a_fork(root)
        found = tree(root)
        report = {
            "step": kill_at,
            "steps": total,
            "killed": killed == -signal.SIGKILL,
            "repaired": again == 0,
            "same": found == wanted,
            "differs": sorted({name for name, _ in set(found.items()) ^ set(wanted.items())}),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
