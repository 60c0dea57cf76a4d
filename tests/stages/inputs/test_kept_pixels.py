"""Kept pixels in whole jobs: stage one, later additions, growth, proof and repair, siblings, and what a run takes."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

import dimefm.stages.embed.pack_pixels
import dimefm.stages.models.load_teacher
from dimefm.cache import CacheError, DimefmError, FeatureCache, InputError
from dimefm.cache.disk.layout import Layout
from dimefm.cache.version.manifest import file_entry, read_manifest, write_manifest
from dimefm.cache.version.schema import FileEntry, Origin
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.upkeep.append import append_to
from dimefm.pipeline.upkeep.inspect import inspect, inspect_lines
from dimefm.pipeline.upkeep.plan import describe_plan, plan_lines
from dimefm.pipeline.upkeep.repair.repair import repair
from dimefm.pipeline.upkeep.verify import verify
from dimefm.stages.inputs.image_source import row_keys
from dimefm.stages.inputs.kept_pixels import choose_pixels
from dimefm.stages.run_folder.run_record import check_same_training
from dimefm.stages.sample.replay import OWN
from dimefm.stages.settings.distill import DistillSettings

from ...support.commands import tree
from ...support.worlds import make_world, picture

PIXELS = 'pixels = "jpeg-24"'
PACKS = [f"pixels/jpeg-24/{shard:06d}.pack" for shard in range(8)]


def ask(config: Path, pixels: str | None = PIXELS) -> Path:
    """A config with another `cache.pixels`."""
    lines = [line for line in config.read_text().splitlines() if not line.startswith("pixels =")]
    lines.insert(lines.index("shard_rows = 4") + 1, pixels or "")
    config.write_text("\n".join(lines))
    return config


def stage_one(config: Path) -> FeatureCache:
    cache_teacher(load_config(config))
    return FeatureCache.open(config.parent / "cache")


def damage(world: Path) -> None:
    (world / "images/1/004.jpg").write_bytes(b"")
    config = world / "run.toml"
    config.write_text(config.read_text().replace('"images/"', '"images/"\nmax_failed = 0.2'))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher):
    """30 images of 32 pixels, one unreadable, kept at 24; and the same cache without pixels."""
    config = make_world(tmp_path_factory.mktemp("kept"), tiny_teacher)
    damage(config.parent)
    stage_one(config)
    (config.parent / "cache").rename(config.parent / "bare")
    stage_one(ask(config))
    return config


def copied(finished, folder, cache):
    world = folder / "world"
    shutil.copytree(finished.parent, world, copy_function=shutil.copy2)
    if cache == "bare":
        shutil.rmtree(world / "cache")
        (world / "bare").rename(world / "cache")
    (world / "cache/log/config.json").write_text(json.dumps({"config": str(world / "run.toml")}))
    return world / "run.toml"


@pytest.fixture
def config(finished, tmp_path):
    return copied(finished, tmp_path, "cache")


@pytest.fixture
def bare(finished, tmp_path):
    """A finished cache without pixels, and a config that asks for them."""
    return copied(finished, tmp_path, "bare")


@pytest.fixture
def no_teacher(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(dimefm.stages.models.load_teacher, "load_teacher", refuse)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def rewrite(root, name, data):
    """A pack as a wrong program would have left it, checksums and all."""
    layout = Layout(root)
    manifest = read_manifest(layout)
    old = manifest.files[name].digest
    (root / name).write_bytes(data)
    entry = file_entry(root / name)
    journal = (root / "log/shards.jsonl").read_text()
    (root / "log/shards.jsonl").write_text(journal.replace(old, entry.digest))
    write_manifest(layout, manifest.replace(files=manifest.files | {name: entry}))


def test_stage_one_keeps_every_training_image_that_has_an_embedding_and_no_other(config):
    cache = FeatureCache.open(config.parent / "cache")
    failed = set(range(30)) - set(cache.images.usable.tolist())
    assert len(failed) == 1 and cache.pixels is not None and len(cache.pixels) == 30
    for row, source in enumerate(cache.images.rows.column("source").to_pylist()):
        if row in failed:
            with pytest.raises(CacheError, match="no kept pixels"):
                cache.pixels.read(row)
            continue
        (config.parent / "one.jpg").write_bytes(cache.pixels.read(row))
        with Image.open(config.parent / "one.jpg") as small, Image.open(config.parent / "images" / source) as image:
            assert small.size == (24, 24)
            means = [np.asarray(picture.convert("RGB")).mean(axis=(0, 1)) for picture in (small, image)]
            np.testing.assert_allclose(*means, atol=4)
    manifest = read_manifest(cache.layout)
    assert sorted(name for name in manifest.files if "pixels" in name) == PACKS
    for name in PACKS:
        data = (config.parent / "cache" / name).read_bytes()
        assert manifest.files[name] == FileEntry(bytes=len(data), digest=xxhash.xxh3_128(data).hexdigest())
    assert json.loads((config.parent / "cache/plan.json").read_bytes())["pixels"] == "jpeg-24"


def test_keeping_pixels_changes_no_byte_of_anything_else(config):
    bare, kept = tree(config.parent / "bare"), tree(config.parent / "cache")
    differ = {name for name in bare.keys() | kept if bare.get(name) != kept.get(name)}
    assert differ == {*PACKS, "plan.json", "manifest.json", "manifest.xxh3"}


def test_pixels_are_added_to_a_finished_cache_without_the_teacher_as_the_same_bytes(bare, no_teacher):
    root = bare.parent / "cache"
    before = tree(root)
    cache = stage_one(bare)
    after = tree(root)
    assert {name for name in before if after.get(name) != before[name]} == {"manifest.json", "manifest.xxh3"}
    assert cache.manifest.version == 2 and cache.identity == FeatureCache.open(root).identity
    assert verify(root)["sound"]
    stage_one(bare)
    assert tree(root) == after


def test_what_is_added_later_is_what_stage_one_would_have_kept(finished, bare):
    stage_one(bare)
    for name in PACKS:
        assert (bare.parent / "cache" / name).read_bytes() == (finished.parent / "cache" / name).read_bytes()


def test_an_addition_that_was_stopped_goes_on_and_is_no_damage_meanwhile(bare, finished, monkeypatch):
    root = bare.parent / "cache"
    original, kept = dimefm.pipeline.stage_one.add_pixels.pack_shard, []

    def stop_at_third(*arguments):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(arguments)
        return original(*arguments)

    monkeypatch.setattr("dimefm.pipeline.stage_one.add_pixels.pack_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        stage_one(bare)
    found = verify(root)
    assert found["sound"] and any("3 packs" in note for note in found["notes"])
    assert repair(root)["mended"] == {} and FeatureCache.open(root).pixels is None
    monkeypatch.setattr(
        "dimefm.pipeline.stage_one.add_pixels.pack_shard", lambda *rest: kept.append(rest) or original(*rest)
    )
    stage_one(bare)
    assert len(kept) == 8
    assert {n: d for n, d in tree(root).items() if n in PACKS} == {
        n: d for n, d in tree(finished.parent / "cache").items() if n in PACKS
    }


@pytest.mark.parametrize("what", ["gone", "changed", "folder"])
def test_pixels_of_an_image_that_is_no_longer_what_was_embedded_are_not_added(bare, what):
    image = bare.parent / "images/0/003.jpg"
    if what == "folder":
        (bare.parent / "images").rename(bare.parent / "elsewhere")
    elif what == "gone":
        image.unlink()
    else:
        picture((1, 2, 3), 77).resize((50, 50)).save(image)
    before = tree(bare.parent / "cache")
    with pytest.raises(InputError, match="not at hand" if what == "folder" else r"0/003\.jpg: its pixels cannot"):
        stage_one(bare)
    after = tree(bare.parent / "cache")
    assert {n: d for n, d in after.items() if not n.startswith("pixels/")} == before


def test_another_setting_is_refused_by_name_and_none_leaves_everything_as_it_is(config, no_teacher):
    before = tree(config.parent / "cache")
    with pytest.raises(CacheError, match=r"cache\.pixels = jpeg-24, but this run asks for jpeg-16"):
        stage_one(ask(config, 'pixels = "jpeg-16"'))
    assert stage_one(ask(config, None)).pixels.setting == "jpeg-24"
    assert tree(config.parent / "cache") == before


def test_an_unfinished_cache_is_finished_as_it_was_begun(config):
    for name in ("manifest.json", "manifest.xxh3"):
        (config.parent / "cache" / name).unlink()
    for other, named in (('pixels = "jpeg-16"', "jpeg-16"), (None, "nothing")):
        with pytest.raises(CacheError, match=rf"cache\.pixels = jpeg-24, but this run asks for {named}"):
            stage_one(ask(config, other))


@pytest.mark.parametrize("value", ['"jpeg-0"', '"jpeg-15"', '"jpeg-4097"', '"jpeg-0256"', '"png-256"', '"jpeg"', "256"])
def test_a_setting_that_cannot_be_kept_is_refused_with_the_keys_name(config, value):
    with pytest.raises(InputError, match=r"cache\.pixels: "):
        load_config(ask(config, f"pixels = {value}"))


def test_a_damaged_pack_is_found_and_made_again_from_the_images_alone(config, no_teacher):
    root = config.parent / "cache"
    whole = tree(root)
    flip(root / PACKS[1])
    (root / PACKS[7]).unlink()
    found = {finding["where"]: finding for finding in verify(root)["findings"]}
    assert {where: (f["kind"], f["rows"]) for where, f in found.items()} == {
        PACKS[1]: ("changed", [[4, 7]]),
        PACKS[7]: ("missing", [[28, 29]]),
    }
    done = repair(root)
    assert set(done["mended"]) == {PACKS[1], PACKS[7]} and done["left"] == [] and done["version"] == 1
    assert tree(root) == whole


@pytest.mark.parametrize("what", ["a row without pixels", "offsets", "no JPEG"])
def test_a_pack_that_was_written_wrong_is_found_although_its_checksum_is_right(config, what, no_teacher):
    root = config.parent / "cache"
    whole = (root / PACKS[2]).read_bytes()
    jpegs, table = bytearray(whole[:-40]), np.frombuffer(whole[-40:], "<u8").copy()
    if what == "a row without pixels":
        table[1] = 0
    elif what == "offsets":
        table[2] = table[3] + 1
    else:
        jpegs[int(table[2])] ^= 1
    rewrite(root, PACKS[2], bytes(jpegs) + table.tobytes())
    (finding,) = verify(root)["findings"]
    assert (finding["kind"], finding["where"]) == ("pixels", PACKS[2])
    assert finding["rows"] == {"a row without pixels": [[8, 8]], "offsets": [[8, 11]], "no JPEG": [[10, 10]]}[what]
    done = repair(root)
    assert done["left"] == [] and done["version"] == 2 and verify(root)["sound"]
    assert (root / PACKS[2]).read_bytes() == whole


def test_a_pack_that_the_manifest_does_not_list_is_missed_and_made(config, no_teacher):
    root = config.parent / "cache"
    layout = Layout(root)
    manifest = read_manifest(layout)
    write_manifest(layout, manifest.replace(files={n: e for n, e in manifest.files.items() if n != PACKS[3]}))
    (root / PACKS[3]).unlink()
    (finding,) = verify(root)["findings"]
    assert (finding["kind"], finding["where"], finding["rows"]) == ("pixels", PACKS[3], [[12, 15]])
    assert repair(root)["left"] == [] and verify(root)["sound"]
    assert read_manifest(layout).files[PACKS[3]] == manifest.files[PACKS[3]]


def test_a_pack_whose_images_are_gone_is_left_and_said_to_be(config, no_teacher):
    root = config.parent / "cache"
    flip(root / PACKS[0])
    image = config.parent / "images/0/000.jpg"
    image.rename(config.parent / "000.jpg")
    (left,) = repair(root)["left"]
    assert left["where"] == PACKS[0] and "0/000.jpg" in left["repair"] and "gone" in left["repair"]
    (config.parent / "images").rename(config.parent / "elsewhere")
    (left,) = repair(root)["left"]
    assert "not at hand" in left["repair"]
    (config.parent / "elsewhere").rename(config.parent / "images")
    (config.parent / "000.jpg").rename(image)
    assert repair(root)["left"] == [] and verify(root)["sound"]


def test_another_encoder_makes_a_new_version_that_says_so(config, no_teacher, monkeypatch):
    root = config.parent / "cache"
    flip(root / PACKS[5])
    monkeypatch.setattr(dimefm.stages.embed.pack_pixels, "QUALITY", 60)
    done = repair(root)
    assert done["left"] == [] and done["version"] == 2 and verify(root)["sound"]
    origin = read_manifest(Layout(root)).origins["pixels/jpeg-24"]["5"]
    assert origin == Origin(by="repair", libraries={"pillow": version("pillow")})
    assert FeatureCache.open(root).pixels.read(20).startswith(b"\xff\xd8")


def test_an_embedding_that_is_lost_leaves_its_pixels_and_they_are_made_again_with_it(config):
    root = config.parent / "cache"
    whole = tree(root)
    (root / "teacher.zarr/images/embedding/c/2/0").unlink()
    config.rename(config.with_name("elsewhere.toml"))
    assert repair(root)["lost"] == {"images/embedding": [[8, 10]]} and verify(root)["sound"]
    config.with_name("elsewhere.toml").rename(config)
    flip(root / PACKS[2])
    assert repair(root)["left"] == [] and verify(root)["sound"]
    assert tree(root)[PACKS[2]] == whole[PACKS[2]]


def test_append_goes_on_with_the_packs_and_early_readers_go_on_with_theirs(config):
    root = config.parent / "cache"
    early = FeatureCache.open(root)
    last = (root / PACKS[7]).read_bytes()
    rows = [row for row in early.images.usable.tolist() if row % 3]
    wanted = [early.pixels.read(row) for row in rows[:-2]]
    for i in range(7):
        path = config.parent / "images/9" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture((200, 100, 10), 600 + i).save(path)
    append_to(root, ask(config, None))
    cache = FeatureCache.open(root)
    assert len(cache.pixels) == 37 and verify(root)["sound"]
    assert (root / PACKS[7]).read_bytes().startswith(last[:-40])
    assert [cache.pixels.read(row) for row in rows[:-2]] == wanted
    assert [early.pixels.read(row) for row in rows] == [cache.pixels.read(row) for row in rows]
    (config.parent / "cache").rename(config.parent / "grown")
    stage_one(ask(config))
    for shard in range(10):
        name = f"pixels/jpeg-24/{shard:06d}.pack"
        assert (root / name).read_bytes() == (config.parent / "grown" / name).read_bytes()


def test_append_refuses_another_setting_and_does_not_add_pixels(bare, capsys):
    picture((200, 100, 10), 600).save(bare.parent / "images/new.png")
    append_to(bare.parent / "cache", bare)
    assert "`dimefm cache-teacher` adds them" in capsys.readouterr().err
    assert FeatureCache.open(bare.parent / "cache").pixels is None
    assert stage_one(bare).pixels.read(30).startswith(b"\xff\xd8")
    with pytest.raises(CacheError, match=r"cache\.pixels = jpeg-24"):
        append_to(bare.parent / "cache", ask(bare, 'pixels = "jpeg-32"'))


def test_an_append_does_not_grow_from_a_damaged_pack(config):
    flip(config.parent / "cache" / PACKS[7])
    picture((200, 100, 10), 600).save(config.parent / "images/new.png")
    with pytest.raises(CacheError, match=r"000007\.pack: damaged .* repair"):
        append_to(config.parent / "cache", config)


def sibling(config: Path, pixels: str | None) -> Path:
    """Another teacher's config over the same rows: here the same one, in batches of another size."""
    second = config.with_name("second.toml")
    text = ask(config, pixels).read_text().replace("batch_size = 4", "batch_size = 5")
    second.write_text(text.replace('dir = "cache"', 'dir = "second"\nrows = "cache"'))
    ask(config)
    return second


