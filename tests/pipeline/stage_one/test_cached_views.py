"""Views replayed: the very crops that stage one embedded, each against its own embedding, with no drift between."""

import io
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw

from dimefm.cache import FeatureCache, InputError
from dimefm.cache.disk.layout import IMAGES, SENTENCES
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.upkeep.plan import describe_plan
from dimefm.stages.devices import resolve_device
from dimefm.stages.embed.image_rows import RowCrops, embed_image_shard
from dimefm.stages.embed.pack_pixels import make_small
from dimefm.stages.images.crops import Crops
from dimefm.stages.images.decode import decode_image
from dimefm.stages.images.views import ViewMaker, make_views
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.load.batches import BatchLoader
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.sample.order import Draw, Share, Stream
from dimefm.stages.sample.replay import OWN, Replay, Replayed, choose_replay
from dimefm.stages.settings.cache import CropSettings
from dimefm.stages.settings.distill import AugmentSettings, DistillSettings
from dimefm.stages.settings.models import TeacherSettings

from ...support.training import TIMES
from ...support.worlds import make_world

K = 3
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_teacher) -> Path:
    """A finished cache with three crops of each of 18 images, which are wider than the teacher's 32 pixels."""
    path = make_world(tmp_path_factory.mktemp("views"), tiny_teacher, num_images=18, num_sentences=12)
    for i, file in enumerate(sorted((path.parent / "images").rglob("*.jpg"))):
        photo(i, 60 + 4 * i, 80).save(file, quality=92)
    text = path.read_text().replace("shard_rows = 4\n", f"shard_rows = 4\nviews = {K}\n[cache.crops]\nflip = true\n")
    path.write_text(text.replace("epochs = 2", "epochs = 3"))
    cache_teacher(load_config(path))
    return path


