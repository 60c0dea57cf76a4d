"""Readers of a cache that grows: those that have it open, and those that come at any moment."""

import shutil
import subprocess
import sys

import numpy as np

from dimefm.cache import FeatureCache

from ...support.growing import add_images, add_lines, grow


def test_a_reader_that_had_the_old_version_open_goes_on_undisturbed(config):
    old = FeatureCache.open(config.parent / "cache")
    copy = shutil.copytree(config.parent / "cache", config.parent / "copy")
    add_images(config.parent, [f"0/new{i}.png" for i in range(5)])
    add_lines(config.parent, "a new line")
    new = grow(config)
    kept = FeatureCache.open(copy)
    assert len(new.images) == 35 and len(new.sentences) == 23
    assert np.array_equal(old.images.embeddings[:], kept.images.embeddings[:])
    assert np.array_equal(old.images.usable, kept.images.usable) and len(old.sentences.usable) == 22
    assert np.array_equal(old.pairs("image_to_sentence").ids[:], kept.pairs("image_to_sentence").ids[:])
    assert old.images.rows.take([29], "source") == kept.images.rows.take([29], "source")
    assert old.version == kept.version != new.version and old.identity == kept.identity != new.identity


def test_a_reader_has_its_pairs_even_when_two_more_versions_have_come(config):
    """The files of the version before last are removed; a map that is open keeps what it maps."""
    old, wanted = FeatureCache.open(config.parent / "cache"), {}
    for direction in ("image_to_sentence", "sentence_to_image"):
        wanted[direction] = FeatureCache.open(config.parent / "cache").pairs(direction).ids[:]
    for line in ("a second version", "a third version"):
        add_lines(config.parent, line)
        grow(config)
    assert not (config.parent / "cache/pairs.zarr").exists()
    for direction, ids in wanted.items():
        assert np.array_equal(old.pairs(direction).ids[:], ids) and np.isfinite(old.pairs(direction).scores[:]).all()


READER = """
import os
import sys
from pathlib import Path
import numpy as np
from dimefm.cache import FeatureCache
root, stop, lengths, parent = Path(sys.argv[1]), Path(sys.argv[2]), [], os.getppid()
while not stop.exists() and os.getppid() == parent:
    cache = FeatureCache.open(root)
    embeddings, ids = cache.images.embeddings[:], cache.pairs("image_to_sentence").ids[:]
    assert np.isfinite(embeddings).all() and len(embeddings) == len(ids) == len(cache.images.usable)
    assert ids.max() < len(cache.sentences) and (ids >= 0).all()
    lengths.append(len(embeddings))
    if len(lengths) == 1:
        print("reading", flush=True)
print(*sorted(set(lengths)))
"""


def test_readers_that_come_at_any_moment_find_one_version_whole(config):
    words = [sys.executable, "-c", READER, str(config.parent / "cache"), str(config.parent / "stop")]
    readers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [reader.stdout.readline() for reader in readers] == ["reading\n"] * 2
    for i in range(2):
        add_images(config.parent, [f"0/new{i}_{j}.png" for j in range(3)])
        add_lines(config.parent, f"a new line {i}")
        grow(config)
    (config.parent / "stop").touch()
    for reader in readers:
        lengths = reader.communicate(timeout=60)[0].split()
        assert reader.returncode == 0 and lengths[0] == "30" and set(lengths) <= {"30", "33", "36"}
