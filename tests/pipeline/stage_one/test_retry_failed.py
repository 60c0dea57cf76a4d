"""`cache-teacher --retry-failed`: failed rows get their embedding once their files are mended; nothing else changes."""

import json
import os
import re
import shutil
from contextlib import suppress

import numpy as np
import pytest

from dimefm.cache import FeatureCache
from dimefm.cache.disk.layout import Layout
from dimefm.cache.disk.row_tables import RowTable
from dimefm.cache.version.journal import Journal, ShardRecord
from dimefm.cache.version.manifest import read_manifest
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.plan import describe_plan

from ...support.commands import refused, run_dimefm, tree
from ...support.growing import add_images
from ...support.worlds import make_world

BAD = ["images/0/003.jpg", "images/1/004.jpg", "images/2/011.jpg", "dev/c_red/1.png"]
SHARED = ("teacher.zarr", "pairs", "index", "pixels")


def world_of(folder, teacher, *keys):
    """A world of 12 images; more keys of `[cache]`."""
    config = make_world(folder, teacher, num_images=12, num_sentences=7)
    text = config.read_text().replace('source = "images/"', 'source = "images/"\nmax_failed = 0.5')
    config.write_text(text.replace('dir = "cache"', "\n".join(['dir = "cache"', *keys])))
    return config


