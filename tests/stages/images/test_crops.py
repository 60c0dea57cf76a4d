"""Crops beside the centre: which they are, what the teacher makes of them, and how a cache with them lives."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from dimefm.cache import CacheError, FeatureCache, InputError
from dimefm.cache.disk.arrays import ArraySpec, attempt_chunk, declare_arrays, write_chunk
from dimefm.cache.disk.layout import IMAGES, Layout
from dimefm.cache.disk.mapped import MappedArray
from dimefm.cache.reader.feature_cache import draws_from_rounded_sizes
from dimefm.cache.version.schema import Plan, Views
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.append import append
from dimefm.pipeline.upkeep.plan import describe_plan
from dimefm.pipeline.upkeep.repair.repair import repair
from dimefm.pipeline.upkeep.verify import verify
from dimefm.stages.counter_random import key_of, uniforms
from dimefm.stages.devices import resolve_device
from dimefm.stages.images.crops import NUM_UNIFORMS, Crops, crop_box, crop_of
from dimefm.stages.images.jpeg import OpenJpeg
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.settings.cache import CropSettings

from ...support.commands import refused, run_dimefm, tree
from ...support.worlds import make_world, picture

K = 2
CHUNK = "teacher.zarr/images/embedding/c/2/0/0"


def with_views(config: Path, more: str = "", text: str | None = None) -> Path:
    """Ask for crops in a config; `text` is what to begin with, if not what is there."""
    new = f"shard_rows = 4\nviews = {K}\n{more}[cache.crops]\nflip = true\n"
    config.write_text((text or config.read_text()).replace("shard_rows = 4\n", new))
    return config


@pytest.fixture(scope="module")
def center(tmp_path_factory, tiny_teacher) -> Path:
    """A world of 10 images and 7 sentences, one image unreadable, without crops."""
    config = make_world(tmp_path_factory.mktemp("center"), tiny_teacher, num_images=10, num_sentences=7)
    config.write_text(config.read_text().replace('"images/"', '"images/"\nmax_failed = 0.2', 1))
    (config.parent / "images/1/004.jpg").write_bytes(b"no image")
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8)).save(
        config.parent / "images/2/002.jpg", quality=95
    )
    cache_teacher(load_config(config))
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, center) -> Path:
    """The same world with two crops of each image and kept pixels."""
    world = tmp_path_factory.mktemp("views") / "world"
    shutil.copytree(center.parent, world, copy_function=shutil.copy2, ignore=shutil.ignore_patterns("cache"))
    config = with_views(world / "run.toml", 'pixels = "jpeg-24"\n')
    cache_teacher(load_config(config))
    return config


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "world", copy_function=shutil.copy2)
    (tmp_path / "world/cache/log/config.json").write_text(json.dumps({"config": str(tmp_path / "world/run.toml")}))
    return tmp_path / "world/run.toml"


def test_a_crop_is_a_function_of_seed_row_view_and_size():
    crops, again = Crops(3, CropSettings(flip=True)), Crops(3, CropSettings(flip=True))
    assert crops.of_row(7, (120, 90)) == again.of_row(7, (120, 90))
    assert crops.of_row(7, (120, 90))[:2] == Crops(2, CropSettings(flip=True)).of_row(7, (120, 90))
    others = [crops.of_row(8, (120, 90)), Crops(3, CropSettings(flip=True, seed=1)).of_row(7, (120, 90))]
    assert all(crops.of_row(7, (120, 90)) != other for other in others)
    assert len({crop.box for crop in crops.of_row(7, (120, 90))}) == 3


def test_boxes_are_shares_of_the_sides_drawn_as_torchvision_draws_them():
    # crop_box has torchvision's distribution (test_augment.py); a crop is that box over width and height
    settings = CropSettings(scale=(0.3, 0.9))
    numbers = uniforms(key_of(0, "crops"), np.array([5]), np.array([1]), NUM_UNIFORMS)[0].tolist()
    left, top, right, bottom = crop_box(200, 100, (0.3, 0.9), (0.75, 4 / 3), numbers)
    (first, *_) = Crops(1, settings).of_row(5, (200, 100))
    assert first.box == (left / 200, top / 100, right / 200, bottom / 100)
    assert crop_of(settings, (200, 100), numbers) == first
    assert np.allclose(first.on((400, 200)), np.array([left, top, right, bottom]) * 2)


def test_one_view_of_an_array_is_an_array_over_the_same_files(tmp_path, monkeypatch):
    spec = ArraySpec((150, 3, 32), "float16", 64)
    values = np.random.default_rng(0).normal(size=spec.shape).astype(np.float16)
    declare_arrays(tmp_path, {"rows": spec})
    for chunk in range(3):
        write_chunk(tmp_path, "rows", spec, chunk, values[chunk * 64 : chunk * 64 + 64])
    rows, views = np.random.default_rng(1).integers(0, 150, 400), np.random.default_rng(2).integers(0, 3, 400)
    joined = MappedArray.open(tmp_path, "rows")
    monkeypatch.setattr("dimefm.cache.disk.mapped.map_side_by_side", lambda paths, chunk_bytes: None)
    for array in (joined, MappedArray.open(tmp_path, "rows")):
        assert array.num_views == 3 and array.view(1).shape == (150, 32)
        assert np.array_equal(array.view(1)[rows], values[rows, 1])
        assert np.array_equal(array.view(2)[10:140:7], values[10:140:7, 2])
        assert np.array_equal(array.at(rows, views), values[rows, views])
        assert np.array_equal(np.concatenate([block for _, block in array.view(2).blocks()]), values[:, 2])
        with pytest.raises(IndexError):
            array.at(np.array([0]), np.array([3]))
        with pytest.raises(IndexError):
            array.view(0)[[150]]


def test_the_centre_has_the_bytes_that_it_has_alone(center, finished):
    alone, beside = FeatureCache.open(center.parent / "cache"), FeatureCache.open(finished.parent / "cache")
    assert alone.images.views is None and beside.images.views.shape == (10, 1 + K, 32)
    assert np.array_equal(alone.images.embeddings[:], beside.images.embeddings[:], equal_nan=True)
    assert np.array_equal(alone.sentences.embeddings[:], beside.sentences.embeddings[:], equal_nan=True)
    for direction in ("image_to_sentence", "sentence_to_image"):
        assert np.array_equal(alone.pairs(direction).ids[:], beside.pairs(direction).ids[:])
    assert "views" not in alone.plan and alone.identity != beside.identity
    stored = zarr.open_array(finished.parent / "cache/teacher.zarr/images/embedding", mode="r")
    assert stored.chunks == (4, 1 + K, 32) and stored.dtype == np.float16


def test_crops_are_what_the_teacher_makes_of_that_part_of_the_picture(finished):
    """Cut and turned by Pillow and NumPy, embedded alone, against what the cache holds."""
    config = load_config(finished)
    teacher, cache = load_teacher(config.teacher, resolve_device("cpu")), FeatureCache.open(config.cache.dir)
    flipped = 0
    for row in cache.images.usable:
        picture_of = Image.open(config.images.source / cache.images.rows.take([int(row)], "source")[0]).convert("RGB")
        for view in range(1, 1 + K):
            numbers = uniforms(key_of(0, "crops"), np.array([row]), np.array([view]), NUM_UNIFORMS)[0].tolist()
            box = crop_box(*picture_of.size, (0.65, 1.0), (0.75, 4 / 3), numbers)
            pixels = np.asarray(picture_of.resize((32, 32), Image.Resampling.BICUBIC, box=box))
            if numbers[-1] < 0.5:
                pixels, flipped = pixels[:, ::-1], flipped + 1
            live = teacher.encode_images(teacher.normalise(torch_of(pixels)))[0].numpy()
            stored = cache.images.views.at(np.array([row]), np.array([view]))[0].astype(np.float32)
            cosine = live @ stored / np.linalg.norm(live) / np.linalg.norm(stored)
            assert cosine > 0.99999, (row, view)
    assert 0 < flipped < K * len(cache.images.usable)


def torch_of(pixels: np.ndarray):
    import torch

    return torch.from_numpy(pixels.copy())[None]


def test_an_unreadable_image_has_no_view(finished):
    cache = FeatureCache.open(finished.parent / "cache")
    (failed,) = set(range(10)) - set(cache.images.usable.tolist())
    assert np.isnan(cache.images.views[[failed]]).all() and np.isfinite(cache.images.views[cache.images.usable]).all()


def test_a_kept_picture_that_was_made_smaller_says_from_what(finished):
    cache = FeatureCache.open(finished.parent / "cache")
    sizes = {}
    for row in cache.images.usable.tolist():
        source = cache.images.rows.take([row], "source")[0]
        sizes[source] = OpenJpeg.open(cache.pixels.read(row)).original_size
    assert sizes.pop("2/002.jpg") == (120, 90)
    assert set(sizes.values()) == {(32, 32)}
    with Image.open(io.BytesIO(cache.pixels.read(int(cache.images.usable[0])))) as image:
        assert image.info["comment"] == b"dimefm: made from 32 x 32 pixels"


def test_interrupted_anywhere_it_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    world = tmp_path / "world"
    shutil.copytree(finished.parent, world, ignore=shutil.ignore_patterns("cache"), copy_function=shutil.copy2)
    written = 0

    def stop_after_two(*arguments):
        nonlocal written
        written += 1
        if written > 2:
            raise RuntimeError("the machine went away")
        return attempt_chunk(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("dimefm.stages.embed.shard.attempt_chunk", stop_after_two)
        with pytest.raises(RuntimeError, match="the machine went away"):
            cache_teacher(load_config(world / "run.toml"))
    assert not (world / "cache/manifest.json").exists()
    cache_teacher(load_config(world / "run.toml"))
    assert tree(world / "cache") == tree(finished.parent / "cache")


def test_what_is_appended_is_what_one_run_makes(copy, finished, tmp_path, tiny_teacher):
    for i in range(3):
        picture((10, 200, 90 + i), 900 + i).save(copy.parent / f"images/2/z{i}.jpg")
    loaded = load_config(copy)
    append(loaded, Layout(loaded.cache.dir))
    assert verify(loaded.cache.dir)["sound"]
    grown = FeatureCache.open(loaded.cache.dir)
    before = FeatureCache.open(finished.parent / "cache").images.views
    assert np.array_equal(grown.images.views[:10], before[:], equal_nan=True)
    shutil.rmtree(loaded.cache.dir)
    cache_teacher(loaded)
    at_once = FeatureCache.open(loaded.cache.dir)
    assert np.array_equal(grown.images.views[:], at_once.images.views[:], equal_nan=True)


def test_a_damaged_crop_is_found_and_mended_to_the_same_bytes(copy, capsys):
    root = copy.parent / "cache"
    whole, path = tree(root), root / CHUNK
    data = bytearray(path.read_bytes())
    data[2 * 32 * 2 + 5] ^= 0x10  # the third view of the shard's first row
    path.write_bytes(data)
    found = verify(root)
    assert [finding["where"] for finding in found["findings"]] == [CHUNK]
    repair(root)
    assert tree(root) == whole and verify(root)["sound"]


def test_the_teacher_is_held_against_every_view(copy):
    root = copy.parent / "cache"
    found = verify(root, teacher=True)
    assert found["sound"] and found["teacher"][IMAGES]["rows"] == 9
    assert found["teacher"][IMAGES]["cosine"]["least"] > 0.99999
    # Other crops than those that the plan names: the centre is right, every crop is not.
    plan = Plan.read(root / "plan.json")
    plan = plan.replace(views=plan.views.replace(crops={**plan.views.crops, "seed": 5}))
    (root / "plan.json").write_bytes(plan.to_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimefm.pipeline.upkeep.verify.read_trusted", trusted_with(plan))
        assert not verify(root, teacher=True)["sound"]


def trusted_with(plan):
    from dataclasses import replace

    from dimefm.cache.audit.verify import read_trusted
    from dimefm.cache.version.schema import Plan

    return lambda layout, report: replace(read_trusted(layout, report), plan=Plan.model_validate(plan))


def test_a_second_policy_is_a_sibling_over_the_same_rows(copy, finished):
    other = copy.with_name("other.toml")
    text = (
        copy.read_text().replace('dir = "cache"', 'dir = "sibling"\nrows = "cache"').replace("flip = true", "seed = 4")
    )
    other.write_text(text.replace('pixels = "jpeg-24"\n', "").replace(f"views = {K}", "views = 1"))
    cache_teacher(load_config(other))
    first, second = (FeatureCache.open(copy.parent / name) for name in ("cache", "sibling"))
    assert second.images.views.shape == (10, 2, 32) and second.pixels.setting == "jpeg-24"
    assert np.array_equal(first.images.embeddings[:], second.images.embeddings[:], equal_nan=True)
    assert not np.array_equal(first.images.views.view(1)[:], second.images.views.view(1)[:], equal_nan=True)
    assert verify(copy.parent / "sibling")["sound"]


def test_pictures_that_another_cache_kept_without_crops_are_known_not_to_say_their_size(center, copy, tmp_path):
    shutil.copytree(center.parent, tmp_path / "centre", copy_function=shutil.copy2)
    config = tmp_path / "centre/run.toml"
    text = config.read_text()
    config.write_text(text.replace("shard_rows = 4\n", 'shard_rows = 4\npixels = "jpeg-24"\n'))
    cache_teacher(load_config(config))
    other = with_views(config.with_name("other.toml"), 'rows = "cache"\n', text.replace('"cache"', '"sibling"'))
    cache_teacher(load_config(other))
    cache = FeatureCache.open(tmp_path / "centre/sibling")
    assert cache.pixels.setting == "jpeg-24" and draws_from_rounded_sizes(cache)
    row = cache.images.rows.column("source").to_pylist().index("2/002.jpg")
    assert OpenJpeg.open(cache.pixels.read(row)).original_size is None
    assert not draws_from_rounded_sizes(FeatureCache.open(copy.parent / "cache"))


def test_what_says_which_crops_travels_to_other_machines():
    crops = Crops(K, CropSettings(scale=(0.2, 0.8), seed=9))
    assert pickle.loads(pickle.dumps(crops)) == crops
    assert Crops.read(Views(count=K, crops=crops.settings.model_dump(mode="json"))) == crops


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        (f"views = {K}\n", "views = 3\n", "cache.views = 2"),
        (f"views = {K}\n", "", "cache.views = 2"),
        ("flip = true", "seed = 1", "cache.crops.flip = true"),
        ("flip = true", "flip = true\nscale = [0.5, 1.0]", "cache.crops.scale = [0.65, 1.0]"),
    ],
)
def test_other_views_are_another_cache(copy, capsys, old, new, key):
    text = copy.read_text().replace(old, new)
    if not new:
        text = text.replace("[cache.crops]\nflip = true\n", "")
    copy.write_text(text)
    assert key in refused(capsys, "cache-teacher", copy)


def test_a_cache_without_crops_is_not_given_some(center, tmp_path):
    shutil.copytree(center.parent, tmp_path / "world", copy_function=shutil.copy2)
    config = with_views(tmp_path / "world/run.toml")
    with pytest.raises(CacheError, match=r"made with cache\.views = center, but this run asks for 2"):
        cache_teacher(load_config(config))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("views = 0", "from 1 to 64"),
        ("views = 65", "from 1 to 64"),
        ('views = "centre"', "cache.views"),
        ("views = true", "cache.views"),
        ("[cache.crops]\nflip = true", "set views"),
        ("views = 2\n[cache.crops]\nscale = [0.9, 0.1]", "0 < low <= high"),
        ("views = 2\n[cache.crops]\nscales = [0.9, 0.1]", "did you mean scale"),
    ],
)
def test_views_that_make_no_sense_are_refused_with_the_key(tmp_path, tiny_teacher, line, says):
    config = make_world(tmp_path, tiny_teacher, num_images=2, num_sentences=2)
    config.write_text(config.read_text().replace("shard_rows = 4\n", f"shard_rows = 4\n{line}\n"))
    with pytest.raises(InputError, match=says) as found:
        load_config(config)
    assert ": cache" in str(found.value)


def test_plan_and_inspect_count_the_views(copy, center, capsys):
    described = describe_plan(load_config(copy))
    assert described["arrays"][IMAGES]["views"] == 1 + K and described["arrays"][IMAGES]["bytes"] == 3 * 4 * 3 * 32 * 2
    shown = run_dimefm(capsys, "cache", "inspect", copy.parent / "cache").out
    assert f"views: the centre and {K} crops of each image" in shown and "flip" in shown
    assert "views: the centre alone" in run_dimefm(capsys, "cache", "inspect", center.parent / "cache").out
    shutil.rmtree(copy.parent / "cache")
    assert describe_plan(load_config(copy))["arrays"][IMAGES]["views"] == 1 + K


def test_the_plan_names_the_decoder(finished):
    from PIL import features

    decoder = FeatureCache.open(finished.parent / "cache").crops.decoder
    assert decoder["pillow"] == Image.__version__
    assert decoder["libjpeg"].removeprefix("turbo ") in (features.version("jpg"), features.version("libjpeg_turbo"))
