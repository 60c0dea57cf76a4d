"""An append that was stopped: the cache stays as it was, and the append goes on. Killing it is test_kill.py's."""

import numpy as np
import pytest

import dimefm.cache.version.versions
import dimefm.pipeline.upkeep.append
import dimefm.stages.models.load_teacher
import dimefm.stages.models.open_clip_teacher
from dimefm.cache import CacheError, FeatureCache
from dimefm.cache.audit.verify import verify_cache
from dimefm.cache.disk.layout import Layout
from dimefm.cache.reader.masks import add_mask

from ...support.commands import tree
from ...support.growing import add_images, add_lines, edit, grow, stage_one


@pytest.fixture
def interrupted(config, monkeypatch):
    """An append that stopped when all was embedded and nothing was in force."""
    add_images(config.parent, ["9/0.png", "9/1.png", "9/2.png"])
    add_lines(config.parent, "new")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dimefm.pipeline.upkeep.append, "finish_cache", stop)
        with pytest.raises(KeyboardInterrupt):
            grow(config)
    return config


def test_until_it_is_decided_the_cache_is_the_old_one_byte_for_byte(interrupted, finished, no_teacher):
    wanted = tree(finished.parent / "cache")
    there = tree(interrupted.parent / "cache")
    assert {name: value for name, value in there.items() if not name.startswith("next/")} == wanted
    report = verify_cache(interrupted.parent / "cache")
    assert report.findings == [] and "next/" in report.notes[0]
    assert len(stage_one(interrupted).images) == 30
    cache = grow(interrupted)  # all shards are there: the teacher is not needed
    assert len(cache.images) == 33 and np.isfinite(cache.images.embeddings[:]).all()
    assert not (interrupted.parent / "cache/next").exists()


@pytest.mark.parametrize("moved", [0, 1, 20, 39])
def test_stopped_while_files_are_moved_into_place_the_old_rows_are_served_and_any_writer_finishes_it(
    interrupted, monkeypatch, moved
):
    root, left = interrupted.parent / "cache", moved
    before = FeatureCache.open(root)

    def move(source, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)

    with monkeypatch.context() as patched:
        patched.setattr(dimefm.cache.version.versions, "move_file", move)
        with pytest.raises(KeyboardInterrupt):
            grow(interrupted)
    between = FeatureCache.open(root)
    assert between.manifest == before.manifest
    assert np.array_equal(between.images.embeddings[:], before.images.embeddings[:])
    assert between.images.usable.tolist() == list(range(30)) and len(between.evaluate["dev"].labels) == 12
    report = verify_cache(root)
    assert report.findings == [] and "decided" in report.notes[0]
    add_mask(Layout(root), "sentences", "some", np.arange(23) < 9)  # of the new version's 23
    after = FeatureCache.open(root)
    assert len(after.images) == 33 and after.manifest.version == 3
    assert verify_cache(root).findings == [] and not (root / "next").exists()


def test_an_interrupted_append_goes_on_with_the_list_it_began_with(interrupted):
    add_images(interrupted.parent, ["9/later.png"])
    add_lines(interrupted.parent, "later")
    cache = grow(interrupted)
    assert len(cache.images) == 33 and len(cache.sentences) == 23
    cache = grow(interrupted)
    assert len(cache.images) == 34 and len(cache.sentences) == 24


def test_an_interrupted_append_whose_sources_have_changed_is_refused(interrupted):
    path = interrupted.parent / "captions.txt"
    path.write_text(path.read_text().replace("new", "changed"))
    with pytest.raises(CacheError, match=r"next: made from other lines: sentences\.source"):
        grow(interrupted)


def test_other_changes_of_the_cache_may_come_between(interrupted, no_teacher):
    """Another k makes version 2, so the append becomes version 3."""
    edit(interrupted, "k = 3", "k = 2")
    assert stage_one(interrupted).manifest.version == 2
    cache = grow(interrupted)
    assert cache.manifest.version == 3 and cache.pairs("image_to_sentence").ids.shape == (33, 2)
    files = set(tree(interrupted.parent / "cache"))
    assert files == {*cache.manifest.files, *cache.manifest.superseded, "manifest.json", "manifest.xxh3"}
