"""Stage one on a Dask cluster whose processes fail: nothing that counts changes, and the rest is as of one process.

Scheduler and workers are real ones, on loopback. "As of one process" means the bytes of a run without Dask.
"""

import signal
import subprocess
import sys
import threading
import time

import pytest
from distributed import LocalCluster

from dimefm.cache import InputError
from dimefm.cache.disk.arrays import chunk_path
from dimefm.cache.disk.durable import PARTIAL, digest
from dimefm.cache.disk.layout import Layout
from dimefm.cache.version.journal import Journal, read_records
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_one.cluster import connection, crew
from dimefm.pipeline.upkeep.verify import verify

from ....support.dask_cluster import ALTERED, BLIND, LACKING, OTHER_PILLOW, SLOW, DaskCluster, wait_until
from ....support.worlds import make_world

NUM_SHARDS = 18
"""Of 30 images, 22 sentences and a labelled set of 12 images in shards of 4, and of its head."""

IMPATIENT = "[cluster]\nscheduler_timeout = 4\nworker_timeout = 100\nheartbeat_timeout = 4\n"


WARM_UP = """
import torch
from dimefm.pipeline.stage_one.cluster.worker_side import TEACHERS
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.settings.models import TeacherSettings
settings = TeacherSettings.model_validate_json({!r})
TEACHERS.put(settings, load_teacher(settings, torch.device("cpu")))
"""
"""The teacher is loaded before a test begins: else a worker that loads it faster has embedded everything."""


@pytest.fixture(scope="module")
def dask(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("dask")
    with DaskCluster(folder) as cluster:
        settings = load_config(make_world(folder, tiny_teacher, 1, 1)).teacher
        cluster.warm_up = WARM_UP.format(settings.model_dump_json())
        yield cluster


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_teacher):
    """Digest of each file of the store that one process writes."""
    config = make_world(tmp_path_factory.mktemp("alone"), tiny_teacher)
    cache_teacher(load_config(config))
    return store_files(config)


@pytest.fixture
def run(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setattr(connection, "SECONDS_FOR_A_RESULT", 1.0)
    return Run(make_world(tmp_path, tiny_teacher), monkeypatch)


class Run:
    """One run of stage one, and what its shards were at the moment at which they were counted."""

    def __init__(self, config, monkeypatch):
        config.write_text(config.read_text() + IMPATIENT)
        self.config, self.layout = config, Layout(load_config(config).cache.dir)
        self.counted = {}  # file of a chunk -> digest of what was there when its shard was counted
        self.then = lambda: None
        add = Journal.add

        def add_and_look(journal, record, seconds):
            add(journal, record, seconds)
            if record.array.startswith("pairs"):  # retrieval counts its shards too
                return
            path = chunk_path(self.layout.teacher_zarr, record.array, record.shard)
            assert path not in self.counted, "counted twice"
            self.counted[path] = digest(path.read_bytes())
            self.then()

        monkeypatch.setattr(Journal, "add", add_and_look)

    def once(self, is_so, action):
        """Do something as soon as a shard has been counted and something is so."""

        def then():
            if is_so():
                self.then = lambda: None
                action()

        self.then = then

    def at_count(self, number, action):
        self.once(lambda: len(self.counted) >= number, action)

    def start(self, scheduler=None):
        cache_teacher(load_config(self.config), scheduler)

    def others(self, alone):
        """Files of the store that are not as one process writes them."""
        return {path for path, value in store_files(self.config).items() if value != alone[path]}

    def require_as_counted(self):
        """Every shard was counted, has what it had then, and the cache is sound."""
        assert len(self.counted) == NUM_SHARDS
        assert {path: digest(path.read_bytes()) for path in self.counted} == self.counted
        assert verify(self.layout.root)["sound"]

    def partials(self):
        return [*self.layout.root.rglob(f".*{PARTIAL}")]


def freeze_at_work(dask, run, name):
    """Stop a slow worker once it has written a shard and been given the next."""
    written = dask.num_written(name)
    stop = lambda: run.at_count(0, lambda: dask.send(name, signal.SIGSTOP))  # noqa: E731
    run.once(lambda: dask.num_written(name) > written, stop)


def store_files(config):
    store = load_config(config).cache.dir / "teacher.zarr"
    files = [path for path in store.rglob("*") if path.is_file() and not path.name.endswith(PARTIAL)]
    return {path.relative_to(store): digest(path.read_bytes()) for path in files}


def test_two_workers_write_the_bytes_of_one_process(dask, alone, run, capsys):
    dask.make_ready("a", "b")
    run.start(dask.address)
    run.require_as_counted()
    assert not run.others(alone) and not run.partials()
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (BLIND, "worker b: not used: it cannot read 4 of 4 sampled images ("),
        (OTHER_PILLOW, "worker b: not used: it has pillow 1.1.7, this process has "),
    ],
)
def test_a_worker_that_is_not_fit_is_named_and_not_used(dask, alone, run, capsys, fault, says):
    dask.make_ready("a", "b")
    dask.change("b", fault)
    run.start(dask.address)
    run.require_as_counted()
    assert not run.others(alone) and not run.partials()
    assert capsys.readouterr().err.count(says) == 1


