"""Shards on a Dask cluster: the same bytes as in this process, and one line when there is nobody to do the work."""

import re
import subprocess
import sys
import time

import pytest

from dimefm.cache import InputError
from dimefm.cache.disk.durable import digest
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher

from ...support.worlds import make_world

WORKER = "import torch; torch.set_num_threads(1)\nfrom distributed.cli.dask_worker import main\nmain()"


@pytest.fixture
def scheduler(tmp_path):
    """Address of a scheduler of its own process, without workers."""
    log = tmp_path / "scheduler.log"
    words = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen([*words, "--no-dashboard"], stdout=file, stderr=file)
    try:
        for _ in range(300):
            found = re.search(r"Scheduler at:\s+(tcp://\S+)", log.read_text())
            if found:
                break
            time.sleep(0.1)
        assert found, log.read_text()
        yield found.group(1)
    finally:
        process.kill()
        process.wait()


def chunks(config):
    store = load_config(config).cache.dir / "teacher.zarr"
    return {path.relative_to(store): digest(path.read_bytes()) for path in store.rglob("*") if path.is_file()}


def test_a_worker_in_another_process_writes_the_same_bytes(tmp_path, tiny_teacher, scheduler):
    alone, shared = (make_world(tmp_path / name, tiny_teacher) for name in ("alone", "shared"))
    cache_teacher(load_config(alone))
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, scheduler, "--nthreads", "2", "--no-nanny", "--no-dashboard"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        cache_teacher(load_config(shared), scheduler)
    finally:
        worker.kill()
        worker.wait()
    assert chunks(alone) == chunks(shared)


def test_a_scheduler_without_workers_is_one_line(tmp_path, tiny_teacher, scheduler, monkeypatch):
    monkeypatch.setattr("dimefm.pipeline.stage_one.cluster.SECONDS_FOR_WORKERS", 1)
    with pytest.raises(InputError, match=r"has no workers; start some with `dask worker tcp://"):
        cache_teacher(load_config(make_world(tmp_path, tiny_teacher)), scheduler)


def test_no_scheduler_is_one_line(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setattr("dimefm.pipeline.stage_one.cluster.SECONDS_FOR_SCHEDULER", 1)
    with pytest.raises(InputError, match="no Dask scheduler answers there"):
        cache_teacher(load_config(make_world(tmp_path, tiny_teacher)), "tcp://127.0.0.1:9")
