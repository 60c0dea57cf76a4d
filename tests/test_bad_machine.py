"""A cache or a machine in a bad state: one line and exit code 1, and what was good before is good after."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
import torch

from dimefm.cache import FeatureCache
from dimefm.cache.disk.durable import digest, write_json
from dimefm.cache.errors import os_advice
from dimefm.cache.version.manifest import digest_lines
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher as Teacher

from .support.commands import refused, run_dimefm, tree
from .support.worlds import make_world


@pytest.fixture
def fresh(tmp_path, tiny_teacher) -> Path:
    return make_world(tmp_path, tiny_teacher, num_images=12, num_sentences=14)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher) -> Path:
    """The same world with its stage one behind it; nobody changes it."""
    config = make_world(tmp_path_factory.mktemp("whole"), tiny_teacher, num_images=12, num_sentences=14)
    cache_teacher(load_config(config))
    return config


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "world", copy_function=shutil.copy2)
    return tmp_path / "world" / "run.toml"


# The cache itself.


COMMANDS = [
    ["cache-teacher", "run.toml"],
    ["distill", "run.toml"],
    ["plan", "run.toml"],
    ["cache", "inspect", "cache"],
    ["cache", "verify", "cache"],
    ["cache", "repair", "cache"],
    ["cache", "append", "cache"],
    ["cache", "duplicates", "cache", "--threshold", "0.9", "--mask", "clean"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize("vouched", ["in this format's way", "in another way"])
def test_a_cache_of_a_newer_format_is_one_line_and_stays_as_it_is(copy, capfd, words, vouched):
    path = copy.parent / "cache/manifest.json"
    write_json(path, {**json.loads(path.read_bytes()), "format": 99})
    lines = digest_lines([digest(path.read_bytes())]) if vouched == "in this format's way" else b"sha256 of something\n"
    path.with_suffix(".xxh3").write_bytes(lines)
    before = tree(copy.parent / "cache")
    line = refused(
        capfd, *(copy.parent / word if word in ("cache", "run.toml") and i else word for i, word in enumerate(words))
    )
    assert "format 99" in line and "update dimefm" in line
    assert tree(copy.parent / "cache") == before


@pytest.mark.parametrize("words", COMMANDS[:3], ids=lambda words: words[0])
def test_an_unfinished_cache_of_a_newer_format_is_one_line_and_stays_as_it_is(copy, capfd, words):
    path = copy.parent / "cache/plan.json"
    write_json(path, {**json.loads(path.read_bytes()), "format": 99})
    for name in ("manifest.json", "manifest.xxh3"):
        (copy.parent / "cache" / name).unlink()
    before = tree(copy.parent / "cache")
    line = refused(capfd, words[0], copy)
    assert "unfinished" in line if words[0] == "distill" else "format 99" in line and "update dimefm" in line
    assert tree(copy.parent / "cache") == before


def test_a_manifest_edited_by_hand_is_one_line_and_stays_as_it_is_until_it_is_repaired(copy, capfd):
    path = copy.parent / "cache/manifest.json"
    sound = tree(copy.parent / "cache")
    path.write_text(path.read_text().replace('"rows": 12', '"rows": 11'))
    before = tree(copy.parent / "cache")
    for words in (["cache", "inspect", copy.parent / "cache"], ["cache-teacher", copy], ["distill", copy]):
        assert "checksum differs" in refused(capfd, *words)
    done = run_dimefm(capfd, "cache", "verify", copy.parent / "cache")
    assert done.code == 1 and "manifest.json: its checksum differs: cut or edited" in done.out
    assert tree(copy.parent / "cache") == before
    assert run_dimefm(capfd, "cache", "repair", copy.parent / "cache").code == 0
    assert tree(copy.parent / "cache") == sound


@contextmanager
def without_privileges() -> Iterator[None]:
    """Files are opened as by a user without rights: root would be let through anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(finished) -> Iterator[Path]:
    """A copy of the finished world that nobody may write to, in a folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(finished.parent, folder / "world", copy_function=shutil.copy2)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder / "world/run.toml"
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_cache_that_may_only_be_read_is_read(read_only, capfd):
    before = tree(read_only.parent / "cache")
    with without_privileges():
        for words in (
            ["cache", "inspect", read_only.parent / "cache"],
            ["cache", "verify", read_only.parent / "cache", "--sources", "--config", read_only],
            ["cache", "duplicates", read_only.parent / "cache", "--threshold", "0.9"],
            ["plan", read_only],
            ["cache-teacher", read_only],
        ):
            done = run_dimefm(capfd, *words)
            assert done.code == 0, done.lines
    assert tree(read_only.parent / "cache") == before


def test_writing_to_a_cache_that_may_only_be_read_is_one_line(read_only, capfd):
    before = tree(read_only.parent / "cache")
    folder = read_only.parent / "cache"
    with without_privileges():
        line = refused(capfd, "cache", "duplicates", folder, "--threshold", "0.9", "--mask", "clean")
        assert str(folder) in line and "Permission denied" in line
    read_only.chmod(0o644)
    read_only.write_text(read_only.read_text().replace("k = 3", "k = 4"))
    with without_privileges():
        assert "Permission denied" in refused(capfd, "cache-teacher", read_only)
    assert tree(folder) == before


# The machine.


def test_a_disk_that_fills_up_at_any_moment_is_one_line_and_the_next_run_ends_the_same(fresh, capfd, monkeypatch):
    fsync, calls, fails_at, lock = os.fsync, 0, -1, Lock()

    def counted(handle: int) -> None:
        nonlocal calls
        with lock:  # two shards are written side by side
            calls += 1
            full = calls == fails_at
        if full:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counted)
    root = fresh.parent / "cache"
    assert run_dimefm(capfd, "cache-teacher", fresh).code == 0
    wanted = tree(root)
    for moment in np.linspace(1, calls, 7).astype(int):
        shutil.rmtree(root)
        calls, fails_at = 0, moment
        line = refused(capfd, "cache-teacher", fresh)
        assert "No space left on device" in line and "free some space" in line
        assert not list(root.rglob("*.partial"))
        chunks = {name: value for name, value in tree(root).items() if "/c/" in name}
        assert chunks.items() <= wanted.items()
        fails_at = -1
        assert run_dimefm(capfd, "cache-teacher", fresh).code == 0
        assert tree(root) == wanted


def test_files_that_may_not_grow_are_one_line_whichever_library_writes_them(fresh, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (200, 700, 3_000, 100_000):  # a chunk, a table, an index, the text tower
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            done = run_dimefm(capsys, "cache-teacher", fresh)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert done.code == 1 and done.lines[-1].startswith("error: "), done.lines
        assert not list((fresh.parent / "cache").rglob("*.partial"))


def test_too_few_file_handles_for_a_cache_are_one_line(tmp_path, tiny_teacher):
    config = make_world(tmp_path, tiny_teacher, num_images=40, num_sentences=40)
    config.write_text(config.read_text().replace("shard_rows = 4", "shard_rows = 1").replace("k = 3", "k = 0"))
    cache_teacher(load_config(config))
    program = (
        "import resource; from dimefm.cache.reader import feature_cache\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))\n"
        "from dimefm.cli import main; main()"
    )
    words = [sys.executable, "-c", program, "cache", "inspect", str(tmp_path / "cache")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "ulimit -n" in done.stderr


def test_too_few_file_handles_do_not_mark_good_images_as_bad(fresh, capfd, monkeypatch):
    read_bytes = Path.read_bytes

    def no_handle(path: Path) -> bytes:
        if path.name == "009.jpg":
            raise OSError(24, "Too many open files", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", no_handle)
    assert "ulimit -n" in refused(capfd, "cache-teacher", fresh)
    monkeypatch.undo()
    assert run_dimefm(capfd, "cache-teacher", fresh).code == 0
    assert len(FeatureCache.open(fresh.parent / "cache").images.usable) == 12


def no_memory(*arguments: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 10 GiB")


def no_host_memory(*arguments: object, **options: object) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize("full", [no_memory, no_host_memory])
def test_a_device_out_of_memory_in_stage_one_names_the_batch_size(fresh, capfd, monkeypatch, full):
    encode = Teacher.encode_images

    def full_from_two_on(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
        return encode(teacher, images) if len(images) < 2 else full()

    monkeypatch.setattr(Teacher, "encode_images", full_from_two_on)
    line = refused(capfd, "cache-teacher", fresh)
    assert "teacher.batch_size = 4" in line and "lower it" in line
    monkeypatch.undo()
    assert run_dimefm(capfd, "cache-teacher", fresh).code == 0


def test_a_teacher_that_does_not_fit_into_memory_names_itself(fresh, capfd, monkeypatch):
    monkeypatch.setattr(Teacher, "encode_images", no_memory)
    assert "tiny.json: does not fit into the memory of cpu" in refused(capfd, "cache-teacher", fresh)


def test_a_device_out_of_memory_in_stage_two_names_the_settings_and_keeps_the_checkpoint(copy, capfd, monkeypatch):
    assert run_dimefm(capfd, "distill", copy, "--student", "small", "--steps", "1").code == 0
    before = tree(copy.parent / "runs")
    monkeypatch.setattr("dimefm.stages.train.tower.loss_terms", no_memory)
    line = refused(capfd, "distill", copy, "--student", "small")
    assert "student.small" in line and "distill.batch_images = 8" in line and "lower" in line
    kept = {name: value for name, value in tree(copy.parent / "runs").items() if "tensorboard" not in name}
    assert kept.items() <= before.items()


def test_a_full_machine_is_one_line(copy, capfd, monkeypatch):
    def full(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("dimefm.cache.audit.inspect.unit_rows", full)
    assert "memory of this machine is full" in refused(capfd, "cache", "inspect", copy.parent / "cache")


def test_what_is_no_fault_of_the_machine_keeps_its_traceback(copy, capfd, monkeypatch):
    def broken(*arguments: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("dimefm.cache.audit.inspect.unit_rows", broken)
    with pytest.raises(OSError, match="Bad file descriptor"):
        run_dimefm(capfd, "cache", "inspect", copy.parent / "cache")
    assert os_advice(OSError(9, "Bad file descriptor")) is None
    assert os_advice(PermissionError(13, "Permission denied", "/x")) == (
        "/x: Permission denied; wanted the right to read or write it"
    )
