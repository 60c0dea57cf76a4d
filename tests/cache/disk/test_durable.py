"""Files that are either old or new, a journal that survives a torn line, one writer, plans that say what differs."""

import errno
import multiprocessing
import os
import signal

import pytest

from dimefm.cache.disk.durable import (
    append_line,
    attempt_bytes,
    read_lines,
    replacing,
    sweep_partials,
    write_bytes,
    write_json,
)
from dimefm.cache.disk.layout import Layout
from dimefm.cache.errors import CacheError
from dimefm.cache.version.journal import Journal, ShardRecord
from dimefm.cache.version.lock import writer_lock
from dimefm.cache.version.plan_file import first_difference, require_same
from dimefm.cache.version.schema import Manifest


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "value"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_bytes(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "value"
    write_bytes(path, b"old")

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CacheError, match="No space") as caught:
        write_bytes(path, b"new")
    assert str(path) in str(caught.value) and "free some space" in str(caught.value)
    with pytest.raises(CacheError, match="No space") as caught:
        append_line(tmp_path / "lines", {})
    assert str(tmp_path / "lines") in str(caught.value)
    assert path.read_bytes() == b"old"


def test_partials_of_a_killed_writer_are_swept(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".0.abc.partial").write_bytes(b"half")
    (tmp_path / "deep" / "0").write_bytes(b"whole")
    sweep_partials(tmp_path)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["0"]


def test_an_attempt_counts_when_it_is_committed_and_only_as_it_was_written(tmp_path):
    first, second = attempt_bytes(tmp_path / "0", b"first"), attempt_bytes(tmp_path / "0", b"other")
    assert not (tmp_path / "0").exists() and first.partial != second.partial
    first.require_sound()
    first.commit()
    assert (tmp_path / "0").read_bytes() == b"first"
    second.partial.write_bytes(b"othes")
    with pytest.raises(CacheError, match="other bytes than its writer says"):
        second.require_sound()
    second.partial.write_bytes(b"oth")
    with pytest.raises(CacheError, match="3 are there, wanted 5"):
        second.require_sound()
    sweep_partials(tmp_path)
    with pytest.raises(CacheError, match="is not there"):
        second.require_sound()
    with pytest.raises(CacheError, match="cannot be written"):
        second.commit()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_equal_documents_are_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": [2]})
    write_json(tmp_path / "b", {"y": [2], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_json_number_is_refused_and_nothing_is_written(tmp_path, number):
    write_json(tmp_path / "document", {"loss": 1.0})
    append_line(tmp_path / "lines", {"loss": 1.0})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "document", {"a": [{"loss": number}]})
    with pytest.raises(ValueError, match="JSON"):
        append_line(tmp_path / "lines", {"loss": number})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_torn_line_is_dropped_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "journal"
    append_line(path, {"shard": 0})
    with path.open("ab") as file:
        file.write(b'{"shard": 1, "dig')
    assert list(read_lines(path)) == [{"shard": 0}]
    append_line(path, {"shard": 2})
    assert list(read_lines(path)) == [{"shard": 0}, {"shard": 2}]


def test_the_journal_remembers_shards_with_their_failures(tmp_path):
    layout = Layout(tmp_path)
    Journal(layout).add(ShardRecord("images/embedding", 3, 8, "ab", ((5, "truncated"),)), {"infer": 1.0})
    again = Journal(layout)
    assert again.has("images/embedding", 3, 8) and not again.has("images/embedding", 2, 8)
    assert not again.has("images/embedding", 3, 7)  # it has grown since
    assert again.of("images/embedding")[0].failures == ((5, "truncated"),)


def _hold(root, ready, leave):
    with writer_lock(Layout(root)):
        ready.set()
        leave.wait()


def test_a_second_writer_is_refused_by_name_and_a_dead_one_does_not_block(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, leave))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(CacheError, match=f'"pid": {holder.pid}'), writer_lock(Layout(tmp_path)):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with writer_lock(Layout(tmp_path)):
        pass


def test_a_disk_without_locks_is_not_taken_for_another_writer(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(CacheError, match="gives no locks"), writer_lock(Layout(tmp_path)):
        pass


def test_the_first_difference_is_named_with_both_values(tmp_path):
    assert first_difference({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 2}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {}}) == ("a.b", 1, "nothing")
    with pytest.raises(CacheError, match=r"teacher\.model = ViT-L-14, but this run asks for ViT-B-32"):
        require_same(tmp_path, {"teacher": {"model": "ViT-L-14"}}, {"teacher": {"model": "ViT-B-32"}})


@pytest.mark.parametrize(
    ("text", "says"), [("{", "not a JSON"), ("[]", "says no format"), ('{"format": 99}', "update dimefm")]
)
def test_a_cut_foreign_or_newer_document_is_refused(tmp_path, text, says):
    with pytest.raises(CacheError, match=says):
        Manifest.parse(tmp_path / "manifest.json", text.encode())