def spoil(config, names=tuple(BAD)):
    """Cut files; returns what puts them back."""
    there = {name: (config.parent / name).read_bytes() for name in names}
    for name, data in there.items():
        (config.parent / name).write_bytes(data[: len(data) // 2])

    def mend():
        for name, data in there.items():
            (config.parent / name).write_bytes(data)

    return mend


def content(root):
    """Digests of what is in force, by name; of pairs and indexes without the number of the version."""
    files = read_manifest(Layout(root)).files
    assert {name: tree(root)[name] for name in files} == {name: entry.digest for name, entry in files.items()}
    return {re.sub(r"-\d+\b", "", name): entry.digest for name, entry in files.items() if name.startswith(SHARED)}


@pytest.fixture(scope="module", params=["", 'pixels = "jpeg-24"\nviews = 2'], ids=["plain", "pixels and views"])
def sound(request, tmp_path_factory, tiny_teacher):
    """(keys of [cache], digests of the cache) of a world in which nothing ever failed."""
    config = world_of(tmp_path_factory.mktemp("sound"), tiny_teacher, request.param)
    cache_teacher(load_config(config))
    return request.param, content(config.parent / "cache")


def test_an_unfinished_cache_names_its_failures_and_embeds_their_shards_again(sound, tmp_path, tiny_teacher, capsys):
    keys, wanted = sound
    config = world_of(tmp_path, tiny_teacher, keys)
    config.write_text(config.read_text().replace("max_failed = 0.5", "max_failed = 0.01"))
    root, mend = tmp_path / "cache", spoil(config)
    for _ in range(2):
        line = refused(capsys, "cache-teacher", config)
    assert "have no embedding" in line and "x truncated): '" in line
    assert f"`dimefm cache inspect {root} --failed` lists them" in line and "--retry-failed" in line
    assert "delete" not in line
    listed = run_dimefm(capsys, "cache", "inspect", root, "--failed").out.splitlines()
    assert set(listed) <= {
        f"images\t{row}\t{name}\ttruncated" for row, name in ((1, "0/003.jpg"), (5, "1/004.jpg"))
    } | {"images\t11\t2/011.jpg\ttruncated"}
    assert listed
    assert f"{root}: unfinished; " in run_dimefm(capsys, "cache", "inspect", root).out
    mend()
    assert "have no embedding" in refused(capsys, "cache-teacher", config)
    assert run_dimefm(capsys, "cache-teacher", config, "--retry-failed").code == 0
    assert content(root) == wanted
    assert describe_plan(load_config(config))["notes"] == []
    assert run_dimefm(capsys, "cache", "inspect", root, "--failed").out.strip() == ""


def test_a_finished_cache_gets_a_version_with_these_rows_and_the_bytes_of_one_that_never_failed(
    sound, tmp_path, tiny_teacher, capsys
):
    keys, wanted = sound
    config = world_of(tmp_path, tiny_teacher, keys)
    root, mend = tmp_path / "cache", spoil(config)
    cache_teacher(load_config(config))
    (tmp_path / "keep.txt").write_text("0\n1\n2\n")
    assert run_dimefm(capsys, "cache", "mask", root, "few", "--keep", tmp_path / "keep.txt").code == 0
    reader = FeatureCache.open(root)
    before, ids = reader.images.embeddings[:].copy(), reader.pairs("image_to_sentence").ids[:].copy()
    version = reader.manifest.version
    mend()
    done = run_dimefm(capsys, "cache-teacher", config, "--retry-failed")
    assert done.code == 0 and any("4 of 4 have an embedding now" in line for line in done.lines), done.lines
    assert content(root) == wanted
    assert np.array_equal(reader.images.embeddings[:], before, equal_nan=True)
    assert np.array_equal(reader.pairs("image_to_sentence").ids[:], ids)
    cache = FeatureCache.open(root)
    assert cache.manifest.version == version + 1 and len(cache.images.usable) == 12
    assert [cache.manifest.arrays[name].failed for name in sorted(cache.manifest.arrays)] == [0, 0, 0]
    assert cache.masked(images="few").images.usable.tolist() == [0, 1, 2]
    assert run_dimefm(capsys, "cache", "verify", root).code == 0
    assert describe_plan(load_config(config))["notes"] == []
    assert not (root / "next").exists()
    whole = tree(root)
    again = run_dimefm(capsys, "cache-teacher", config, "--retry-failed")
    assert again.code == 0 and any("no failed row can be tried again" in line for line in again.lines)
    assert tree(root) == whole


def test_rows_that_fail_again_stay_as_they_are(tmp_path, tiny_teacher, capsys):
    config = world_of(tmp_path, tiny_teacher)
    root = tmp_path / "cache"
    mend_one, _ = spoil(config, BAD[:1]), spoil(config, BAD[1:])
    cache_teacher(load_config(config))
    whole = tree(root)
    done = run_dimefm(capsys, "cache-teacher", config, "--retry-failed")
    assert done.code == 0 and any("0 of 4 have an embedding now" in line for line in done.lines)
    assert tree(root) == whole
    mend_one()
    assert run_dimefm(capsys, "cache-teacher", config, "--retry-failed").code == 0
    now = tree(root)
    changed = {name for name in whole if name.startswith("teacher.zarr") and now[name] != whole[name]}
    assert changed == {"teacher.zarr/images/embedding/c/0/0"}
    assert now["rows/evaluate/dev.parquet"] == whole["rows/evaluate/dev.parquet"]
    table = RowTable(root / "rows/images.parquet")
    assert [row for row, status in enumerate(table.column("status").to_pylist()) if status != "ok"] == [
        row for row, name in enumerate(table.column("source").to_pylist()) if name in ("1/004.jpg", "2/011.jpg")
    ]
    assert run_dimefm(capsys, "cache", "verify", root).code == 0


def test_a_link_that_led_nowhere_when_it_was_listed_is_looked_at_again(tmp_path, tiny_teacher, capsys):
    config = world_of(tmp_path, tiny_teacher)
    link = tmp_path / "images/0/link.jpg"
    link.symlink_to(tmp_path / "later.jpg")
    cache_teacher(load_config(config))
    failed = run_dimefm(capsys, "cache", "inspect", tmp_path / "cache", "--failed").out
    assert failed.splitlines() == ["images\t4\t0/link.jpg\tbroken link"]
    shutil.copy(tmp_path / "images/0/000.jpg", tmp_path / "later.jpg")
    assert run_dimefm(capsys, "cache-teacher", config, "--retry-failed").code == 0
    images = FeatureCache.open(tmp_path / "cache").images
    assert np.array_equal(images.embeddings[[0]], images.embeddings[[4]])
    assert images.rows.take([4], "bytes") == [(tmp_path / "later.jpg").stat().st_size]
    assert run_dimefm(capsys, "cache", "verify", tmp_path / "cache", "--sources").code == 0


def test_a_cache_that_shares_rows_retries_for_itself(tmp_path, tiny_teacher, capsys):
    config = world_of(tmp_path, tiny_teacher)
    mend = spoil(config)
    cache_teacher(load_config(config))
    other = tmp_path / "other.toml"
    text = config.read_text().replace('dir = "cache"', 'dir = "other"\nrows = "cache"')
    other.write_text(text.replace("batch_size = 4", "batch_size = 2"))
    cache_teacher(load_config(other))
    mend()
    done = run_dimefm(capsys, "cache-teacher", other, "--retry-failed")
    assert done.code == 0 and any("no failed row can be tried again" in line for line in done.lines)
    assert run_dimefm(capsys, "cache-teacher", config, "--retry-failed").code == 0
    for name in ("cache", "other"):  # rows that are good there by now have no embedding here, and are known to
        assert run_dimefm(capsys, "cache", "verify", tmp_path / name).code == 0, name
    assert len(FeatureCache.open(tmp_path / "other").images.usable) == 9
    assert run_dimefm(capsys, "cache-teacher", other, "--retry-failed").code == 0
    assert run_dimefm(capsys, "cache", "verify", tmp_path / "other").code == 0
    assert len(FeatureCache.open(tmp_path / "other").images.usable) == 12


def test_an_append_with_too_many_failures_goes_on_once_they_are_mended(tmp_path, tiny_teacher, capsys):
    config = world_of(tmp_path, tiny_teacher)
    old = spoil(config, BAD[:1])
    cache_teacher(load_config(config))
    old()
    config.write_text(config.read_text().replace("max_failed = 0.5", "max_failed = 0.1"))
    names = ["9/a.jpg", "9/b.jpg", "9/c.jpg"]
    add_images(tmp_path, names)
    mend = spoil(config, [f"images/{name}" for name in names[:2]])
    line = refused(capsys, "cache", "append", tmp_path / "cache", "--config", config)
    assert "3 images have no embedding" in line and "'0/003.jpg', '9/a.jpg', '9/b.jpg'" in line
    mend()
    done = run_dimefm(capsys, "cache-teacher", config, "--retry-failed")
    assert done.code == 0 and any("an append is under way" in line for line in done.lines), done.lines
    assert run_dimefm(capsys, "cache", "append", tmp_path / "cache", "--config", config).code == 0
    images = FeatureCache.open(tmp_path / "cache").images
    assert len(images) == 15 and np.setdiff1d(np.arange(15), images.usable).tolist() == [1]  # a row of before waits
    assert run_dimefm(capsys, "cache-teacher", config, "--retry-failed").code == 0
    assert len(FeatureCache.open(tmp_path / "cache").images.usable) == 15
    assert run_dimefm(capsys, "cache", "verify", tmp_path / "cache").code == 0


class Crash(BaseException):
    """The machine stopped here."""


def retry(config, monkeypatch, crash_at=None):
    """Retry, and crash before a file is moved into its place; returns how many were moved."""
    replace, moves = os.replace, []

    def counted(source, target):
        if len(moves) == crash_at:
            raise Crash
        moves.append(target)
        replace(source, target)

    with monkeypatch.context() as patched, suppress(Crash):
        patched.setattr(os, "replace", counted)
        cache_teacher(load_config(config), retry=True)
    return len(moves)


def test_a_retry_that_is_killed_leaves_a_sound_cache_and_ends_the_same_when_it_is_repeated(
    tmp_path, tiny_teacher, capsys, monkeypatch
):
    config = world_of(tmp_path / "world", tiny_teacher)
    mend = spoil(config, BAD[:1])
    cache_teacher(load_config(config))
    mend()
    root = config.parent / "cache"
    shutil.copytree(root, tmp_path / "before", copy_function=shutil.copy2)
    num_moves, wanted = retry(config, monkeypatch), tree(root)
    for crash_at in (0, 3, *range(num_moves - 8, num_moves)):
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "before", root, copy_function=shutil.copy2)
        assert retry(config, monkeypatch, crash_at) == crash_at
        assert run_dimefm(capsys, "cache", "verify", root).code == 0, crash_at
        retry(config, monkeypatch)
        assert tree(root) == wanted, crash_at


def test_a_journal_forgets_shards_on_disk_in_one_step(tmp_path):
    layout = Layout(tmp_path)
    journal = Journal(layout)
    for shard in range(3):
        journal.add(ShardRecord("a", shard, 4, "d", ((1, "truncated"),) if shard == 1 else ()), {})
    journal.add(ShardRecord("b", 1, 4, "d"), {})
    journal.drop({("a", 1)})
    assert not journal.has("a", 1, 4)
    lines = [json.loads(line) for line in layout.journal.read_text().splitlines()]
    assert [(line["array"], line["shard"]) for line in lines] == [("a", 0), ("a", 2), ("b", 1)]
    assert sorted((record.array, record.shard) for record in Journal(layout)) == [("a", 0), ("a", 2), ("b", 1)]
