"""Images that were listed and cannot be reached: their disk may be gone, and until that is known they do not fail."""

import itertools
import json
import os

import pytest

from dimefm.cache import FeatureCache, InputError
from dimefm.cache.disk.row_tables import RowTable
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.stages.images.decode import AbsentError
from dimefm.stages.inputs.image_folder import ImageFolder

from ...support.commands import tree
from ...support.worlds import make_world

NAMES = [f"{i % 3}/{i:03d}.jpg" for i in range(12)]
IN_ORDER = sorted(NAMES)  # shards of 4: 0/… | 1/… | 2/…


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_teacher):
    """A world of 12 images whose stage one was never disturbed."""
    config = make_world(tmp_path_factory.mktemp("whole"), tiny_teacher, num_images=12, num_sentences=6)
    cache_teacher(load_config(config))
    return config


@pytest.fixture
def world(whole, tmp_path, tiny_teacher):
    """The same world, its files of the same times, without a cache."""
    config = make_world(tmp_path / "world", tiny_teacher, num_images=12, num_sentences=6)
    for folder in ("images", "dev"):
        for path in (config.parent / folder).rglob("*.*"):
            twin = whole.parent / path.relative_to(config.parent)
            os.utime(path, ns=(0, twin.stat().st_mtime_ns))
    return config


class Disk:
    """A disk on which some images are not there, as far as stage one can see."""

    def __init__(self, monkeypatch):
        self.gone, self.reads = set(), {}
        self.after, self.count = None, itertools.count()
        read, disk = ImageFolder.read, self

        def watched(source, key):
            disk.reads[key] = disk.reads.get(key, 0) + 1
            if disk.after and next(disk.count) >= disk.after:
                disk.gone = set(NAMES)
            if key in disk.gone:
                raise AbsentError("gone")
            return read(source, key)

        monkeypatch.setattr(ImageFolder, "read", watched)


@pytest.fixture
def disk(monkeypatch):
    monkeypatch.setattr("dimefm.pipeline.stage_one.cache_teacher._check_teacher", lambda *arguments: None)
    return Disk(monkeypatch)


def failures(config):
    journal = config.parent / "cache/log/shards.jsonl"  # there once a shard counts
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [failure for line in lines for failure in json.loads(line)["failures"]]


def allow(config, share):
    config.write_text(config.read_text().replace('source = "images/"', f'source = "images/"\nmax_failed = {share}'))


def test_a_disk_that_goes_while_images_are_read_stops_the_run_which_goes_on_once_it_is_back(world, whole, disk):
    disk.after = 5
    with pytest.raises(InputError, match=r"images\.source: .* cannot be reached .*is the disk mounted\?"):
        cache_teacher(load_config(world))
    assert failures(world) == []
    with pytest.raises(InputError, match="is the disk mounted"):
        cache_teacher(load_config(world))
    disk.after, disk.gone = None, set()
    cache_teacher(load_config(world))
    assert tree(world.parent / "cache") == tree(whole.parent / "cache")


def test_even_one_absent_image_stops_the_run_where_those_that_were_read_before_are_absent_too(world, disk):
    (shard, *_) = disk.gone = {IN_ORDER[-1]}
    allow(world, 0.9)
    read = disk.reads

    def gone_by_then():  # the last image of the last shard is the first to fail, and then all are gone
        return set(NAMES) if read.get(shard) else {shard}

    type(disk).gone = property(lambda self: gone_by_then(), lambda self, value: None)
    try:
        with pytest.raises(InputError, match=r"'2/011\.jpg', nor can 11 of 11 others that were looked for"):
            cache_teacher(load_config(world))
    finally:
        del type(disk).gone
    assert failures(world) == []


def test_an_image_that_was_absent_twice_and_is_there_by_then_is_no_failure(world, whole, disk):
    (name, *_) = disk.gone = {IN_ORDER[-1]}
    type(disk).gone = property(lambda self: {name} if self.reads.get(name, 0) <= 2 else set(), lambda self, value: None)
    try:
        with pytest.raises(InputError, match=r"could not be reached twice are there now: '2/011\.jpg'"):
            cache_teacher(load_config(world))
    finally:
        del type(disk).gone
    assert failures(world) == []
    disk.gone = set()
    cache_teacher(load_config(world))
    assert tree(world.parent / "cache") == tree(whole.parent / "cache")


def test_a_labelled_set_whose_only_image_is_absent_stops_the_run(world, disk):
    (name, *others) = sorted(path.relative_to(world.parent / "dev") for path in (world.parent / "dev").rglob("*.*"))
    for other in others:
        (world.parent / "dev" / other).unlink()
    disk.gone = {name.as_posix()}
    with pytest.raises(InputError, match=r"evaluate\.dev\.images: .* cannot be reached .*is the disk mounted\?"):
        cache_teacher(load_config(world))


def test_a_shard_that_lacks_more_than_a_few_images_stops_the_run_until_they_are_back(world, whole, disk):
    disk.gone = {"1/004.jpg", "1/007.jpg"}
    with pytest.raises(InputError, match=r"2 images .*'1/004\.jpg', '1/007\.jpg', of 4 of their shard.*put them back"):
        cache_teacher(load_config(world))
    assert failures(world) == []
    disk.gone = set()
    cache_teacher(load_config(world))
    assert tree(world.parent / "cache") == tree(whole.parent / "cache")


def test_images_that_are_gone_for_good_become_failures_where_so_many_are_allowed(world, disk):
    disk.gone = {"1/004.jpg", "1/007.jpg"}
    allow(world, 0.5)
    cache_teacher(load_config(world))
    rows = RowTable(world.parent / "cache/rows/images.parquet")
    failed = dict(zip(rows.column("source").to_pylist(), rows.column("reason").to_pylist(), strict=True))
    assert {name: reason for name, reason in failed.items() if reason} == dict.fromkeys(disk.gone, "gone")
    assert len(FeatureCache.open(world.parent / "cache").images.usable) == 10


def test_a_single_image_that_is_absent_is_asked_for_again_at_the_end(world, whole, disk, capsys):
    disk.gone = {"0/003.jpg"}
    asked = disk.reads

    def until_asked_twice():
        return {"0/003.jpg"} if asked.get("0/003.jpg", 0) < 2 else set()

    type(disk).gone = property(lambda self: until_asked_twice(), lambda self, value: None)
    try:
        cache_teacher(load_config(world))
    finally:
        del type(disk).gone
    assert "some images of 1 shards could not be reached: these shards are tried once more" in capsys.readouterr().err
    assert tree(world.parent / "cache") == tree(whole.parent / "cache")


def test_a_single_image_that_stays_absent_counts_only_where_max_failed_allows_it(world, whole, disk):
    disk.gone = {"0/003.jpg"}
    with pytest.raises(InputError, match=r"1 images have no embedding \(1 x gone\): '0/003\.jpg'; more than"):
        cache_teacher(load_config(world))
    assert failures(world) == []  # one of twelve is more than 1 %: nothing that could be refused for ever
    disk.gone = set()
    cache_teacher(load_config(world))
    assert tree(world.parent / "cache") == tree(whole.parent / "cache")


def test_a_labelled_set_is_not_taken_for_deleted_either(world, disk):
    disk.gone = {"c_red/0.png", "c_red/1.png"}
    with pytest.raises(InputError, match=r"evaluate\.dev\.images: .*2 images .* cannot be reached"):
        cache_teacher(load_config(world))
    assert failures(world) == []
    disk.gone = set()
    cache_teacher(load_config(world))
    assert len(FeatureCache.open(world.parent / "cache").evaluate["dev"].images.usable) == 12