def test_a_cache_that_shares_rows_reads_the_pixels_of_the_other_or_keeps_its_own(config):
    first = FeatureCache.open(config.parent / "cache")
    cache_teacher(load_config(sibling(config, None)))
    second = FeatureCache.open(config.parent / "second")
    assert not (config.parent / "second/pixels").exists()
    assert [second.pixels.read(row) for row in second.images.usable[:5]] == [
        first.pixels.read(row) for row in first.images.usable[:5]
    ]
    assert inspect(config.parent / "second")["pixels"]["own"] is False
    cache_teacher(load_config(sibling(config, 'pixels = "jpeg-16"')))
    second = FeatureCache.open(config.parent / "second")
    assert second.pixels.setting == "jpeg-16" and verify(config.parent / "second")["sound"]
    flip(config.parent / "second/pixels/jpeg-16/000001.pack")
    assert repair(config.parent / "second", config.with_name("second.toml"))["left"] == []


def test_inspect_shows_them(config):
    found = inspect(config.parent / "cache")
    size = sum((config.parent / "cache" / name).stat().st_size for name in PACKS)
    assert found["pixels"] == {"setting": "jpeg-24", "own": True, "packs": 8, "mean_bytes": size / 29}
    assert found["bytes"]["pixels"] == size
    assert any(line.startswith("pixels: jpeg-24, ") for line in inspect_lines(found))
    assert inspect(config.parent / "bare")["pixels"] is None


