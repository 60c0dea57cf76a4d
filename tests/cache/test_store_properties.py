"""Whatever the sequence of growing, crashing, going on, masking and opening again: what was written is read back.

A teacher that is a formula stands in for a model, so that every embedding is known by hand: of a picture of one colour
that colour, of a sentence its length and number. A crash is an exception from the n-th fsync or rename.
"""

import os
import shutil
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from PIL import Image

from dimefm.cache import CacheError, FeatureCache
from dimefm.cache.disk.durable import PARTIAL, digest
from dimefm.cache.disk.layout import Layout
from dimefm.cache.reader.masks import add_mask, mask_names, read_mask
from dimefm.cache.version.manifest import read_manifest
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_one.cluster.worker_side import TEACHERS
from dimefm.pipeline.upkeep.append import append
from dimefm.stages.embed.shard import embed_shard

from ..support import formula_teacher
from ..support.formula_teacher import sentence_embedding

CONFIG = """
[teacher]
model = "formula_teacher:load"
batch_size = 2
workers = 1
device = "cpu"
[images]
source = "images/"
max_failed = 1.0
[sentences]
source = ["captions.txt"]
[cache]
dir = "cache"
shard_rows = 3
[pairs]
k = 2
"""


moments = st.none() | st.integers(1, 60) | st.integers(60, 240) | st.integers(240, 500)
"""The n-th step to crash at: an append of this size has 150 to 500 of them, the last third moves files into place."""


class Crash(BaseException):
    """The machine stopped here."""


def run_shards(tasks, settings, weights, scheduler, limits=None):
    """As `dispatch.run_shards`, without Dask: this loop runs some hundred times."""
    teacher, lock = TEACHERS.get(settings, torch.device("cpu"), weights)
    for task in tasks:
        yield embed_shard(task, teacher, settings, lock)


@contextmanager
def crashing_at(step):
    """Raise at the n-th of all moments before and after an fsync or a rename; never for None. Nothing is synced."""
    replace, steps = os.replace, 0

    def count():
        nonlocal steps
        steps += 1
        if steps == step:
            raise Crash

    def fsync(handle):
        count()
        count()

    def counted_replace(source, target):
        count()
        replace(source, target)
        count()

    with patch.object(os, "fsync", fsync), patch.object(os, "replace", counted_replace):
        yield


