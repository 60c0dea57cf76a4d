"""Repair: the same bytes where the sources are at hand, marked rows where they are not, and nothing else lost."""

import os
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

import dimefm
import dimefm.stages.embed.image_rows
from dimefm.cache import CacheError, FeatureCache
from dimefm.cache.disk.layout import IMAGES, SENTENCES, Layout
from dimefm.cache.reader.masks import add_mask
from dimefm.cache.version.lock import writer_lock
from dimefm.cache.version.manifest import read_manifest
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.repair.repair import outcome_lines, repair, require_mended
from dimefm.pipeline.upkeep.verify import verify

from ...support.damage import change_byte, replace_index, rewrite_rows
from ...support.growing import add_images, grow

CHUNK = "teacher.zarr/images/embedding/c/2/0"
"""Rows 8 to 11."""


def load_benchmark(name):
    spec = spec_from_file_location(name, Path(dimefm.__file__).parent / "benchmarks" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corruption = load_benchmark("corruption")
tree = corruption.tree


def lose_sources(root):
    (root.parent / "run.toml").rename(root.parent / "elsewhere.toml")


def find_sources(root):
    (root.parent / "elsewhere.toml").rename(root.parent / "run.toml")


def test_random_damage_to_every_kind_of_file_is_found_and_mended_to_the_same_bytes(root):
    totals = {corruption.FLIP: 14, corruption.CUT: 3, corruption.EXTRA: 3}
    results = corruption.torment(root, totals, rounds=2, seed=3)
    assert len(results) == 20 and all(result["found"] and result["mended"] for result in results)
    assert "all" in corruption.table(results)


@pytest.mark.acceptance
def test_much_random_damage_is_found_and_mended(root):
    totals = {corruption.FLIP: 200, corruption.CUT: 20, corruption.EXTRA: 20}
    assert all(result["found"] and result["mended"] for result in corruption.torment(root, totals, 20, seed=0))


def test_a_sound_cache_is_left_alone_and_no_teacher_is_loaded(root):
    lose_sources(root)
    before = tree(root)
    found = repair(root)
    assert (found["found"], found["mended"], found["left"], found["version"]) == (0, {}, [], 1)
    assert tree(root) == before


def test_only_the_bad_shard_is_computed_again(root, monkeypatch):
    whole = tree(root)
    (root / CHUNK).unlink()
    embed, embedded = dimefm.stages.embed.shard.embed_image_shard, []
    monkeypatch.setattr(
        "dimefm.stages.embed.shard.embed_image_shard",
        lambda teacher, source, keys, *rest: embedded.append(len(keys)) or embed(teacher, source, keys, *rest),
    )
    found = repair(root)
    assert embedded == [4]
    assert found["mended"] == {CHUNK: "computed again: the same bytes"} and found["version"] == 1
    assert tree(root) == whole


def test_a_row_table_comes_back_from_its_spare_copy_and_without_one_from_the_sources(root):
    whole = tree(root)
    change_byte(root / "rows/images.parquet", 200)
    assert "spare" in repair(root)["mended"]["rows/images.parquet"]
    change_byte(root / "rows/images.parquet", 200)
    (root / "rows/sentences.parquet").unlink()
    shutil.rmtree(root / "log/spare")
    found = repair(root)
    assert found["mended"]["rows/images.parquet"] == "listed again from the sources: the same bytes"
    assert tree(root) == whole


def test_a_table_of_copied_sources_is_a_new_version_with_the_same_rows(root):
    before = pq.read_table(root / "rows/images.parquet").column("source").to_pylist()
    os.utime(root.parent / "images" / before[0], ns=(1, 1))
    change_byte(root / "rows/images.parquet", 200)
    shutil.rmtree(root / "log/spare")
    found = repair(root)
    assert "other sizes or times" in found["mended"]["rows/images.parquet"] and found["version"] == 2
    assert pq.read_table(root / "rows/images.parquet").column("source").to_pylist() == before
    assert verify(root)["sound"]


def test_strangers_are_moved_to_the_log_and_kept(root):
    (root / "index/thesis.tex").write_text("years of work")
    (root / "rows/.half.0a1b.partial").write_bytes(b"x")
    found = repair(root)
    assert found["mended"]["index/thesis.tex"] == "moved to log/removed/index/thesis.tex"
    assert (root / "log/removed/index/thesis.tex").read_text() == "years of work"
    assert verify(root)["sound"]


def test_an_index_of_other_embeddings_is_built_again_and_the_manifest_says_so(root):
    images = FeatureCache.open(root).images
    replace_index(root, -np.array(images.embeddings[:]), images.usable)
    assert not verify(root)["sound"]
    assert repair(root)["mended"] == {"index/images.faiss": "made again: other bytes"}
    assert verify(root)["sound"]


def test_indexes_and_pairs_of_a_cache_that_has_grown_are_made_again_to_the_same_bytes(config, root):
    """Some of them are merged and some are links to those of the version before."""
    add_images(config.parent, ["9/0.png", "9/1.png"])
    grow(config)
    whole = tree(root)
    for name in ("sentence_to_image/ids/c/2/0", "image_to_sentence/scores/c/0/0", "image_to_sentence/ids/c/7/0"):
        (root / "pairs-2.zarr" / name).unlink()
    for name in ("images-2.faiss", "sentences-2.faiss", "sentences-2.json"):
        (root / "index" / name).unlink()
    found = repair(root)
    assert set(found["mended"].values()) == {"made again: the same bytes"} and not found["left"]
    assert tree(root) == whole and verify(root)["sound"]


def test_a_row_that_was_written_wrong_is_computed_again_with_its_pairs(root):
    whole = FeatureCache.open(root).images.embeddings[:]
    rewrite_rows(root, 2, lambda block: block.__setitem__(1, 0))
    assert repair(root)["version"] == 2  # the manifest vouched for the zeros
    assert np.array_equal(FeatureCache.open(root).images.embeddings[:], whole)
    assert verify(root)["sound"]


@pytest.fixture
def other_machine(monkeypatch):
    """The last bits of every embedding come out otherwise, as with other libraries or another processor."""
    finish = dimefm.stages.embed.image_rows.ShardRows.result

    def result(self, *arguments):
        done = finish(self, *arguments)
        done.embeddings.view(np.uint16)[:, ::3] ^= 1
        return done

    monkeypatch.setattr(dimefm.stages.embed.image_rows.ShardRows, "result", result)


def test_on_another_machine_the_manifest_says_where_a_shard_came_from_and_how_near_it_is(root, other_machine):
    whole = FeatureCache.open(root).images.embeddings[:].astype(np.float32)
    change_byte(root / CHUNK, 70)
    found = repair(root)
    assert found["mended"][CHUNK].startswith("computed again: other bytes, cosine at least ")
    assert found["version"] == 2 and found["lost"] == {}
    origin = read_manifest(Layout(root)).origins[IMAGES]["2"]
    assert origin.by == "repair" and origin.cosine["least"] > 0.999 and origin.libraries["torch"]
    now = FeatureCache.open(root).images.embeddings[:].astype(np.float32)
    cosine = (whole * now).sum(1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(now, axis=1)
    assert cosine.min() > 0.999 and np.array_equal(np.flatnonzero((now != whole).any(1)), [8, 9, 10, 11])
    assert verify(root)["sound"]  # pairs and indexes are those of the new embeddings


def test_a_teacher_that_disagrees_with_sound_rows_mends_nothing(root, monkeypatch):
    finish = dimefm.stages.embed.image_rows.ShardRows.result

    def result(self, *arguments):
        done = finish(self, *arguments)
        done.embeddings[:] = done.embeddings[:, ::-1].copy()
        return done

    monkeypatch.setattr(dimefm.stages.embed.image_rows.ShardRows, "result", result)
    change_byte(root / CHUNK)
    before = tree(root)
    found = repair(root)
    assert "wanted 0.999" in found["left"][0]["repair"] and found["mended"] == {}
    assert tree(root) == before
    with pytest.raises(CacheError, match="1 problems are left"):
        require_mended(found)


def test_without_sources_rows_are_marked_as_lost_and_nothing_else_is(root):
    whole = FeatureCache.open(root)
    embeddings, pairs = whole.images.embeddings[:], whole.pairs("sentence_to_image").ids[:]
    change_byte(root / CHUNK)
    damaged = (root / CHUNK).read_bytes()
    lose_sources(root)
    found = repair(root)
    assert found["lost"] == {IMAGES: [[8, 11]]} and found["left"] == []
    assert any("lost: rows 8-11" in line for line in outcome_lines(found))
    cache = FeatureCache.open(root)
    kept = np.setdiff1d(np.arange(30), np.arange(8, 12))
    assert cache.images.usable.tolist() == kept.tolist()
    assert np.array_equal(cache.images.embeddings[kept], embeddings[kept])
    assert np.isnan(cache.images.embeddings[[8, 9, 10, 11]]).all()
    rows = pq.read_table(root / "rows/images.parquet").to_pylist()
    assert rows[9]["status"] == "failed" and rows[9]["reason"].startswith("lost: damaged")
    assert rows[9]["source"] and rows[7]["status"] == "ok"
    assert not np.isin(cache.pairs("sentence_to_image").ids[:], range(8, 12)).any()
    assert (cache.pairs("image_to_sentence").ids[[8, 9, 10, 11]] == -1).all()
    assert pairs.shape == cache.pairs("sentence_to_image").ids.shape
    assert (root / "log/removed" / CHUNK).read_bytes() == damaged  # whoever wants to may look at it
    assert verify(root)["sound"]


@pytest.mark.parametrize("what", ["padding", "cut padding", "longer", "longer class vectors", "failed row"])
def test_damage_to_what_is_known_anyway_costs_no_row_even_without_sources(root, what):
    """The last of 30 rows in chunks of 4 are 28 and 29: half of chunk 7 is padding. A row is 64 bytes."""
    path = root / "teacher.zarr/images/embedding/c/7/0"
    if what == "failed row":
        config = root.parent / "run.toml"
        config.write_text(config.read_text().replace("[images]", "[images]\nmax_failed = 0.5"))
        shutil.rmtree(root)
        (root.parent / "images/2/029.jpg").write_bytes(b"")
        cache_teacher(load_config(config))
        assert np.isnan(FeatureCache.open(root).images.embeddings[[29]]).all()
    whole = tree(root)
    lose_sources(root)
    if what == "padding":
        change_byte(path, 2 * 64 + 5)
    elif what == "failed row":
        change_byte(path, 64 + 5)
    elif what == "cut padding":
        path.write_bytes(path.read_bytes()[: 2 * 64 + 7])
    else:
        path = path if what == "longer" else root / "teacher.zarr/evaluate/dev/head/c/0/0"
        path.write_bytes(path.read_bytes() + b"more")
    found = repair(root)
    assert (
        found["lost"] == {}
        and found["left"] == []
        and "the same bytes" in found["mended"][path.relative_to(root).as_posix()]
    )
    assert tree(root) == whole


def test_lost_rows_come_back_when_their_sources_do(root):
    whole = tree(root)
    change_byte(root / CHUNK)
    change_byte(root / "teacher.zarr/sentences/embedding/c/1/0")
    lose_sources(root)
    assert repair(root)["lost"] == {IMAGES: [[8, 11]], SENTENCES: [[4, 7]]}
    assert repair(root)["version"] == 2  # again without them: nothing new
    find_sources(root)
    found = repair(root)
    assert found["lost"] == {} and verify(root)["sound"]
    now = tree(root)
    of_rows = [name for name in whole if name.startswith(("teacher.zarr", "rows"))]
    assert [name for name in of_rows if now[name] != whole[name]] == []


def test_an_empty_folder_of_images_costs_no_row_since_its_disk_may_not_be_mounted(root):
    whole, images = tree(root), root.parent / "images"
    change_byte(root / CHUNK, 100)
    images.rename(root.parent / "away")
    images.mkdir()
    found = repair(root)
    assert found["lost"] == {} and [item["where"] for item in found["left"]] == [CHUNK]
    assert "is the disk mounted?" in found["left"][0]["repair"]
    assert FeatureCache.open(root).images.usable.tolist() == list(range(30))
    images.rmdir()
    (root.parent / "away").rename(images)
    repair(root)
    assert tree(root) == whole


def test_an_image_that_is_gone_or_changed_costs_its_own_row(root):
    sources = pq.read_table(root / "rows/images.parquet").column("source").to_pylist()
    (root.parent / "images" / sources[8]).unlink()
    Image.new("RGB", (64, 64)).save(root.parent / "images" / sources[10])
    whole = FeatureCache.open(root).images.embeddings[:]
    change_byte(root / CHUNK)
    found = repair(root)
    assert found["lost"] == {IMAGES: [[8, 8], [10, 10]]}
    cache = FeatureCache.open(root)
    assert np.array_equal(cache.images.embeddings[[9, 11]], whole[[9, 11]])
    reasons = cache.images.rows.take([8, 10], "reason")
    assert all(reason.startswith("lost: ") for reason in reasons) and "changed" in reasons[1]
    assert verify(root)["sound"]


def test_a_row_that_stays_lost_does_not_make_new_versions(root):
    source = pq.read_table(root / "rows/images.parquet").column("source").to_pylist()[8]
    (root.parent / "images" / source).rename(root.parent / "away.jpg")
    whole = FeatureCache.open(root).images.embeddings[:]
    change_byte(root / CHUNK)
    assert repair(root)["version"] == 2
    before = tree(root)
    found = repair(root)
    assert (found["found"], found["mended"], found["lost"]) == (0, {}, {IMAGES: [[8, 8]]})
    assert tree(root) == before
    (root.parent / "away.jpg").rename(root.parent / "images" / source)
    assert repair(root)["lost"] == {}
    assert np.array_equal(FeatureCache.open(root).images.embeddings[:], whole)


def test_lost_images_are_unpaired_even_when_class_vectors_cannot_be_mended(root):
    change_byte(root / CHUNK)
    change_byte(root / "teacher.zarr/evaluate/dev/head/c/0/0")
    lose_sources(root)
    found = repair(root)
    assert found["lost"] == {IMAGES: [[8, 11]]} and len(found["left"]) == 1
    assert not np.isin(FeatureCache.open(root).pairs("sentence_to_image").ids[:], range(8, 12)).any()


def test_class_vectors_without_sources_are_left_and_said_to_be(root):
    change_byte(root / "teacher.zarr/evaluate/dev/head/c/0/0")
    lose_sources(root)
    found = repair(root)
    assert [finding["where"] for finding in found["left"]] == ["teacher.zarr/evaluate/dev/head/c/0/0"]
    assert "teacher" in found["left"][0]["repair"]


def test_a_manifest_and_its_checksum_both_damaged_come_back_from_the_spare_copy(root):
    whole = tree(root)
    for name in ("manifest.json", "manifest.xxh3"):
        change_byte(root / name, 3)
    assert len(repair(root)["mended"]) == 2
    assert tree(root) == whole


def test_of_two_spare_manifests_the_later_one_is_put_back(root):
    add_mask(Layout(root), "images", "half", np.arange(30) % 2 == 0)
    whole = tree(root)
    change_byte(root / "manifest.json", 3)
    change_byte(root / "manifest.xxh3", 40)  # the line of version 2; that of version 1 is as it was
    repair(root)
    assert tree(root) == whole


def test_a_damaged_mask_comes_back(root):
    add_mask(Layout(root), "images", "half", np.arange(30) % 2 == 0)
    whole = tree(root)
    (root / "masks/images/half.parquet").unlink()
    lose_sources(root)
    assert repair(root)["left"] == []
    assert tree(root) == whole


def test_a_manifest_without_a_spare_copy_is_made_again_from_plan_journal_and_files(root):
    whole = tree(root)
    change_byte(root / "manifest.json", 30)
    shutil.rmtree(root / "log/spare")
    change_byte(root / CHUNK)
    with pytest.raises(CacheError, match="so is its spare copy"):
        verify(root)
    repair(root)
    assert tree(root) == whole


def test_damaged_evaluation_images_leave_the_pairs_alone(root):
    whole = tree(root)
    change_byte(root / "teacher.zarr/evaluate/dev/images/embedding/c/1/0")
    lose_sources(root)
    assert repair(root)["lost"] == {"evaluate/dev/images/embedding": [[4, 7]]}
    now = tree(root)
    assert {name for name in whole if name.startswith(("pairs", "index"))} <= set(now)
    assert all(now[name] == whole[name] for name in whole if name.startswith(("pairs", "index")))
    assert verify(root)["sound"]


@pytest.fixture
def sibling(root):
    """A second cache over the row tables of the first; the same teacher will do."""
    config = root.parent / "second.toml"
    text = (root.parent / "run.toml").read_text().replace('dir = "cache"', 'dir = "second"\nrows = "cache"')
    config.write_text(text)
    cache_teacher(load_config(config))
    return root.parent / "second"


def test_a_sibling_marks_lost_rows_for_itself_and_takes_them_back(root, sibling):
    first, second = tree(root), tree(sibling)
    change_byte(sibling / CHUNK)
    config = sibling.parent / "second.toml"
    config.rename(sibling.parent / "elsewhere.toml")
    assert repair(sibling)["lost"] == {IMAGES: [[8, 11]]}
    assert 9 not in FeatureCache.open(sibling).images.usable and verify(sibling)["sound"]
    (sibling.parent / "elsewhere.toml").rename(config)
    assert repair(sibling)["lost"] == {} and verify(sibling)["sound"]
    assert tree(sibling)[CHUNK] == second[CHUNK]
    assert tree(root) == first and verify(root)["sound"]


def test_a_sibling_is_mended_to_the_same_bytes(sibling):
    whole = tree(sibling)
    for name in ("failed.parquet", CHUNK, "index/images.faiss", "text_tower/open_clip_config.json"):
        change_byte(sibling / name, 20)
    assert repair(sibling)["left"] == []
    assert tree(sibling) == whole


def test_rows_that_its_owner_lost_are_still_good_in_a_sibling(root, sibling):
    change_byte(root / CHUNK)
    lose_sources(root)
    assert repair(root)["lost"] == {IMAGES: [[8, 11]]}
    assert verify(sibling)["findings"] == []


def test_a_second_writer_is_refused(root):
    with writer_lock(Layout(root)), pytest.raises(CacheError, match="is being written by"):
        repair(root)


def test_a_repair_that_was_decided_is_finished_by_whoever_writes_next(root, monkeypatch):
    change_byte(root / CHUNK)
    lose_sources(root)
    with monkeypatch.context() as broken:
        broken.setattr("dimefm.cache.version.versions.complete_change", killed)
        with pytest.raises(Killed):
            repair(root)
    assert (root / "mend/manifest.json").exists()
    stale = root.parent / "stale"
    shutil.copytree(root / "mend", stale)
    add_mask(Layout(root), "images", "all", np.ones(30, dtype=bool))
    after = FeatureCache.open(root)
    assert after.manifest.version == 3 and len(after.images.usable) == 26
    assert after.manifest.files.keys() >= {"masks/images/all.parquet"} and not (root / "mend").exists()
    # One that was decided for a version that is no longer in force must not take what came since.
    shutil.copytree(stale, root / "mend")
    add_mask(Layout(root), "images", "none", np.zeros(30, dtype=bool))
    last = FeatureCache.open(root).manifest
    assert last.version == 4 and {"masks/images/all.parquet", "masks/images/none.parquet"} <= last.files.keys()


class Killed(BaseException):
    pass


def killed(*_):
    raise Killed


@pytest.mark.parametrize("name", ["rows/images.parquet", "plan.json", "manifest.json"])
def test_a_damaged_spare_copy_is_made_again_from_its_original(root, name):
    before = tree(root)
    copy = root / "log/spare" / xxhash.xxh3_128((root / name).read_bytes()).hexdigest()
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    assert repair(root)["mended"] == {f"log/spare/{copy.name}": "copied again from the original"}
    assert copy.read_bytes() == (root / name).read_bytes() and tree(root) == before
    assert repair(root)["found"] == 0


def test_a_spare_copy_and_its_original_both_damaged_are_both_left(root):
    copy = root / "log/spare" / xxhash.xxh3_128((root / "plan.json").read_bytes()).hexdigest()
    for path in (copy, root / "plan.json"):
        path.write_bytes(path.read_bytes()[:-3] + b"?\n}")
    assert {finding["where"] for finding in repair(root)["left"]} == {"plan.json", f"log/spare/{copy.name}"}
