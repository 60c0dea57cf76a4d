"""Kill stage one, append, repair, ...: look at what is on disk, run the same again: it must end with the same bytes.

    python benchmarks/crash.py [--jobs stage-one pixels append repair give-up] [--moments 50] [--like removal]

Jobs: stage one; pixels that are added to a finished cache; append; repair; and repair where the teacher is gone.
Each job runs once undisturbed, which says how long it takes, which steps it has and what is on disk at the end. Then,
over and over, it starts from the same state and is killed with SIGKILL: at moments spread over its whole time, and at
named steps: before and after each fsync, rename, new folder, link and removal of every kind of file, the manifest's
among them (`--like` chooses some by a regular expression). The same command is run again, and every file but the log,
which has times in it, is compared. Prints a JSON line for each kill: what was on disk, whether a reader of the version
before was served, whether the bytes at the end are the same; exits with 1 unless all are.

It forks, so nothing here may compute with torch, or start a thread, before the fork.
"""

import argparse
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # no thread pool before the forks, and the same last bits in every run

import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from named_steps import Steps

# What the jobs import late is imported here, once for all forks: else a good part of the moments fall into imports.
import dimefm.pipeline.stage_one.cluster.dispatch
import dimefm.pipeline.upkeep.repair.repair
import dimefm.stages.embed.shard
import dimefm.stages.models.frozen_text_tower
import dimefm.stages.models.teacher_check
from dimefm.cache.disk.durable import PARTIAL, digest
from dimefm.cache.disk.layout import Layout
from dimefm.cache.errors import CacheError
from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.cache.version.manifest import read_manifest
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.append import append_to
from tests.support.teachers import make_teacher
from tests.support.worlds import COLOURS, make_world, picture

torch.set_num_threads(1)

PIXELS = 'pixels = "jpeg-24"\n'


@dataclass(frozen=True)
class Job:
    """Something that writes a cache.

    Attributes:
        prepare: brings the world, and the cache in it, to where the job starts.
        run: does the job, or goes on with it.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path], object]


def stage_one(config: Path) -> None:
    cache_teacher(load_config(config))


def without_pixels(config: Path) -> None:
    """A finished cache whose config asks for kept pixels from now on."""
    text = config.read_text()
    config.write_text(text.replace(PIXELS, ""))
    stage_one(config)
    config.write_text(text)


def more_sources(config: Path) -> None:
    """A finished cache, whose last chunks are partly filled, and three times as many sources."""
    stage_one(config)
    world = config.parent
    lines = (world / "captions.txt").read_text().splitlines()
    images = len(list((world / "images").rglob("*.jpg")))
    for i in range(2 * images):
        path = world / "images" / f"{i % 3}" / f"new{i:03d}.png"
        picture(list(COLOURS.values())[i % 4], 5000 + i).save(path)
    (world / "captions.txt").write_text("".join(f"{line}\n" for line in [*lines, *lines, *lines]))


def damage(config: Path) -> None:
    """A finished cache in which every third file is cut, changed or missing, but for its manifest and plan."""
    stage_one(config)
    root = load_config(config).cache.dir
    manifest = read_manifest(Layout(root))
    assert manifest is not None
    for i, name in enumerate(sorted(manifest.files)):
        path = root / name
        if i % 3 == 0 and ("/c/" in name or name.endswith(".pack")):
            data = bytearray(path.read_bytes())
            data[len(data) // 3] ^= 1
            path.write_bytes(data[: len(data) // 2] if i % 4 == 0 else data)
        elif i % 3 == 0 and name.endswith(".faiss"):
            path.unlink()


def damage_and_lose(config: Path) -> None:
    """As `damage`, and the teacher is gone: what it made cannot be made again."""
    damage(config)
    shutil.rmtree(config.parent / "teacher")


def repair(config: Path) -> None:
    dimefm.pipeline.upkeep.repair.repair.repair(load_config(config).cache.dir, config)


JOBS = {
    "stage-one": Job(lambda config: None, stage_one),
    "pixels": Job(without_pixels, stage_one),
    "append": Job(more_sources, lambda config: append_to(load_config(config).cache.dir, config)),
    "repair": Job(damage, repair),
    "give-up": Job(damage_and_lose, repair),
}


def in_a_fork(work: Callable[[], object], kill_after_s: float | None = None) -> int:
    """Run something in a child, killed after some seconds; returns its exit status, -9 when it was killed."""
    child = os.fork()
    if child == 0:
        told, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(told, f"child: {type(error).__name__}: {error}\n".encode())
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(root: Path) -> dict[str, str]:
    """Digest of every file of a cache but its log."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    found = {path.relative_to(root).as_posix(): digest(path.read_bytes()) for path in files}
    return {name: value for name, value in found.items() if not name.startswith("log/")}


