"""Caches of a second teacher over the row tables of the first: made, grown, kept apart."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from dimefm.cache import FeatureCache, InputError
from dimefm.cache.audit.verify import verify_cache
from dimefm.cache.disk.layout import IMAGES
from dimefm.cache.disk.row_tables import read_own_failures

from ...support.commands import tree
from ...support.growing import add_images, add_lines, edit, grow, stage_one
from ...support.teachers import make_teacher
from ...support.worlds import COLOURS, picture


@pytest.fixture
def sibling(config, tmp_path):
    """A config beside the first: another teacher, a cache of its own, the rows of the first."""
    model, weights = make_teacher(tmp_path / "second", seed=7)
    text = config.read_text()
    for key, value in (("model", model), ("pretrained", weights)):
        line = next(line for line in text.splitlines() if line.startswith(key))
        text = text.replace(line, f'{key} = "{value}"', 1)
    path = config.with_name("second.toml")
    path.write_text(text.replace('dir = "cache"', 'dir = "second"\nrows = "cache"'))
    return path


def test_a_second_teacher_shares_the_row_tables_and_copies_none(config, sibling):
    first, second = FeatureCache.open(config.parent / "cache"), stage_one(sibling)
    assert not [path for path in (config.parent / "second").rglob("*.parquet") if path.name != "failed.parquet"]
    assert second.images.rows.column("source") == first.images.rows.column("source")
    assert pq.read_table(config.parent / "second/rows/sentences.parquet").num_rows == 22
    assert second.images.embeddings.shape == first.images.embeddings.shape
    assert not np.array_equal(second.images.embeddings[:], first.images.embeddings[:])
    assert verify_cache(config.parent / "second").findings == []
    assert second.plan.rows_of == "../cache" and second.pairs("image_to_sentence").ids.shape == (30, 3)
    assert "rows/images.parquet" not in second.manifest.files
    before = tree(config.parent / "second")
    stage_one(sibling)
    assert tree(config.parent / "second") == before


def test_a_sibling_grows_after_the_cache_whose_rows_it_shares(config, sibling):
    stage_one(sibling)
    add_images(config.parent, ["9/0.png", "9/1.png", "9/2.png"])
    add_lines(config.parent, "new")
    assert len(grow(sibling).images) == 30  # nothing has joined the shared tables yet
    grow(config)
    between = FeatureCache.open(config.parent / "second")
    assert len(between.images) == 30 and len(between.images.usable) == 30  # the longer table does not confuse it
    stage_one(sibling)
    cache = grow(sibling)
    assert len(cache.images) == 33 and len(cache.sentences) == 23
    assert np.isfinite(cache.images.embeddings[:]).all()
    assert verify_cache(config.parent / "second").findings == []


def test_another_view_of_the_same_images_is_a_sibling_too(config, tiny_teacher):
    """The same weights, but images squashed to the square instead of cropped: what open_clip calls a resize mode."""
    model, views = config.with_name("squash.json"), config.with_name("views.toml")
    document = {"model_cfg": json.loads(tiny_teacher[0].read_bytes()), "preprocess_cfg": {"resize_mode": "squash"}}
    model.write_text(json.dumps(document))
    text = config.read_text().replace(str(tiny_teacher[0]), str(model))
    views.write_text(text.replace('dir = "cache"', 'dir = "views"\nrows = "cache"'))
    picture(COLOURS["c_red"], 1).resize((96, 32)).save(config.parent / "images/9.png")
    grow(config)
    first, second = FeatureCache.open(config.parent / "cache"), stage_one(views)
    assert second.plan.rows_of == "../cache" and (config.parent / "views/rows").is_symlink()
    assert np.array_equal(second.images.embeddings[:30], first.images.embeddings[:30])  # square pictures
    assert not np.array_equal(second.images.embeddings[[30]], first.images.embeddings[[30]])
    assert np.array_equal(second.sentences.embeddings[:], first.sentences.embeddings[:])
    assert verify_cache(config.parent / "views").findings == []


def test_rows_that_fail_for_the_second_teacher_alone_are_kept_apart(config, sibling):
    edit(sibling, 'source = "images/"', 'source = "images/"\nmax_failed = 0.1')
    (config.parent / "images/0/006.jpg").write_bytes(b"")
    before = (config.parent / "cache/rows/images.parquet").read_bytes()
    cache = stage_one(sibling)
    (row,) = set(range(30)) - set(cache.images.usable.tolist())
    assert read_own_failures(config.parent / "second/failed.parquet") == {IMAGES: {row: "empty file"}}
    assert cache.manifest.arrays[IMAGES].reasons == {"empty file": 1}
    assert (config.parent / "cache/rows/images.parquet").read_bytes() == before
    assert len(FeatureCache.open(config.parent / "cache").images.usable) == 30


def test_a_sibling_wants_a_finished_cache_of_the_same_division(config, sibling):
    edit(sibling, "shard_rows = 4", "shard_rows = 8")
    with pytest.raises(InputError, match=r"cache\.shard_rows = 4, this config 8"):
        stage_one(sibling)
    edit(sibling, "shard_rows = 8", "shard_rows = 4")
    edit(sibling, 'rows = "cache"', 'rows = "elsewhere"')
    with pytest.raises(InputError, match="elsewhere: not a finished cache"):
        stage_one(sibling)
