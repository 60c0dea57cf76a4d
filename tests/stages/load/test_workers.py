"""Workers: threads or processes, how many, and in what way they end changes no view and leaves nothing behind."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from dimefm.cache import InputError
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.inputs.image_source import row_keys

from ...support.small_cache import make_cache
from .test_batches import batches, equal, loader

TRAINING = """
import signal, sys, time
from pathlib import Path
from PIL import Image
from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.stages.images.views import ViewMaker
from dimefm.stages.load.batches import BatchLoader
from dimefm.stages.train.interrupt import StopSignals
from dimefm.stages.sample.order import Stream
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.settings.distill import AugmentSettings

folder = Path(sys.argv[1])
images = FeatureCache.open(folder / "cache").images
loader = BatchLoader(
    images, Stream(images.usable, 10, 0, "images"), ImageFolder(folder / "images"),
    [ViewMaker(AugmentSettings(), 12, Image.Resampling.BICUBIC)], 5, workers=2, processes=True,
)
with StopSignals() as stop, loader:
    for batch in loader.batches(0, 10**9):
        if batch.step == 3:
            print("running", flush=True)
        if stop.asked:
            break
        time.sleep(0.01)
print("saved", flush=True)
"""
"""A main program without a guard, as a script of a user's may be."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    return make_cache(folder), folder / "images"


@pytest.fixture
def training(world):
    """A process that trains with two worker processes, in a group of its own; and its descendants."""
    command = [sys.executable, "-c", TRAINING, str(world[1].parent)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == "running\n", process.stderr.read()
            yield process, psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()


def test_processes_make_the_batches_that_threads_make_however_many(world):
    expected = batches(world, 0, 9, workers=2, processes=False)
    for workers in (1, 3):
        assert all(map(equal, expected, batches(world, 0, 9, workers=workers, processes=True)))


def test_more_than_two_workers_are_processes_and_they_end_with_the_loader(world):
    with loader(world, workers=2):
        assert not multiprocessing.active_children()
    with loader(world, workers=3):
        workers = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
    assert len(workers) == 3 and not any(worker.is_running() for worker in workers)


def test_an_image_that_is_gone_is_the_same_one_line_from_a_process(tmp_path):
    cache = make_cache(tmp_path)
    (tmp_path / "images/007.jpg").unlink()
    with pytest.raises(
        InputError, match=r"images/007\.jpg: row 7 can no longer be used \(gone\), .* put the file back"
    ):
        batches((cache, tmp_path / "images"), 0, 8, workers=2, processes=True)


def test_a_killed_worker_is_one_clear_line_and_takes_the_others_with_it(world):
    line = r"a worker process was killed \(SIGKILL, often for want of memory\) .* lower"
    with pytest.raises(InputError, match=line), loader(world, workers=2, processes=True) as one:
        for batch in one.batches(0, 10**9):
            if batch.step == 2:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("processes", [False, True])
def test_an_iteration_may_be_left_and_another_begun(world, processes):
    with loader(world, workers=2, processes=processes) as one:
        for batch in one.batches(0, 1000):
            if batch.step == 1:
                break
        again = list(one.batches(2, 5))
    assert all(map(equal, again, batches(world, 2, 5, workers=1)))


@pytest.mark.parametrize("processes", [False, True])
def test_an_error_in_the_training_loop_leaves_no_worker(world, processes):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), loader(world, workers=2, processes=processes) as one:
        for batch in one.batches(0, 1000):
            batch.step // 0
    assert not multiprocessing.active_children() and threading.active_count() == before


def test_a_batch_is_its_users_own(world):
    with loader(world, workers=2, processes=True) as one:
        kept = list(one.batches(0, 12))
    assert all(map(equal, kept, batches(world, 0, 12, workers=1)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_stops_at_a_step_and_no_worker_writes_a_trace(training, number):
    process, descendants = training
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "saved\n", "")
    assert not psutil.wait_procs(descendants, timeout=60)[1]


def test_a_killed_trainer_leaves_no_process_and_no_shared_memory(training):
    process, descendants = training
    assert len(descendants) >= 3  # the fork server and two workers
    shared = Path("/dev/shm")  # the memory that they share has no name there, so nobody needs to be alive to remove it
    assert not list(shared.glob(f"pym-{process.pid}-*"))
    process.kill()
    assert not psutil.wait_procs(descendants, timeout=60)[1]
    assert process.stderr.read() == ""


def test_what_a_worker_gets_holds_nothing_of_the_row_table(world):
    files = ImageFolder(world[1])
    (key,) = row_keys(files, world[0].images.rows)(np.array([5]))
    copy = pickle.loads(pickle.dumps(files))
    assert copy.read(key) == (world[1] / "005.jpg").read_bytes() and copy.locate(key).endswith("images/005.jpg")
    assert len(pickle.dumps(files)) < 500