@pytest.fixture
def cache(config) -> FeatureCache:
    return FeatureCache.open(config.parent / "cache")


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Soft colours with shapes in them: edges and gradients, as photos have, that turning or mirroring would show."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height), BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = random.integers(0, width), random.integers(0, height)
        shape = (int(x), int(y), int(x + random.integers(2, width // 2)), int(y + random.integers(2, height // 2)))
        (draw.ellipse if random.random() < 0.5 else draw.rectangle)(shape, tuple(random.integers(0, 256, 3).tolist()))
    return image


def replay_of(cache: FeatureCache, count: int = K, seed: int = 0) -> Replay:
    return Replay(Crops.read(cache.crops), count, seed)


def test_n_passes_see_n_views_and_begin_anywhere():
    replay, rows = Replay(Crops(8, CropSettings()), 5, seed=3), np.arange(1000)
    views = np.array([replay.views(rows, np.full_like(rows, p)) for p in range(10)])
    assert all(sorted(of_row) == [1, 2, 3, 4, 5] for of_row in views[:5].T.tolist())
    assert np.array_equal(views[:5], views[5:])
    # Where rows begin is uniform: 1000 rows over 5 views, 200 each, standard deviation 12.6
    assert np.abs(np.bincount(views[0], minlength=6)[1:] - 200).max() < 60
    assert not np.array_equal(views[0], Replay(Crops(8, CropSettings()), 5, seed=4).views(rows, np.zeros_like(rows)))


def test_processes_take_the_views_that_one_takes(cache):
    replay = replay_of(cache)
    stream = Stream(cache.images.usable, 8, 0, "images")
    whole = Replayed(stream, replay).draw(5)
    parts = [Replayed(Share(stream, rank, 2), replay).draw(5) for rank in range(2)]
    assert np.array_equal(np.concatenate([part.views for part in parts]), whole.views)


@pytest.mark.parametrize("processes", [False, True])
def test_a_batch_has_the_crops_that_pillow_cuts_and_their_own_embeddings(config, cache, processes):
    source = load_config(config).images.source
    stream = Replayed(Stream(cache.images.usable, 8, 0, "images"), replay_of(cache))
    crops = Crops.read(cache.crops)
    maker = ViewMaker(crops.settings, 24, BICUBIC, replays=True)
    bank = Stream(cache.images.usable, 4, 1, "bank")
    loader = BatchLoader(
        cache.images,
        stream,
        ImageFolder(source),
        [maker],
        crops.key,
        bank=bank,
        workers=2,
        processes=processes,
    )
    flipped = 0
    with loader:
        for batch in loader.batches(0, 4):
            stored = cache.images.views[batch.rows][np.arange(8), batch.views]
            assert np.array_equal(batch.targets.numpy(), stored)
            assert np.array_equal(batch.bank.numpy(), cache.images.views[bank.draw(batch.step).rows][:, 0])
            for row, view, seen in zip(batch.rows, batch.views, batch.images[0].numpy()):
                whole = Image.open(source / cache.images.rows.take([int(row)], "source")[0]).convert("RGB")
                crop = crops.of_row(int(row), whole.size)[view - 1]
                wanted = np.asarray(whole.resize((24, 24), BICUBIC, box=crop.on(whole.size), reducing_gap=2.0))
                flipped += crop.flip
                assert np.array_equal(seen, wanted[:, ::-1] if crop.flip else wanted)
    assert 0 < flipped < 32


def test_settings_choose_crops(cache, tmp_path, tiny_teacher):
    def chosen(**keys) -> Replay | None:
        return choose_replay(DistillSettings(**keys), cache)

    assert chosen().count == K and chosen(views=2).count == 2 and chosen(views=0) is None
    assert chosen(views=0, augment=AugmentSettings(flip=True)) is None
    with pytest.raises(InputError, match=r"distill\.views = 4: .* holds 3 crops of each image; wanted at most 3"):
        chosen(views=4)
    with pytest.raises(InputError, match=r"distill\.augment: is set, but 3 crops are replayed"):
        chosen(augment=AugmentSettings(flip=True))


def test_a_cache_of_the_centre_alone_has_nothing_to_replay(world):
    cache, _ = world
    assert choose_replay(DistillSettings(), cache) is None
    with pytest.raises(InputError, match=r"distill\.views = 1: .* holds the centre of each image alone"):
        choose_replay(DistillSettings(views=1), cache)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def in_folder(config: Path, output: Path, *changes: tuple[str, str]):
    text = config.read_text().replace('output = "runs"', f'output = "{output}"')
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    other = config.with_name(f"{output.name}.toml")
    other.write_text(text)
    return load_config(other)


def test_a_run_says_what_it_replays_repeats_when_it_goes_on_and_refuses_other_views(config, tmp_path):
    whole = in_folder(config, tmp_path / "whole")
    distill(whole, ["small"])
    record = json.loads((tmp_path / "whole/small/run.json").read_text())
    flips = {"scale": [0.65, 1.0], "ratio": [0.75, 4 / 3], "flip": True, "seed": 0}
    assert record["views"] == {"policy": "replay", "count": K, "crops": flips}
    assert "libjpeg" in record["versions"] and "views" not in record["distill"]
    parts = in_folder(config, tmp_path / "parts")
    distill(parts, ["small"], stop_after=2)
    distill(parts, ["small"])
    assert metrics(tmp_path / "parts/small") == metrics(tmp_path / "whole/small")
    fewer = in_folder(config, tmp_path / "parts", ("epochs = 3", "epochs = 3\nviews = 2"))
    with pytest.raises(InputError, match=r"views\.count = 3, but this run asks for 2"):
        distill(fewer, ["small"])


def test_a_view_is_held_against_the_other_views_where_there_are_some(config, tmp_path):
    related = ("pvl = 0.3", "pvl = 0.3\nviews = 0.5")
    run = in_folder(config, tmp_path / "related", related)
    distill(run, ["small"])
    first = metrics(tmp_path / "related/small")[0]
    assert first["views"] > 0 and 1 < first["views_candidates"] <= 8 * (K - 1)
    weights = {name: weight for name, weight in run.distill.loss.model_dump().items() if name in first}
    assert weights["views"] == 0.5
    assert first["loss"] == pytest.approx(sum(weight * first[name] for name, weight in weights.items()), rel=1e-5)
    alone = in_folder(config, tmp_path / "alone", related, ("epochs = 3", "epochs = 3\nviews = 1"))
    with pytest.raises(InputError, match=r"distill\.loss\.views: .* but 1 crops are replayed"):
        distill(alone, ["small"])


def test_crops_that_the_cache_does_not_hold_are_named_and_runs_of_before_are_of_that_kind(config, tmp_path):
    own = in_folder(config, tmp_path / "own", ("epochs = 3", "epochs = 3\nviews = 0"))
    distill(own, ["small"], stop_after=2)
    path = tmp_path / "own/small/run.json"
    record = json.loads(path.read_text())
    assert record["views"] == {"policy": OWN}
    del record["views"]
    path.write_text(json.dumps(record))
    distill(own, ["small"], stop_after=1)
    with pytest.raises(InputError, match=r"views\.policy = 'own crops against the centre view'"):
        distill(in_folder(config, tmp_path / "own"), ["small"])


# Drift: what the teacher makes of the view that stage two replays, at the teacher's own size, against what is stored.

SIZES = {"its own size": (32, 32), "small": (48, 36), "tall": (50, 90), "wide": (230, 60), "reduced": (560, 420)}
"""The last one is decoded at a quarter or an eighth of its size."""
ORIENTATIONS = (1, 3, 6, 8, 5)


def jpeg(image: Image.Image, orientation: int = 1, quality: int = 92) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, exif=exif)
    return out.getvalue()


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    settings = TeacherSettings(model=str(tiny_teacher[0]), pretrained=str(tiny_teacher[1]), precision="fp32")
    return load_teacher(settings, resolve_device("cpu"))


def drift(teacher, folder: Path, files: list[bytes], kept: int | None = None) -> np.ndarray:
    """(images, K) cosines: stored crops, and live ones of the views that stage two makes of the same files."""
    crops, rows = Crops(K, CropSettings(flip=True)), np.arange(len(files))
    paths = [folder / f"{i}.jpg" for i in rows]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    stored = embed_image_shard(
        teacher, ImageFolder(Path()), paths, 8, 1, Lock(), None, RowCrops(crops, rows)
    ).embeddings[:, 1:]
    maker = ViewMaker(crops.settings, 32, BICUBIC, replays=True)
    seen = np.empty((len(files), K, 32, 32, 3), np.uint8)
    for row, data in enumerate(files):
        if kept is not None:
            data = make_small(data, decode_image(data), kept, note_size=True)
        for view in range(K):
            numbers = crops.numbers(np.array([row]), np.array([view + 1]))[0].tolist()
            seen[row, view] = make_views([maker], data, numbers)[0]
    live = teacher.encode_images(teacher.normalise(torch.from_numpy(seen.reshape(-1, 32, 32, 3)))).numpy()
    live, wide = live.reshape(stored.shape), stored.astype(np.float32)
    return (live * wide).sum(-1) / np.linalg.norm(live, axis=-1) / np.linalg.norm(wide, axis=-1)


@pytest.mark.parametrize("size", SIZES)
def test_the_live_teacher_sees_in_the_replayed_view_what_is_stored(teacher, tmp_path, size):
    files = [jpeg(photo(i, *SIZES[size]), ORIENTATIONS[i % 5]) for i in range(10)]
    assert drift(teacher, tmp_path, files).min() >= 0.9999


def test_what_is_no_jpeg_is_replayed_likewise(teacher, tmp_path):
    files = []
    for i in range(4):
        out = io.BytesIO()
        photo(i, 120, 90).save(out, "PNG" if i % 2 else "WEBP")
        files.append(out.getvalue())
    assert drift(teacher, tmp_path, files).min() >= 0.9999


@pytest.mark.parametrize(("kept", "least"), [(128, 0.9995), (64, 0.999), (48, 0.998)])
def test_kept_pictures_cost_what_the_docs_say_and_no_more(teacher, tmp_path, kept, least):
    files = [jpeg(photo(i, 400, 300), ORIENTATIONS[i % 5]) for i in range(8)]
    assert least <= drift(teacher, tmp_path, files, kept).min() <= drift(teacher, tmp_path, files).min()


def test_the_bound_would_show_another_crop(teacher, tmp_path, monkeypatch):
    files = [jpeg(photo(i, 48, 36)) for i in range(6)]
    monkeypatch.setattr("dimefm.stages.images.views.is_flipped", lambda numbers: numbers[-1] >= 0.5)
    assert drift(teacher, tmp_path, files).max() < 0.9999


def test_draws_without_views_are_as_they_were():
    assert Draw(np.arange(2), np.zeros(2, dtype=np.int64)).views is None


def test_kept_pictures_are_replayed_on_the_same_part_of_the_picture():
    """Of a picture kept at 64 pixels, boxes are those of the original: not those that its rounded size would give."""
    crops = Crops(K, CropSettings(scale=(0.3, 1.0)))
    maker = ViewMaker(crops.settings, 32, BICUBIC, replays=True)
    original = photo(1, 403, 301)
    data = jpeg(original)
    small = make_small(data, decode_image(data), 64, note_size=True)
    width, height = Image.open(io.BytesIO(small)).size
    for view, crop in enumerate(crops.of_row(0, (403, 301)), start=1):
        numbers = crops.numbers(np.array([0]), np.array([view]))[0].tolist()
        assert maker.box((width, height), numbers, (403, 301)) == crop.on((width, height))
        on_original = np.asarray(original.resize((32, 32), BICUBIC, box=crop.on((403, 301)))).astype(float)
        seen = make_views([maker], small, numbers)[0].astype(float)
        assert np.abs(seen - on_original).mean() < 8 < 20 < np.abs(seen[:, ::-1] - on_original).mean()


def test_time_left_counts_an_image_once_for_each_of_its_views(config, tmp_path, monkeypatch):
    bars = []

    @contextmanager
    def watched(title, total, unit, done=0, **_):
        bars.append((title, total, done, updates := []))
        yield SimpleNamespace(update=updates.append)

    monkeypatch.setattr("dimefm.pipeline.stage_one.embed_shards.bar", watched)
    shutil.copytree(config.parent, tmp_path / "again", ignore=shutil.ignore_patterns("manifest*", "pairs*", "index"))
    again = load_config(tmp_path / "again" / config.name)
    journal, timings = (again.cache.dir / "log" / name for name in ("shards.jsonl", "timings.jsonl"))
    lines = [line for line in journal.read_text().splitlines(keepends=True) if '"pairs' not in line]
    # 18 images of 1 + 3 views, 12 sentences, 12 labelled images, 4 class vectors; left: 2 images, 12 sentences
    shards = [(json.loads(line)["array"], json.loads(line)["shard"]) for line in lines]
    kept = [line for line, (array, shard) in zip(lines, shards) if array != SENTENCES and (array, shard) != (IMAGES, 4)]
    journal.write_text("".join(kept))
    timings.write_text(json.dumps({"array": IMAGES, "shard": 0, "infer": 6.0, "wait": 2.0}) + "\n")
    # 4 rows of 4 views took 8 s, so 2 rows of 4 views and 12 rows of one take 0.5 s each
    assert describe_plan(again)["seconds_left"] == pytest.approx((2 * 4 + 12) * 0.5)
    cache_teacher(again)
    ((_, total, done, updates),) = bars
    assert (total, done) == (18 * 4 + 12 + 12 + 4, 16 * 4 + 12 + 4) and updates[-1] == total
    assert sorted(np.diff([done, *updates])) == [4, 4, 4, 8]