def test_where_no_worker_is_fit_the_run_stops_and_can_go_on(dask, alone, run):
    dask.make_ready("a", "b")
    for name in "ab":
        dask.change(name, BLIND)
    run.config.write_text(run.config.read_text().replace("worker_timeout = 100", "worker_timeout = 1"))
    with pytest.raises(InputError, match=r"none of its 2 workers can be used: worker .: it cannot read 4 of 4"):
        run.start(dask.address)
    assert not run.counted and not run.partials()
    run.start()
    run.require_as_counted()
    assert not run.others(alone)


def test_images_that_one_worker_lacks_come_from_another(dask, alone, run, capsys):
    """The other way round, nothing would be said: the images would be failures."""
    dask.make_ready("a", "b")
    dask.change("b", LACKING)
    run.start(dask.address)
    run.require_as_counted()
    assert not run.others(alone) and not run.partials()
    assert "worker b: did not find images of shard " in capsys.readouterr().err


def test_a_frozen_worker_is_named_and_what_it_writes_when_it_thaws_counts_for_nothing(dask, alone, run, capsys):
    dask.make_ready("a", "b")
    for name in "ab":
        dask.change(name, SLOW)
    freeze_at_work(dask, run, "b")
    run.start(dask.address)
    assert "worker b: no sign of life for " in capsys.readouterr().err
    assert not run.partials()
    written = dask.num_written("b")
    dask.send("b", signal.SIGCONT)
    wait_until(lambda: dask.num_written("b") > written, "the thawed worker wrote nothing")
    wait_until(lambda: dask.is_idle("b"), "the thawed worker does not come to an end")
    run.require_as_counted()
    assert not run.others(alone) and not run.partials()


def test_counted_shards_of_a_worker_with_other_last_bits_stay_when_it_is_killed(dask, alone, run):
    """Dask would compute them once more, elsewhere, and has overwritten them."""
    dask.make_ready("a", "b")
    dask.change("b", ALTERED)
    of_b = set()

    def kill():
        of_b.update(run.others(alone))
        dask.send("b", signal.SIGKILL)

    run.once(lambda: len(run.others(alone)) >= 2, kill)
    run.start(dask.address)
    run.require_as_counted()
    assert len(of_b) >= 2 and run.others(alone) == of_b


def test_a_scheduler_that_is_killed_is_one_line_and_another_run_finishes(dask, alone, run):
    dask.make_ready("a")
    dask.change("a", SLOW)
    run.at_count(3, lambda: (dask.scheduler.kill(), dask.scheduler.wait()))
    with pytest.raises(InputError, match=rf"^--scheduler {dask.address}: has not answered for .*run the same again$"):
        run.start(dask.address)
    assert 3 <= len(run.counted) < NUM_SHARDS
    run.start()
    run.require_as_counted()
    assert not run.others(alone) and not run.partials()


def test_a_worker_that_joins_late_is_waited_for_tried_and_used(run, monkeypatch, alone, capsys):
    monkeypatch.setattr(crew, "SECONDS_BEFORE_A_LINE", 0.0)
    with LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=":0") as cluster:
        say = crew.say

        def join(line):
            say(line)
            cluster.scale(1)

        monkeypatch.setattr(crew, "say", join)
        run.start(cluster.scheduler_address)
    run.require_as_counted()
    assert not run.others(alone)
    assert "waiting for a worker: none is there; start some with `dask worker tcp://" in capsys.readouterr().err


