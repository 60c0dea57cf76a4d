"""Who of a cluster's workers is used, on which GPU, and what is said of the others. What Dask would say is played.

Times are those of a clock that the test winds.
"""

import re
from types import SimpleNamespace

import pytest
import torch

from dimefm.cache import InputError
from dimefm.pipeline.stage_one.cluster import crew as crew_module
from dimefm.pipeline.stage_one.cluster import worker_side
from dimefm.pipeline.stage_one.cluster.connection import Seen
from dimefm.pipeline.stage_one.cluster.crew import Crew
from dimefm.stages.settings.cluster import ClusterSettings


class Played:
    """A connection whose workers the test plays."""

    scheduler, is_up = "tcp://here", True

    def __init__(self):
        self.seen, self.begun = {}, []

    def look(self):
        return None if self.seen is None else dict(self.seen)

    def submit(self, worker, function, *arguments):
        self.begun.append(SimpleNamespace(worker=worker, function=function, arguments=arguments))
        return self.begun[-1]

    def result(self, future):
        return future.function(*future.arguments) if future.function is worker_side.introduce else future


class Accepting:
    """A trial that everybody passes, or one that is refused by name."""

    task = None

    def __init__(self, refused=()):
        self.refused = refused

    def require_versions(self, introduction):
        pass

    def judge(self, introduction, tried):
        if tried.worker in self.refused:
            raise InputError("it sees nothing")


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(crew_module.time, "monotonic", lambda: now.seconds)
    return now


def make(limits=None, refused=(), device="cpu"):
    connection = Played()
    return connection, Crew(connection, Accepting(refused), limits or ClusterSettings(), device)


def join(connection, crew, clock, *names, seconds=1.0):
    """Workers send a sign of life, new ones join, and every trial that was begun ends."""
    clock.seconds += seconds
    for name in names:
        connection.seen[name] = Seen(name, clock.seconds)
    gone = crew.look()
    while connection.begun:
        assert crew.take(connection.begun.pop(0))
    return gone


def devices(crew):
    return {worker.address: worker.device for worker in crew.usable()}


def test_each_worker_of_a_host_is_dealt_a_gpu_of_its_own(clock, monkeypatch):
    """Two hosts with two GPUs each; the hosts' names are those of the workers up to the dash."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    connection, crew = make(device="auto")
    submit = connection.submit
    played = {}

    def on_its_host(worker, function, *arguments):
        played["host"] = worker.partition("-")[0]
        return submit(worker, function, *arguments)

    result = connection.result

    def from_its_host(future):
        monkeypatch.setattr(worker_side.socket, "gethostname", lambda: future.worker.partition("-")[0])
        return result(future)

    connection.submit, connection.result = on_its_host, from_its_host
    join(connection, crew, clock, "x-1", "x-0", "y-0", "y-1")
    assert devices(crew) == {"x-0": "cuda:0", "x-1": "cuda:1", "y-0": "cuda:0", "y-1": "cuda:1"}
    del connection.seen["x-0"]
    assert [worker.address for worker in join(connection, crew, clock, "x-1", "y-0", "y-1")] == ["x-0"]
    join(connection, crew, clock, "x-2", "x-1")
    assert devices(crew)["x-2"] == "cuda:0"  # the one that is free again


def test_a_worker_that_was_given_its_gpu_keeps_it(clock, monkeypatch):
    """As dask-cuda does: each worker sees all of them, its own first; or its own alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(worker_side.gpu_names.visible.split(",")))

    def names():
        return names.visible.split(",")

    monkeypatch.setattr(worker_side, "gpu_names", names)
    connection, crew = make(device="auto")
    for name, names.visible in (("b", "1,2,0"), ("a", "0,1,2"), ("c", "2,0,1"), ("d", "5")):
        join(connection, crew, clock, name)
    assert devices(crew) == dict.fromkeys("abcd", "cuda:0")


def test_silence_is_counted_by_this_machine_and_ends_with_a_sign_of_life(clock, capsys):
    connection, crew = make(ClusterSettings(heartbeat_timeout=30))
    join(connection, crew, clock, "a", "b")
    for _ in range(31):
        join(connection, crew, clock, "a")
    assert [*devices(crew)] == ["a"]
    said = capsys.readouterr().err
    assert re.search("^worker b: no sign of life for 3[01] s; it gets no shards until it is back$", said, re.MULTILINE)
    join(connection, crew, clock, "a", "b")
    assert [*devices(crew)] == ["a", "b"] and capsys.readouterr().err == "worker b: is back\n"


def test_a_client_that_was_itself_stopped_takes_nobody_for_silent(clock, capsys):
    connection, crew = make()
    join(connection, crew, clock, "a")
    clock.seconds += 600
    crew.look()
    assert [*devices(crew)] == ["a"] and not capsys.readouterr().err


def test_a_worker_that_its_memory_limit_has_paused_is_not_waited_for(clock, capsys):
    connection, crew = make()
    join(connection, crew, clock, "a")
    for _ in range(31):
        clock.seconds += 1
        connection.seen["a"] = Seen("a", clock.seconds, "paused")
        crew.look()
    assert not devices(crew) and "worker a: paused for 3" in capsys.readouterr().err


def test_what_is_waited_for_is_said_within_a_minute_and_again_and_has_an_end(clock, capsys):
    connection, crew = make(ClusterSettings(worker_timeout=100))
    for _ in range(60):
        join(connection, crew, clock)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "waiting for a worker: none is there; start some with `dask worker tcp://here`" in said[0]
    join(connection, crew, clock, "a")
    assert [*devices(crew)] == ["a"]
    for _ in range(100):
        join(connection, crew, clock)
    assert "waiting for a worker: worker a has given no sign of life for 3" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"for 101 s no worker .*worker a has given .*run the same again"):
        for _ in range(60):
            join(connection, crew, clock)


def test_where_everybody_is_refused_others_may_join_for_a_moment(clock, capsys):
    connection, crew = make(refused=["a", "b"])
    join(connection, crew, clock, "a", "b")
    for _ in range(9):
        join(connection, crew, clock, "a", "b")
    join(connection, crew, clock, "a", "b", "c")
    assert [*devices(crew)] == ["c"]
    for _ in range(60):  # they are refused once
        join(connection, crew, clock, "a", "b", "c")
    said = capsys.readouterr().err
    assert [said.count(f"worker {name}: not used: it sees nothing\n") for name in "abc"] == [1, 1, 0]
    connection, crew = make(refused=["a"])
    with pytest.raises(InputError, match="none of its 1 workers can be used: worker a: it sees nothing"):
        for _ in range(12):
            join(connection, crew, clock, "a")


def test_a_worker_that_lacks_what_others_find_is_tried_again_and_after_three_shards_refused(clock, capsys):
    connection, crew = make()
    join(connection, crew, clock, "a", "b")
    for lacking in (1, 2, 3):
        crew.lacked(crew.workers["b"], "images of shard 5")
        assert [*devices(crew)] == ["a"]
        join(connection, crew, clock, "a", "b")
        assert [*devices(crew)] == ["a"] if lacking == 3 else ["a", "b"]
    assert capsys.readouterr().err.count("worker b: did not find images of shard 5, which another worker found") == 3