class Store(RuleBasedStateMachine):
    """A cache, its sources, and what must be in it."""

    def __init__(self):
        super().__init__()
        self.patches = ExitStack()
        for name, value in {
            "pipeline.stage_one.cluster.dispatch.run_shards": run_shards,
            "pipeline.stage_one.cache_teacher._check_teacher": lambda *arguments: None,
        }.items():
            self.patches.enter_context(patch(f"dimefm.{name}", value))
        self.patches.enter_context(patch.object(sys, "path", [str(Path(formula_teacher.__file__).parent), *sys.path]))
        self.folder = Path(tempfile.mkdtemp())
        self.config = self.folder / "run.toml"
        self.config.write_text(CONFIG)
        self.layout = Layout(self.folder / "cache")
        self.embeddings, self.lines = {}, []  # source -> embedding or None; sentences in order
        self.order = []  # sources, as the last version that was seen has them
        self.masks, self.readers, self.k = {}, [], 2
        self.add_images([3, 200, 90])
        self.add_lines(2)

    def teardown(self):
        self.write(None)
        self.write(None)  # the first may have gone on with an older list
        cache = FeatureCache.open(self.layout.root)
        assert set(cache.images.rows.column("source").to_pylist()) == set(self.embeddings)
        assert len(cache.sentences) == len(self.lines)
        assert not self.layout.next.root.exists()
        self.what_is_there_is_what_was_written()
        self.patches.close()
        shutil.rmtree(self.folder)

    @property
    def finished(self):
        return self.layout.manifest.exists()

    @rule(reds=st.lists(st.integers(0, 255), min_size=1, max_size=4))
    def add_images(self, reds):
        for red in reds:
            number = len(self.embeddings)
            path = self.folder / "images" / f"{red:03d}_{number}.png"  # sorts anywhere
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (2, 2), (red, number % 256, 7)).save(path)
            self.embeddings[path.name] = [red, number % 256, 7, 1]

    @rule()
    def add_a_broken_image(self):
        name = f"{len(self.embeddings)}_broken.jpg"
        (self.folder / "images" / name).write_bytes(b"")
        self.embeddings[name] = None

    @rule(number=st.integers(1, 4))
    def add_lines(self, number):
        new = [f"sentence {len(self.lines) + i} {'x' * i}" for i in range(number)]
        self.lines += new
        with (self.folder / "captions.txt").open("a") as file:
            file.writelines(f"{line}\n" for line in new)

    @rule(crash=moments)
    def write(self, crash):
        with self.surviving(crash):
            if self.finished:
                append(load_config(self.config), self.layout)
            else:
                cache_teacher(load_config(self.config))

    @precondition(lambda self: self.finished)
    @rule(crash=moments)
    def retrieve_with_another_k(self, crash):
        self.config.write_text(self.config.read_text().replace(f"k = {self.k}", f"k = {3 - self.k}"))
        self.k = 3 - self.k
        with self.surviving(crash):
            cache_teacher(load_config(self.config))

    @precondition(lambda self: self.finished)
    @rule(seed=st.integers(0, 99), crash=st.none() | st.integers(1, 40))
    def mask(self, seed, crash):
        cache, name = FeatureCache.open(self.layout.root), f"m{len(self.masks)}"
        keep = np.random.default_rng(seed).random(len(cache.images)) < 0.5
        try:
            with crashing_at(crash):
                add_mask(self.layout, "images", name, keep)
            self.masks[name] = keep
        except Crash:
            if name in mask_names(read_manifest(self.layout), "images"):
                self.masks[name] = keep
        except ValueError as error:  # a killed append that was decided came into force when the lock was taken
            assert "wanted bool" in str(error)

    @precondition(lambda self: self.finished)
    @rule()
    def keep_a_reader(self):
        cache = FeatureCache.open(self.layout.root)
        self.readers = [*self.readers[-2:], (cache, cache.images.embeddings[:], cache.sentences.embeddings[:])]

    @contextmanager
    def surviving(self, crash):
        try:
            with crashing_at(crash):
                yield
        except Crash:
            (self.layout.root / f".half.{PARTIAL}").write_bytes(b"half a file")

    @invariant()
    def what_is_there_is_what_was_written(self):
        if not self.finished:
            with pytest.raises(CacheError):
                FeatureCache.open(self.layout.root)
            return
        cache = FeatureCache.open(self.layout.root)
        sources = cache.images.rows.column("source").to_pylist()
        assert sources[: len(self.order)] == self.order  # rows never move, and none is lost
        self.order = sources
        wanted = [self.embeddings[source] or [np.nan] * 4 for source in sources]
        np.testing.assert_array_equal(cache.images.embeddings[:], np.array(wanted, dtype=np.float16))
        assert cache.images.usable.tolist() == [i for i, source in enumerate(sources) if self.embeddings[source]]
        texts = cache.sentences.rows.column("text").to_pylist()
        assert texts == self.lines[: len(texts)]
        wanted = np.array([sentence_embedding(text) for text in texts], dtype=np.float16)
        np.testing.assert_array_equal(cache.sentences.embeddings[:], wanted)
        assert len(cache.pairs("image_to_sentence").ids) == len(sources)
        assert len(cache.pairs("sentence_to_image").scores) == len(texts)

    @invariant()
    def every_file_has_its_checksum(self):
        if self.finished and not self.layout.next.manifest.exists():
            for name, entry in read_manifest(self.layout).files.items():
                assert digest((self.layout.root / name).read_bytes()) == entry.digest, name

    @invariant()
    def masks_are_what_they_were(self):
        if self.finished:
            manifest = read_manifest(self.layout)
            assert set(self.masks) == set(mask_names(manifest, "images"))
            for name, keep in self.masks.items():
                found = read_mask(self.layout, manifest, "images", name, len(self.order))
                assert np.array_equal(found[: len(keep)], keep) and not found[len(keep) :].any()

    @invariant()
    def readers_go_on(self):
        for cache, images, sentences in self.readers:
            np.testing.assert_array_equal(cache.images.embeddings[:], images)
            np.testing.assert_array_equal(cache.sentences.embeddings[:], sentences)
            assert len(cache.images.rows.column("source")) == len(images)


def check(max_examples, steps):
    run_state_machine_as_test(
        Store,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_sequence_reads_back_what_was_written():
    check(max_examples=12, steps=12)


@pytest.mark.acceptance
def test_many_sequences_read_back_what_was_written():
    check(max_examples=400, steps=30)