def test_no_worker_is_one_line(run):
    run.config.write_text(run.config.read_text().replace("worker_timeout = 100", "worker_timeout = 1"))
    with (
        LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=":0") as cluster,
        pytest.raises(InputError, match=r"for . s no worker that can be used .*: none is there; start some with `dask"),
    ):
        run.start(cluster.scheduler_address)


def test_no_scheduler_is_one_line(run):
    run.config.write_text(run.config.read_text().replace("scheduler_timeout = 4", "scheduler_timeout = 1"))
    with pytest.raises(InputError, match="no Dask scheduler answers there"):
        run.start("tcp://127.0.0.1:9")


@pytest.mark.acceptance
class TestWithTheDefaultTimeOuts:
    """The same with nothing shortened, and what takes minutes."""

    @pytest.fixture(autouse=True)
    def patient(self, run, dask):
        run.config.write_text(run.config.read_text().replace(IMPATIENT, ""))

    def test_good_shards_stay_when_their_worker_is_killed_and_one_with_other_last_bits_is_left(self, dask, alone, run):
        dask.make_ready("a", "b")
        dask.change("b", ALTERED)
        dask.change("b", SLOW)
        good = set()

        def kill():
            good.update(path for path in run.counted if run.counted[path] in alone.values())
            dask.send("a", signal.SIGKILL)

        run.at_count(5, kill)
        run.start(dask.address)
        run.require_as_counted()
        assert len(good) >= 3 and len(run.others(alone)) >= NUM_SHARDS - len(good) - 4
        assert all(digest(path.read_bytes()) == run.counted[path] for path in good)

    def test_a_worker_that_stands_still_is_named_within_a_minute(self, dask, alone, run, capsys):
        dask.make_ready("a", "b")
        for name in "ab":
            dask.change(name, SLOW)
        freeze_at_work(dask, run, "b")
        began = time.monotonic()
        run.start(dask.address)
        assert time.monotonic() - began < 90
        assert "worker b: no sign of life for 3" in capsys.readouterr().err
        dask.send("b", signal.SIGCONT)
        wait_until(lambda: dask.is_idle("b"), "the thawed worker does not come to an end")
        run.require_as_counted()
        assert not run.others(alone) and not run.partials()

    def test_the_only_worker_stands_still_for_two_minutes(self, dask, alone, run, capsys):
        dask.make_ready("a")
        dask.change("a", SLOW)

        def stop():
            dask.send("a", signal.SIGSTOP)
            threading.Timer(120, lambda: dask.send("a", signal.SIGCONT)).start()

        run.at_count(3, stop)
        run.start(dask.address)
        run.require_as_counted()
        said = capsys.readouterr().err
        assert said.count("waiting for a worker: worker a has given no sign of life for ") >= 3
        assert "worker a: is back" in said and not run.others(alone)

    def test_a_worker_that_joins_late_shares_the_work(self, dask, alone, run):
        dask.make_ready("a")
        dask.change("a", SLOW)
        run.at_count(1, lambda: dask.start("c"))
        began = time.monotonic()
        run.start(dask.address)
        run.require_as_counted()
        assert not run.others(alone)
        assert time.monotonic() - began < 60

    def test_killed_clients_workers_and_schedulers_in_turn(self, dask, alone, run):
        """A client that is killed leaves attempts; the workers of a scheduler that is killed leave with it."""
        dask.make_ready("a", "b")
        for name in "ab":
            dask.change(name, SLOW)
        for number in (2, 5):
            words = [sys.executable, "-m", "dimefm", "cache-teacher", run.config, "--scheduler", dask.address]
            client = subprocess.Popen(words, stderr=subprocess.DEVNULL)
            wait_until(lambda at=number: len([*read_records(run.layout)]) >= at, "no shard is counted")
            client.kill()
            client.wait()
        run.at_count(1, lambda: dask.send("a", signal.SIGKILL))
        dask.start("d")
        run.start(dask.address)
        assert not run.others(alone) and not run.partials() and verify(run.layout.root)["sound"]
