"""A kill, a mended file and another try: what was made of the embeddings before must not outlive them."""

import numpy as np
import pytest

from dimefm.cache import FeatureCache
from dimefm.cache.audit.verify import verify_cache
from dimefm.cache.disk.row_tables import RowTable
from dimefm.cache.errors import CacheError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one import cache_teacher as stage_one
from dimefm.pipeline.stage_one import finish
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher

from ...support.worlds import make_world

BAD = "images/0/003.jpg"  # row 1
KEY = 'source = "images/"'


class KilledError(BaseException):
    """Goes through every handler, as a kill does."""


@pytest.fixture
def config(tmp_path, tiny_teacher):
    config = make_world(tmp_path, tiny_teacher, num_images=12, num_sentences=7)
    config.write_text(config.read_text().replace(KEY, f"{KEY}\nmax_failed = 0.5"))
    return config


@pytest.fixture
def killed(monkeypatch):
    """Run stage one, killed as it calls a function."""

    def run(config, where, name):
        def kill(*arguments, **others):
            raise KilledError

        with monkeypatch.context() as patched, pytest.raises(KilledError):
            patched.setattr(where, name, kill)
            cache_teacher(load_config(config))

    return run


def cut(config):
    """Spoil an image; returns what mends it."""
    path = config.parent / BAD
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return lambda: path.write_bytes(data)


def sharer_of(config):
    other = config.parent / "other.toml"
    text = config.read_text().replace('dir = "cache"', 'dir = "other"\nrows = "cache"')
    other.write_text(text.replace("batch_size = 4", "batch_size = 2"))
    return other


def require_whole(root):
    """Every row has its embedding and its pairs, and `verify` finds nothing."""
    assert verify_cache(root).findings == []
    cache = FeatureCache.open(root)
    assert len(cache.images.usable) == 12 and not np.isnan(cache.images.embeddings[:]).any()
    assert (cache.pairs("image_to_sentence").ids[:] >= 0).all() and cache.manifest.index["images"].rows == 12


def test_indexes_and_pairs_that_were_made_without_the_rows_are_made_again(config, killed):
    mend = cut(config)
    killed(config, finish, "put_in_force")
    mend()
    cache_teacher(load_config(config), retry=True)
    require_whole(config.parent / "cache")


def test_a_row_that_its_owner_mends_while_a_sharer_is_unfinished_has_failed_there(config, killed):
    mend = cut(config)
    cache_teacher(load_config(config))
    sharer = sharer_of(config)
    killed(sharer, stage_one, "finish_cache")
    mend()
    cache_teacher(load_config(config), retry=True)
    cache_teacher(load_config(sharer))
    root = config.parent / "other"
    assert verify_cache(root).findings == []
    assert FeatureCache.open(root).images.usable.tolist() == [0, *range(2, 12)]
    cache_teacher(load_config(sharer), retry=True)
    require_whole(root)


def test_a_sharers_own_failure_is_none_once_it_is_embedded(config, killed):
    cache_teacher(load_config(config))
    sharer, mend = sharer_of(config), cut(config)
    killed(sharer, finish, "write_pairs")
    mend()
    cache_teacher(load_config(sharer), retry=True)
    require_whole(config.parent / "other")


def test_of_images_that_are_embedded_again_the_table_says_what_they_are_by_then(config):
    config.write_text(config.read_text().replace("max_failed = 0.5", "max_failed = 0.01"))
    mend = cut(config)
    with pytest.raises(ValueError, match="retry-failed"):
        cache_teacher(load_config(config))
    mend()
    neighbour = config.parent / "images/0/000.jpg"
    neighbour.write_bytes((config.parent / "images/1/001.jpg").read_bytes())
    cache_teacher(load_config(config), retry=True)
    table = RowTable(config.parent / "cache/rows/images.parquet")
    assert table.take([0], "bytes") == [neighbour.stat().st_size]


def test_a_damaged_pack_is_not_sealed_with_a_new_checksum(config):
    config.write_text(config.read_text().replace('dir = "cache"', 'dir = "cache"\npixels = "jpeg-24"'))
    mend = cut(config)
    cache_teacher(load_config(config))
    mend()
    pack = config.parent / "cache/pixels/jpeg-24/000000.pack"
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)
    with pytest.raises(CacheError, match="damaged; run `dimefm cache repair"):
        cache_teacher(load_config(config), retry=True)
