"""Masks: named choices of rows, kept beside the rows and never written over."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from dimefm.cache import CacheError, FeatureCache, InputError
from dimefm.cache.reader.masks import add_mask, mask_names, read_mask
from dimefm.cache.version.manifest import read_manifest
from dimefm.pipeline.row_masks.mask import mask_from_file
from dimefm.stages.settings.distill import DistillSettings, LossSettings
from dimefm.stages.settings.models import StudentSettings

from ...support.small_cache import make_cache
from ...support.training import train_one

EVEN = np.arange(40) % 2 == 0
STUDENT = StudentSettings(model="timm:resnet10t", image_size=32)


@pytest.fixture
def cache(tmp_path):
    """40 images, of which row 3 failed, and 30 sentences."""
    return make_cache(tmp_path)


def test_a_mask_selects_the_rows_it_keeps_of_those_that_are_usable(cache):
    keep = np.zeros(40, dtype=bool)
    keep[[1, 3, 39]] = True
    add_mask(cache.layout, "images", "few", keep)
    again = FeatureCache.open(cache.layout.root)
    masked = again.masked(images="few")
    assert masked.images.usable.tolist() == [1, 39]  # row 3 failed
    assert len(masked.images) == 40 and len(masked.sentences.usable) == 30
    assert len(again.images.usable) == 39
    entry = again.manifest.files["masks/images/few.parquet"]
    assert masked.masks == {"images": {"name": "few", "digest": entry.digest}} and again.masks == {}


def test_a_mask_is_a_plain_table_of_rows_and_bools_and_a_version_of_its_own(cache):
    add_mask(cache.layout, "images", "even", EVEN)
    table = pq.read_table(cache.layout.root / "masks/images/even.parquet")
    assert table.to_pydict() == {"row": list(range(40)), "keep": EVEN.tolist()}
    after = FeatureCache.open(cache.layout.root)
    assert after.manifest.version == 2 and after.identity == cache.identity
    assert after.manifest.arrays == cache.manifest.arrays


def test_sides_and_names_do_not_meet(cache):
    add_mask(cache.layout, "images", "even", EVEN)
    add_mask(cache.layout, "sentences", "even", np.arange(30) < 3)
    manifest = read_manifest(cache.layout)
    assert mask_names(manifest, "images") == mask_names(manifest, "sentences") == ["even"]
    assert FeatureCache.open(cache.layout.root).masked("even", "even").sentences.usable.tolist() == [0, 1, 2]


def test_a_mask_never_changes(cache):
    add_mask(cache.layout, "images", "even", EVEN)
    add_mask(cache.layout, "images", "even", EVEN)  # the same again is no change
    assert read_manifest(cache.layout).version == 2
    with pytest.raises(InputError, match="choose another name"):
        add_mask(cache.layout, "images", "even", ~EVEN)
    assert np.array_equal(read_mask(cache.layout, read_manifest(cache.layout), "images", "even", 40), EVEN)


def test_rows_that_came_after_a_mask_are_not_selected(cache):
    add_mask(cache.layout, "images", "even", EVEN)
    keep = read_mask(cache.layout, read_manifest(cache.layout), "images", "even", 43)
    assert keep.shape == (43,) and not keep[40:].any() and np.array_equal(keep[:40], EVEN)


def test_an_unknown_mask_names_those_that_exist(cache):
    add_mask(cache.layout, "images", "even", EVEN)
    again = FeatureCache.open(cache.layout.root)
    with pytest.raises(InputError, match=r"images\.mask = 'odd': .* has no such mask of images; it has: even"):
        again.masked(images="odd")
    with pytest.raises(InputError, match="it has: none"):
        again.masked(sentences="even")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_a_name_that_is_no_file_name_is_refused(cache, name):
    with pytest.raises(InputError, match="the name becomes a file"):
        add_mask(cache.layout, "images", name, EVEN)


def test_a_mask_of_another_length_is_a_mistake(cache):
    with pytest.raises(ValueError, match=r"wanted bool \(40,\)"):
        add_mask(cache.layout, "images", "short", EVEN[:39])
    with pytest.raises(ValueError, match=r"wanted bool \(40,\)"):
        add_mask(cache.layout, "images", "long", np.ones(41, dtype=bool), rows_since=True)


def test_rows_that_came_while_a_mask_was_made_are_not_chosen(cache):
    add_mask(cache.layout, "images", "before", np.ones(38, dtype=bool), rows_since=True)
    assert FeatureCache.open(cache.layout.root).masked(images="before").images.usable.max() == 37


def test_a_damaged_mask_is_not_trusted(cache):
    add_mask(cache.layout, "images", "even", EVEN)
    path = cache.layout.mask("images", "even")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match="checksum differs"):
        FeatureCache.open(cache.layout.root).masked(images="even")


def test_training_draws_from_the_mask_and_its_record_says_so(cache, tmp_path):
    add_mask(cache.layout, "images", "even", EVEN)
    add_mask(cache.layout, "images", "odd", ~EVEN)
    masked = FeatureCache.open(cache.layout.root).masked(images="even")
    settings = DistillSettings(epochs=1, batch_images=8, loss=LossSettings(feature=1.0), device="cpu", workers=1)
    result = train_one(masked, tmp_path / "images", STUDENT, settings, tmp_path / "run")
    assert result.total_steps == 20 // 8
    record = json.loads((tmp_path / "run/run.json").read_bytes())
    assert record["rows"]["images"] == 20 and record["masks"]["images"]["name"] == "even"
    for other in (None, "odd"):
        changed = FeatureCache.open(cache.layout.root).masked(images=other)
        with pytest.raises(InputError, match=r"masks\.images"):
            train_one(changed, tmp_path / "images", STUDENT, settings, tmp_path / "run")


@pytest.mark.parametrize("kind", ["text", "numbers", "bools"])
def test_a_file_of_rows_becomes_a_mask(cache, tmp_path, kind):
    path = tmp_path / ("keep.txt" if kind == "text" else "keep.npy")
    rows = np.flatnonzero(EVEN)
    if kind == "text":
        path.write_text("".join(f"{row}\n" for row in rows))
    else:
        np.save(path, rows if kind == "numbers" else EVEN)
    assert "keeps 20 of 40 images" in mask_from_file(cache.layout.root, "even", "images", path)
    assert np.array_equal(read_mask(cache.layout, read_manifest(cache.layout), "images", "even", 40), EVEN)


@pytest.mark.parametrize(
    ("text", "message"), [("1\n40\n", "rows 1 to 40; wanted 0 to 39"), ("one\n", "not row numbers"), ("-1", "rows -1")]
)
def test_a_file_of_other_things_does_not(cache, tmp_path, text, message):
    (tmp_path / "keep.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        mask_from_file(cache.layout.root, "even", "images", tmp_path / "keep.txt")
    with pytest.raises(InputError, match="wanted images or sentences"):
        mask_from_file(cache.layout.root, "even", "pictures", tmp_path / "keep.txt")
