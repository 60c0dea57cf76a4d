"""What append takes in, what it leaves alone, and what it refuses."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import dimefm.cache.version.versions
import dimefm.pipeline.upkeep.append
import dimefm.stages.models.load_teacher
import dimefm.stages.models.open_clip_teacher
from dimefm.cache import CacheError, FeatureCache, InputError
from dimefm.cache.audit.verify import verify_cache
from dimefm.cache.disk.arrays import chunk_path
from dimefm.cache.disk.layout import IMAGES, SENTENCES, Layout
from dimefm.cache.version.lock import writer_lock
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.stage_two.evaluate import evaluate
from dimefm.pipeline.upkeep.append import append_to

from ...support.commands import tree
from ...support.growing import add_images, add_lines, edit, grow, stage_one
from ...support.teachers import make_teacher


def test_rows_that_come_last_anyway_end_in_the_bytes_of_a_fresh_run_over_everything(config):
    """Same row numbers, so the same batches: not one bit may differ, in embeddings, rows, pairs and indexes."""
    world = config.parent
    add_images(world, [f"9/{i}.png" for i in range(7)])
    add_lines(world, "one more", " ", "two more", "three more")
    grow(config)
    shutil.move(world / "cache", world / "grown")
    stage_one(config)
    fresh, grown = tree(world / "cache"), tree(world / "grown")
    own = {"manifest.json", "manifest.xxh3", "plan.json"}
    compared = {name: name.replace("pairs.zarr", "pairs-2.zarr") for name in set(fresh) - own}
    compared |= {name: name.replace(".", "-2.") for name in compared if name.startswith("index/")}
    assert {name for name, there in compared.items() if fresh[name] != grown[there]} == set()
    assert len(compared) > 80


def test_images_alone_end_in_the_bytes_of_a_fresh_run_and_share_what_is_the_same(config):
    """Lines that repeat earlier ones, k above the number of rows, a picture that cannot be read."""
    world = config.parent
    edit(config, "k = 3", "k = 40")
    edit(config, 'source = "images/"', 'source = "images/"\nmax_failed = 0.2')
    lines = (world / "captions.txt").read_text().splitlines()
    add_lines(world, *lines[3:6], lines[3])
    shutil.rmtree(world / "cache")
    stage_one(config)
    add_images(world, ["9/0.png", "9/1.png", "9/2.png"])
    shutil.copy(world / "images/9/0.png", world / "images/9/3.png")
    (world / "images/9/1.png").write_bytes(b"")
    grow(config)
    shutil.move(world / "cache", world / "grown")
    stage_one(config)
    fresh, grown = tree(world / "cache"), tree(world / "grown")
    names = [name for name in fresh if name.startswith(("pairs", "index/"))]
    there = {name: name.replace("pairs.zarr", "pairs-2.zarr") for name in names}
    there |= {name: name.replace(".", "-2.") for name in names if name.startswith("index/")}
    assert {name for name in names if fresh[name] != grown[there[name]]} == set()
    first, second = (world / "grown" / f"index/sentences{suffix}.faiss" for suffix in ("", "-2"))
    assert first.samefile(second)
    report = verify_cache(world / "grown")
    assert report.findings == []


@pytest.mark.parametrize("damage", ["flipped", "gone", "no metadata"])
def test_pairs_that_are_damaged_are_found_anew_and_not_carried_into_the_next_version(config, damage):
    """New images change nothing in the pairs of images that were there: their file would be shared."""
    cache = config.parent / "cache"
    path = chunk_path(cache / "pairs.zarr", "image_to_sentence/ids", 0)
    if damage == "flipped":
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    else:
        (path if damage == "gone" else cache / "pairs.zarr/image_to_sentence/ids/zarr.json").unlink()
    add_images(config.parent, ["9/0.png"])
    grow(config)
    assert verify_cache(cache).findings == []


def test_rows_never_move_and_new_ones_follow_them(config):
    """New files that sort between the old ones get other batches than in a fresh run: cosine >= 0.999, not equal."""
    world = config.parent
    old = FeatureCache.open(world / "cache")
    sources, embeddings = old.images.rows.column("source").to_pylist(), old.images.embeddings[:]
    add_images(world, ["1/zzz.png", "0/aaa.png", "0/001_.png"])
    grown = grow(config)
    assert grown.images.rows.column("source").to_pylist() == [*sources, "0/001_.png", "0/aaa.png", "1/zzz.png"]
    assert np.array_equal(grown.images.embeddings[:30], embeddings)
    shutil.rmtree(world / "cache")
    fresh = stage_one(config)
    place = {source: row for row, source in enumerate(fresh.images.rows.column("source").to_pylist())}
    there = [place[source] for source in grown.images.rows.column("source").to_pylist()]
    ours, theirs = (rows.astype(np.float64) for rows in (grown.images.embeddings[:], fresh.images.embeddings[there]))
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() >= 0.999


def test_full_chunks_are_not_touched_and_the_last_one_begins_with_the_same_bytes(config):
    store = Layout(config.parent / "cache").teacher_zarr
    full, last = (chunk_path(store, IMAGES, chunk) for chunk in (6, 7))
    before, bytes_before = full.stat(), last.read_bytes()
    add_images(config.parent, ["9/0.png"])
    grow(config)
    assert (full.stat().st_ino, full.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    two_rows = 2 * 32 * 2  # 30 images are 7 chunks of 4 and 2 rows; a row is 32 float16
    assert last.read_bytes()[:two_rows] == bytes_before[:two_rows]
    assert last.read_bytes() != bytes_before


def test_what_the_version_before_last_left_behind_is_removed(config):
    root = config.parent / "cache"
    add_lines(config.parent, "a second version")
    assert (root / "pairs.zarr").exists() and "pairs.zarr/zarr.json" in grow(config).manifest.superseded
    assert (root / "pairs.zarr").exists()
    add_lines(config.parent, "a third version")
    grow(config)
    assert not (root / "pairs.zarr").exists() and not (root / "index/images.faiss").exists()
    manifest = FeatureCache.open(root).manifest
    assert set(tree(root)) == {*manifest.files, *manifest.superseded, "manifest.json", "manifest.xxh3"}
    assert manifest.version == 3 and manifest.plan_file == "plan-3.json"


def test_an_evaluation_set_joins_without_anything_else_being_made_again(config):
    world = config.parent
    shutil.copytree(world / "dev", world / "test")
    before = tree(world / "cache")
    config.write_text(
        config.read_text() + '[evaluate.test]\nimages="test/"\nclasses="classes.json"\ntemplates="openai"\n'
    )
    cache = grow(config)
    assert np.array_equal(cache.evaluate["test"].images.embeddings[:], cache.evaluate["dev"].images.embeddings[:])
    assert cache.evaluate["test"].head.shape == (4, 32) and len(cache.evaluate["test"].labels) == 12
    after = tree(world / "cache")
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"manifest.json", "manifest.xxh3"}
    assert not [name for name in after if "-2." in name and not name.startswith("plan")]
    assert len(stage_one(config).evaluate) == 2


def test_a_run_goes_on_and_is_scored_on_a_set_that_joined_since(config):
    distill(load_config(config), ["small"], stop_after=2)
    shutil.copytree(config.parent / "dev", config.parent / "test")
    config.write_text(
        config.read_text() + '[evaluate.test]\nimages="test/"\nclasses="classes.json"\ntemplates="openai"\n'
    )
    grow(config)
    distill(load_config(config), ["small"], stop_after=1)  # what it is trained from has not changed
    (scores,) = evaluate([config]).values()
    assert scores["test"]["cosine"] == scores["dev"]["cosine"] and scores["test"]["n"] == 12  # the same images


def test_new_lines_follow_the_prompts_and_new_prompts_follow_them(config):
    world = config.parent
    shutil.rmtree(world / "cache")
    edit(config, "[cache]", '[sentences.prompts]\nclasses = "more.json"\ntemplates = "templates.txt"\n[cache]')
    (world / "more.json").write_text(json.dumps({"b": ["boat"], "d": ["dog"]}))
    assert stage_one(config).sentences.rows.take([22], "text") == ["a boat picture"]
    (world / "more.json").write_text(json.dumps({"a": ["ant"], "b": ["boat"], "d": ["dog"]}))
    add_lines(world, "a new line")
    cache = grow(config)
    wanted = ["a boat picture", "something boat", "a dog picture", "something dog", "a new line", "a ant picture"]
    assert cache.sentences.rows.take(range(22, 28), "text") == wanted
    assert cache.sentences.rows.take([25, 26, 27], "origin") == ["prompts", "captions.txt", "prompts"]
    assert len(stage_one(config).sentences) == 29
    (world / "more.json").write_text(json.dumps({"a": ["ant"]}))
    with pytest.raises(CacheError, match="no longer makes 'a boat picture'"):
        grow(config)


def test_a_cache_finds_its_sources_by_itself(config):
    """By the config that made it, which its log names; another one may be given."""
    root = config.parent / "cache"
    add_lines(config.parent, "new")
    (root / "log/config.json").unlink()
    with pytest.raises(InputError, match="give --config"):
        append_to(root)
    assert append_to(root, config)
    add_lines(config.parent, "newer")
    assert append_to(root)
    assert len(FeatureCache.open(root).sentences) == 24


def test_nothing_new_touches_no_file_and_loads_no_teacher(config, no_teacher, capsys):
    before = tree(config.parent / "cache")
    grow(config)
    assert tree(config.parent / "cache") == before
    assert "nothing to append" in capsys.readouterr().err


def test_after_an_append_stage_one_is_finished(config, capsys):
    add_images(config.parent, ["0/new.png"])
    add_lines(config.parent, "new")
    grow(config)
    before = tree(config.parent / "cache")
    stage_one(config)
    assert tree(config.parent / "cache") == before
    said = capsys.readouterr().err
    assert said.rstrip().endswith("finished; nothing to do") and "appeared since" not in said


def test_a_new_image_that_cannot_be_read_costs_its_own_row(config):
    edit(config, 'source = "images/"', 'source = "images/"\nmax_failed = 0.1')
    add_images(config.parent, ["9/0.png", "9/1.png", "9/2.png"])
    (config.parent / "images/9/1.png").write_bytes(b"")
    cache = grow(config)
    assert set(range(33)) - set(cache.images.usable.tolist()) == {31}
    assert cache.images.rows.take([31], "reason") == ["empty file"]
    assert cache.manifest.arrays[IMAGES].to_dict() == {"rows": 33, "failed": 1, "reasons": {"empty file": 1}}
    assert np.isnan(cache.images.embeddings[[31]]).all()


def test_too_many_bad_images_stop_it_and_the_old_version_is_whole(config):
    before = tree(config.parent / "cache")
    add_images(config.parent, ["9/0.png"])
    (config.parent / "images/9/0.png").write_bytes(b"")
    with pytest.raises(InputError, match="max_failed"):
        grow(config)
    after = tree(config.parent / "cache")
    assert {name: value for name, value in after.items() if not name.startswith("next/")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda world: (world / "captions.txt").write_text("other\n" * 30), "does not begin with the 22 lines"),
        (lambda world: (world / "captions.txt").write_text("short\n"), "does not begin with the 22 lines"),
        (lambda world: edit(world / "run.toml", "batch_size = 4", "batch_size = 5"), r"teacher\.batch_size = 4"),
        (lambda world: edit(world / "run.toml", "shard_rows = 4", "shard_rows = 8"), r"cache\.shard_rows = 4"),
        (lambda world: edit(world / "run.toml", 'source = "images/"', 'source = "test/"'), "none of the 30 images"),
        (lambda world: (world / "templates.txt").write_text("an {}\n"), r"evaluate\.dev\.prompts"),
        (lambda world: (world / "cache/manifest.json").unlink(), "not a finished cache"),
    ],
    ids=["lines", "fewer", "teacher", "division", "folder", "prompts", "unfinished"],
)
def test_what_is_not_growth_is_refused(config, no_teacher, change, message):
    Image.new("RGB", (32, 32)).save(config.parent / "images/0/new.png")
    (config.parent / "test").mkdir()
    Image.new("RGB", (32, 32)).save(config.parent / "test/new.png")
    change(config.parent)
    before = tree(config.parent / "cache")
    with pytest.raises(CacheError, match=message):
        grow(config)
    assert tree(config.parent / "cache") == before


def test_other_weights_under_the_same_name_are_refused(config, tmp_path):
    _, weights = make_teacher(tmp_path / "other", seed=1)
    old = next(line for line in config.read_text().splitlines() if line.startswith("pretrained"))
    edit(config, old, f'pretrained = "{weights}"')
    add_lines(config.parent, "new")
    with pytest.raises(CacheError, match=r"teacher\.weights"):
        grow(config)


def test_other_library_versions_may_add_rows_and_the_plan_says_which(config, monkeypatch):
    """Last bits may differ between versions: the plan names the versions of every growth."""
    before = FeatureCache.open(config.parent / "cache")
    add_lines(config.parent, "new")
    identity = dimefm.stages.models.open_clip_teacher.OpenClipTeacher.identity
    later = {"libraries": {**before.teacher["libraries"], "torch": "99.0"}}
    monkeypatch.setattr(
        dimefm.stages.models.open_clip_teacher.OpenClipTeacher, "identity", lambda self: {**identity(self), **later}
    )
    plan = grow(config).plan
    assert plan.teacher.to_dict() == before.teacher
    (grown,) = plan.grown
    assert grown.libraries["torch"] == "99.0"
    assert grown.plan == before.manifest.plan and grown.rows[SENTENCES] == 22


def test_a_damaged_last_chunk_is_not_sealed_with_a_new_checksum(config):
    path = chunk_path(Layout(config.parent / "cache").teacher_zarr, SENTENCES, 5)
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    add_lines(config.parent, "new")
    with pytest.raises(CacheError, match="repair"):
        grow(config)


def test_a_second_writer_is_refused_at_once_with_the_name_of_the_first(config):
    add_lines(config.parent, "new")
    with (
        writer_lock(Layout(config.parent / "cache")),
        pytest.raises(CacheError, match=f"being written by .*{os.getpid()}"),
    ):
        grow(config)
