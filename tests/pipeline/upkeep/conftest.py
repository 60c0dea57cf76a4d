"""Finished caches for the commands on a cache: one is made, each test gets a copy of its world."""

import json
import shutil

import pytest

import dimefm.stages.models.load_teacher

from ...support.growing import stage_one
from ...support.worlds import make_world


@pytest.fixture(scope="package")
def finished(tmp_path_factory, tiny_teacher):
    """Config of 30 images and 22 sentences in shards of 4, cached: the last shard of each side is half full."""
    config = make_world(tmp_path_factory.mktemp("finished"), tiny_teacher)
    stage_one(config)
    return config


@pytest.fixture
def config(finished, tmp_path):
    """The config of a copied world, which the copied cache remembers."""
    world = tmp_path / "world"
    shutil.copytree(finished.parent, world, copy_function=shutil.copy2)
    (world / "cache/log/config.json").write_text(json.dumps({"config": str(world / "run.toml")}))
    return world / "run.toml"


@pytest.fixture
def root(config):
    """The cache of a copied world."""
    return config.parent / "cache"


@pytest.fixture
def no_teacher(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(dimefm.stages.models.load_teacher, "load_teacher", refuse)