def test_plan_counts_them_before_and_while_they_are_kept(bare, no_teacher):
    found = describe_plan(load_config(bare))
    assert (found["state"], found["rows_left"]) == ("unfinished", 0)
    # A picture of 24 px is thought to take 24 x 24 x 4/3 pixels of 0.4 bytes, or what its file has; 8 bytes of table.
    sizes = [path.stat().st_size for path in (bare.parent / "images").rglob("*.jpg")]
    estimate = int(sum(min(size, 24 * 24 * 4 / 3 * 0.4) for size in sizes)) + 8 * 30
    assert found["pixels"] == {"setting": "jpeg-24", "rows": 30, "packs": 8, "packs_done": 0} | {
        "estimated_bytes": estimate
    }
    without = describe_plan(load_config(ask(bare, None)))
    assert without["pixels"] is None and without["state"] == "finished"
    assert found["disk"]["cache_bytes"] - without["disk"]["cache_bytes"] == estimate
    assert any("an estimate" in line for line in plan_lines(found))
    assert "left: nothing to embed; pixels to keep, without the teacher" in plan_lines(found)
    stage_one(ask(bare))
    done = describe_plan(load_config(bare))
    assert (done["state"], done["pixels"]["packs_done"]) == ("finished", 8)
    shutil.rmtree(bare.parent / "cache")
    assert describe_plan(load_config(bare))["pixels"]["estimated_bytes"] == estimate