class Trial:
    """One job, killed again and again."""

    def __init__(self, name: str, job: Job, config: Path) -> None:
        self.name, self.job, self.config = name, job, config
        self.root = load_config(config).cache.dir
        self.start = self.root.with_name("start")
        assert in_a_fork(lambda: job.prepare(config)) == 0
        if self.root.exists():
            self.root.rename(self.start)
        self.before = self._rows(self.start) if self.start.exists() else None
        counted = config.with_name("steps.json")
        self._restore()
        began = time.perf_counter()
        assert in_a_fork(lambda: self._run(count_into=counted)) == 0
        self.seconds = time.perf_counter() - began
        self.names = json.loads(counted.read_text())
        self.wanted = tree(self.root)

    def named_steps(self, at_most: int, like: str) -> list[tuple[str, int]]:
        """The middle one of every kind of step, and of embeddings the first and the last too; evenly thinned out."""
        counts = Counter(name for name in self.names if re.search(like, name))
        steps = [(name, -(-count // 2)) for name, count in counts.items()]
        steps += [(name, at) for name, count in counts.items() if "embeddings" in name for at in {1, count}]
        steps = list(dict.fromkeys(steps))
        return [steps[i * len(steps) // at_most] for i in range(at_most)] if len(steps) > at_most else steps

    def kill_at_step(self, step: tuple[str, int]) -> dict[str, Any]:
        name, number = step
        while True:
            self._restore()
            status = in_a_fork(partial(self._run, (name, number)))
            if status == -signal.SIGKILL or number == 1:
                return self._report(f"{name} (number {number})", status)
            number -= 1  # two threads that want the same folder make one step or two

    def kill_after(self, share: float) -> dict[str, Any]:
        seconds = share * self.seconds
        while True:
            self._restore()
            status = in_a_fork(self._run, kill_after_s=seconds)
            if status == -signal.SIGKILL:
                return self._report(f"after {seconds:.2f} s, {share:.0%} of its time", status)
            seconds *= 0.9  # it was faster than the first time

    def _run(self, kill_at: tuple[str, int] | None = None, count_into: Path | None = None) -> None:
        steps = Steps(self.root, kill_at)
        self.job.run(self.config)
        if count_into:
            count_into.write_text(json.dumps(steps.names))

    def _restore(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        if self.start.exists():
            shutil.copytree(self.start, self.root, symlinks=True, copy_function=shutil.copy2)

    def _report(self, moment: str, status: int) -> dict[str, Any]:
        at_kill = tree(self.root) if self.root.exists() else {}
        served = (
            self.before is None
            or self.name in ("repair", "give-up")
            or self._rows(self.root, len(self.before)) == self.before
        )
        version = self._version()
        resumed = in_a_fork(lambda: self.job.run(self.config))
        after = tree(self.root) if self.root.exists() else {}
        return {
            "job": self.name,
            "killed": status == -signal.SIGKILL,
            "moment": moment,
            "version_at_kill": version,
            "files_at_kill": len(at_kill),
            "chunks_at_kill": sum("/c/" in name and "teacher.zarr" in name for name in at_kill),
            "half_written_at_kill": [name for name in at_kill if name.endswith(PARTIAL)],
            "next_at_kill": sum(name.startswith("next/") for name in at_kill),
            "old_rows_served": served,
            "resumed": resumed == 0,
            "same": after == self.wanted,
            "differs": sorted(name for name in after.keys() | self.wanted if after.get(name) != self.wanted.get(name)),
        }

    def _rows(self, root: Path, num_rows: int | None = None) -> list[bytes]:
        """The image embeddings that a reader finds, row by row; nothing where it finds no cache."""
        try:
            embeddings = FeatureCache.open(root).images.embeddings
        except CacheError:
            return []
        return [row.tobytes() for row in embeddings[: num_rows or len(embeddings)]]

    def _version(self) -> int | None:
        try:
            manifest = read_manifest(Layout(self.root))
        except CacheError:
            return None
        return manifest.version if manifest else None


def kills(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every report of every job."""
    for name in arguments.jobs:
        config = folder / name / "run.toml"
        shrink = 3 if name == "append" else 1  # it triples

        def make(world: Path = config.parent, shrink: int = shrink) -> None:
            make_world(
                world, make_teacher(world / "teacher"), arguments.images // shrink, arguments.sentences // shrink
            )
            text = (world / "run.toml").read_text()
            (world / "run.toml").write_text(text.replace("[pairs]", f"{PIXELS}[pairs]"))

        assert in_a_fork(make) == 0
        trial = Trial(name, JOBS[name], config)
        shards = sum("/c/" in path and "teacher.zarr" in path for path in trial.wanted)
        print(f"{name}: {trial.seconds:.1f} s, {len(trial.names)} steps, {shards} shards", file=sys.stderr, flush=True)
        for i in range(arguments.moments):
            yield trial.kill_after((i + 0.5) / arguments.moments)
        for step in trial.named_steps(arguments.steps, arguments.like):
            yield trial.kill_at_step(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--moments", type=int, default=50, help="kills of each job spread over its time")
    parser.add_argument("--steps", type=int, default=1000, help="at most so many kills of each job at named steps")
    parser.add_argument("--like", default="", help="only named steps whose name has a match of this")
    parser.add_argument("--images", type=int, default=84, help="images at the end; a shard has 4")
    parser.add_argument("--sentences", type=int, default=60)
    arguments = parser.parse_args()
    good = True
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for report in kills(arguments, Path(folder)):
            print(json.dumps(report), flush=True)
            counted[report["job"]] += 1
            good &= report["killed"] and report["resumed"] and report["same"] and report["old_rows_served"]
    print(
        f"{dict(counted)} kills: {'every one' if good else 'NOT every one'} ended with the same bytes", file=sys.stderr
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
