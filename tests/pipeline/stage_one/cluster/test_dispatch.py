"""Who gets a shard that some worker could not do: Dask and the workers are stand-ins."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from dimefm.pipeline.stage_one.cluster.crew import Crew, Worker
from dimefm.pipeline.stage_one.cluster.dispatch import Dispatch


class Task(Future):
    def release(self):
        """As Dask's."""


class Connection:
    """Everything that is submitted has ended at once; `results` says how, by worker."""

    scheduler, is_up = "tcp://there", True

    def __init__(self, results):
        self.results, self.ended, self.asked = results, [], []

    def submit(self, address, function, *arguments):
        future = Task()
        future.address = address
        self.asked.append(address)
        self.ended.append(future)
        return future

    def next_ended(self, seconds):
        assert self.ended, "waits for nobody"
        return self.ended.pop(0)

    def result(self, future):
        found = self.results[future.address]
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(absent=found, require_sound=lambda: None, discard=lambda: None)

    def cancel(self, futures):
        self.ended = [future for future in self.ended if future not in futures]


class Everybody(Crew):
    """Workers that stay as they are."""

    def __init__(self, connection, *workers):
        self.workers, self._connection, self._is_reachable = {one.address: one for one in workers}, connection, True
        self.refused = []

    def look(self):
        return []

    def take(self, future):
        return False

    def lacked(self, worker, what):
        """Said elsewhere."""

    def refuse(self, worker, why):
        worker.state = "refused"
        self.refused.append((worker.name, why))


def run(results, *, in_trial=()):
    connection = Connection(results)
    names = [*results, *in_trial]
    workers = [Worker(name, name, 0.0, "tried" if name in in_trial else "good") for name in names]
    crew = Everybody(connection, *workers)
    task = SimpleNamespace(shard=0, array="images")
    done = list(Dispatch(connection, crew, [task], None, "weights", None).run())
    return done, connection.asked, crew.refused


def test_an_image_that_two_workers_lack_is_not_asked_of_a_third():
    (done,), asked, _ = run({f"w{i}": (3,) for i in range(32)})
    assert done.absent == (3,) and len(asked) == 2


@pytest.mark.parametrize("in_trial", [(), ("late",)])
def test_a_worker_that_hangs_in_its_trial_holds_no_shard_back(in_trial):
    (done,), asked, _ = run({"only": (3,)}, in_trial=in_trial)
    assert done.absent == (3,) and asked == ["only"]


def test_what_fails_on_one_worker_is_done_by_another():
    (done,), _, refused = run({"sick": RuntimeError("CUDA error:\n out of order"), "well": ()})
    assert done.absent == ()
    assert refused == [("sick", "RuntimeError: CUDA error: out of order")]