def test_a_disk_that_is_too_small_for_them_is_refused_before_the_first(bare, monkeypatch):
    full = shutil.disk_usage(bare)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"takes about .* free"):
        stage_one(bare)
    assert not (bare.parent / "cache/pixels").exists()


def test_a_manifest_that_was_lost_comes_back_with_pixels_that_were_added_later(bare):
    stage_one(bare)
    root = bare.parent / "cache"
    wanted = read_manifest(Layout(root))
    shutil.rmtree(root / "log/spare")
    (root / "manifest.json").unlink()
    ask(bare, None)
    assert repair(root)["left"] == []
    found = read_manifest(Layout(root))
    assert found.pixels == wanted.pixels and found.files.keys() == wanted.files.keys()


def test_a_run_takes_kept_pixels_where_there_are_any_and_stays_with_what_it_began_with(config):
    kept, bare = (FeatureCache.open(config.parent / name) for name in ("cache", "bare"))
    assert choose_pixels("auto", bare) is None and choose_pixels("files", kept) is None
    for setting in ("auto", "kept"):
        source = choose_pixels(setting, kept)
        assert source.name == "jpeg-24" and source.read(row_keys(source, None)([5])[0]) == kept.pixels.read(5)
    assert choose_pixels("auto", kept, began_with="files") is None
    assert choose_pixels("auto", kept, began_with="jpeg-24").name == "jpeg-24"
    for setting, cache, began in (("kept", bare, None), ("auto", bare, "jpeg-24"), ("auto", kept, "jpeg-16")):
        with pytest.raises(InputError, match=r"distill\.pixels"):
            choose_pixels(setting, cache, began)


def test_students_learn_from_kept_pixels_when_the_originals_are_gone(config):
    (config.parent / "images").rename(config.parent / "elsewhere")
    loaded = load_config(config)
    distill(loaded, ["small"], stop_after=1)
    record = json.loads((config.parent / "runs/small/run.json").read_bytes())
    assert record["pixels"] == "jpeg-24"
    distill(loaded, ["small"], stop_after=1)
    lines = (config.parent / "runs/small/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    (config.parent / "cache" / PACKS[4]).unlink()
    with pytest.raises(DimefmError, match=r"000004\.pack"):
        distill(loaded, ["small"])


def test_a_run_is_not_continued_on_other_pixels(tmp_path):
    settings = DistillSettings().model_dump(mode="json", exclude={"output", "workers", "device", "pixels"})
    same = {"name": "small", "distill": settings, "student": {"small": {"text": "teacher"}}, "views": {"policy": OWN}}
    check_same_training(tmp_path, same, same | {"pixels": "files"})  # a run from before there was a choice
    with pytest.raises(InputError, match="pixels = 'files', but this run asks for 'jpeg-24'"):
        check_same_training(tmp_path, same, same | {"pixels": "jpeg-24"})
    with pytest.raises(InputError, match="pixels = 'jpeg-24', but this run asks for 'files'"):
        check_same_training(tmp_path, same | {"pixels": "jpeg-24"}, same | {"pixels": "files"})
