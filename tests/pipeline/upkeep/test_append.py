"""Growth: what append takes in, what it leaves alone, and what it refuses. Killing it is test_kill.py's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dimefm.cache.version.versions
import dimefm.pipeline.upkeep.append
import dimefm.stages.models.load_teacher
import dimefm.stages.models.open_clip_teacher
from dimefm.cache import CacheError, FeatureCache, InputError
from dimefm.cache.audit.verify import verify_cache
from dimefm.cache.disk.arrays import chunk_path
from dimefm.cache.disk.durable import digest
from dimefm.cache.disk.layout import IMAGES, SENTENCES, Layout
from dimefm.cache.disk.row_tables import read_own_failures
from dimefm.cache.reader.masks import add_mask
from dimefm.cache.version.lock import writer_lock
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.stage_two.evaluate import evaluate
from dimefm.pipeline.upkeep.append import append, append_to

from ...support.teachers import make_teacher
from ...support.worlds import COLOURS, make_world, picture


def stage_one(config: Path) -> FeatureCache:
    loaded = load_config(config)
    cache_teacher(loaded)
    return FeatureCache.open(loaded.cache.dir)


def grow(config: Path) -> FeatureCache:
    loaded = load_config(config)
    append(loaded, Layout(loaded.cache.dir))
    return FeatureCache.open(loaded.cache.dir)


def add_images(world: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        path = world / "images" / name
        path.parent.mkdir(exist_ok=True)
        picture(list(COLOURS.values())[i % 4], 500 + i).save(path)


def add_lines(world: Path, *lines: str) -> None:
    with (world / "captions.txt").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def edit(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def tree(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    found = {path.relative_to(root).as_posix(): digest(path.read_bytes()) for path in files}
    return {name: value for name, value in found.items() if not name.startswith("log/")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher):
    """30 images and 22 sentences in shards of 4: the last shard of each side is half full."""
    config = make_world(tmp_path_factory.mktemp("finished"), tiny_teacher)
    stage_one(config)
    return config


@pytest.fixture
def config(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path / "world", copy_function=shutil.copy2)
    return tmp_path / "world" / "run.toml"


@pytest.fixture
def no_teacher(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(dimefm.stages.models.load_teacher, "load_teacher", refuse)


def test_rows_that_come_last_anyway_end_in_the_bytes_of_a_fresh_run_over_everything(config):
    """Same row numbers, so the same batches: not one bit may differ, in embeddings, rows, pairs and indexes."""
    world = config.parent
    add_images(world, [f"9/{i}.png" for i in range(7)])
    add_lines(world, "one more", " ", "two more", "three more")
    grow(config)
    shutil.move(world / "cache", world / "grown")
    stage_one(config)
    fresh, grown = tree(world / "cache"), tree(world / "grown")
    own = {"manifest.json", "manifest.xxh3", "plan.json"}
    compared = {name: name.replace("pairs.zarr", "pairs-2.zarr") for name in set(fresh) - own}
    compared |= {name: name.replace(".", "-2.") for name in compared if name.startswith("index/")}
    assert {name for name, there in compared.items() if fresh[name] != grown[there]} == set()
    assert len(compared) > 80


def test_rows_never_move_and_new_ones_follow_them(config):
    """New files that sort between the old ones get other batches than in a fresh run: cosine >= 0.999, not equal."""
    world = config.parent
    old = FeatureCache.open(world / "cache")
    sources, embeddings = old.images.rows.column("source").to_pylist(), old.images.embeddings[:]
    add_images(world, ["1/zzz.png", "0/aaa.png", "0/001_.png"])
    grown = grow(config)
    assert grown.images.rows.column("source").to_pylist() == [*sources, "0/001_.png", "0/aaa.png", "1/zzz.png"]
    assert np.array_equal(grown.images.embeddings[:30], embeddings)
    shutil.rmtree(world / "cache")
    fresh = stage_one(config)
    place = {source: row for row, source in enumerate(fresh.images.rows.column("source").to_pylist())}
    there = [place[source] for source in grown.images.rows.column("source").to_pylist()]
    ours, theirs = (rows.astype(np.float64) for rows in (grown.images.embeddings[:], fresh.images.embeddings[there]))
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() >= 0.999


def test_full_chunks_are_not_touched_and_the_last_one_begins_with_the_same_bytes(config):
    store = Layout(config.parent / "cache").teacher_zarr
    full, last = (chunk_path(store, IMAGES, chunk) for chunk in (6, 7))
    before, bytes_before = full.stat(), last.read_bytes()
    add_images(config.parent, ["9/0.png"])
    grow(config)
    assert (full.stat().st_ino, full.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    two_rows = 2 * 32 * 2  # 30 images are 7 chunks of 4 and 2 rows; a row is 32 float16
    assert last.read_bytes()[:two_rows] == bytes_before[:two_rows]
    assert last.read_bytes() != bytes_before


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


def test_what_the_version_before_last_left_behind_is_removed(config):
    root = config.parent / "cache"
    add_lines(config.parent, "a second version")
    assert (root / "pairs.zarr").exists() and "pairs.zarr/zarr.json" in grow(config).manifest.superseded
    assert (root / "pairs.zarr").exists()
    add_lines(config.parent, "a third version")
    grow(config)
    assert not (root / "pairs.zarr").exists() and not (root / "index/images.faiss").exists()
    manifest = FeatureCache.open(root).manifest
    assert set(tree(root)) == {*manifest.files, *manifest.superseded, "manifest.json", "manifest.xxh3"}
    assert manifest.version == 3 and manifest.plan_file == "plan-3.json"


def test_an_evaluation_set_joins_without_anything_else_being_made_again(config):
    world = config.parent
    shutil.copytree(world / "dev", world / "test")
    before = tree(world / "cache")
    config.write_text(
        config.read_text() + '[evaluate.test]\nimages="test/"\nclasses="classes.json"\ntemplates="openai"\n'
    )
    cache = grow(config)
    assert np.array_equal(cache.evaluate["test"].images.embeddings[:], cache.evaluate["dev"].images.embeddings[:])
    assert cache.evaluate["test"].head.shape == (4, 32) and len(cache.evaluate["test"].labels) == 12
    after = tree(world / "cache")
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"manifest.json", "manifest.xxh3"}
    assert not [name for name in after if "-2." in name and not name.startswith("plan")]
    assert len(stage_one(config).evaluate) == 2


def test_a_run_goes_on_and_is_scored_on_a_set_that_joined_since(config):
    distill(load_config(config), ["small"], stop_after=2)
    shutil.copytree(config.parent / "dev", config.parent / "test")
    config.write_text(
        config.read_text() + '[evaluate.test]\nimages="test/"\nclasses="classes.json"\ntemplates="openai"\n'
    )
    grow(config)
    distill(load_config(config), ["small"], stop_after=1)  # what it is trained from has not changed
    (scores,) = evaluate([config]).values()
    assert scores["test"]["cosine"] == scores["dev"]["cosine"] and scores["test"]["n"] == 12  # the same images


def test_new_lines_follow_the_prompts_and_new_prompts_follow_them(config):
    world = config.parent
    shutil.rmtree(world / "cache")
    edit(config, "[cache]", '[sentences.prompts]\nclasses = "more.json"\ntemplates = "templates.txt"\n[cache]')
    (world / "more.json").write_text(json.dumps({"b": ["boat"], "d": ["dog"]}))
    assert stage_one(config).sentences.rows.take([22], "text") == ["a boat picture"]
    (world / "more.json").write_text(json.dumps({"a": ["ant"], "b": ["boat"], "d": ["dog"]}))
    add_lines(world, "a new line")
    cache = grow(config)
    wanted = ["a boat picture", "something boat", "a dog picture", "something dog", "a new line", "a ant picture"]
    assert cache.sentences.rows.take(range(22, 28), "text") == wanted
    assert cache.sentences.rows.take([25, 26, 27], "origin") == ["prompts", "captions.txt", "prompts"]
    assert len(stage_one(config).sentences) == 29
    (world / "more.json").write_text(json.dumps({"a": ["ant"]}))
    with pytest.raises(CacheError, match="no longer makes 'a boat picture'"):
        grow(config)


def test_a_cache_finds_its_sources_by_itself(config):
    """By the config that made it, which its log names; another one may be given."""
    root = config.parent / "cache"
    add_lines(config.parent, "new")
    (root / "log/config.json").unlink()
    with pytest.raises(InputError, match="give --config"):
        append_to(root)
    assert append_to(root, config)
    add_lines(config.parent, "newer")
    assert append_to(root)
    assert len(FeatureCache.open(root).sentences) == 24


def test_nothing_new_touches_no_file_and_loads_no_teacher(config, no_teacher, capsys):
    before = tree(config.parent / "cache")
    grow(config)
    assert tree(config.parent / "cache") == before
    assert "nothing to append" in capsys.readouterr().err


def test_after_an_append_stage_one_is_finished(config, capsys):
    add_images(config.parent, ["0/new.png"])
    add_lines(config.parent, "new")
    grow(config)
    before = tree(config.parent / "cache")
    stage_one(config)
    assert tree(config.parent / "cache") == before
    said = capsys.readouterr().err
    assert said.rstrip().endswith("finished; nothing to do") and "appeared since" not in said


def test_a_new_image_that_cannot_be_read_costs_its_own_row(config):
    edit(config, 'source = "images/"', 'source = "images/"\nmax_failed = 0.1')
    add_images(config.parent, ["9/0.png", "9/1.png", "9/2.png"])
    (config.parent / "images/9/1.png").write_bytes(b"")
    cache = grow(config)
    assert set(range(33)) - set(cache.images.usable.tolist()) == {31}
    assert cache.images.rows.take([31], "reason") == ["empty file"]
    assert cache.manifest.arrays[IMAGES].to_dict() == {"rows": 33, "failed": 1, "reasons": {"empty file": 1}}
    assert np.isnan(cache.images.embeddings[[31]]).all()


def test_too_many_bad_images_stop_it_and_the_old_version_is_whole(config):
    before = tree(config.parent / "cache")
    add_images(config.parent, ["9/0.png"])
    (config.parent / "images/9/0.png").write_bytes(b"")
    with pytest.raises(InputError, match="max_failed"):
        grow(config)
    after = tree(config.parent / "cache")
    assert {name: value for name, value in after.items() if not name.startswith("next/")} == before


@pytest.fixture
def interrupted(config, monkeypatch):
    """An append that stopped when all was embedded and nothing was in force."""
    add_images(config.parent, ["9/0.png", "9/1.png", "9/2.png"])
    add_lines(config.parent, "new")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dimefm.pipeline.upkeep.append, "finish_cache", stop)
        with pytest.raises(KeyboardInterrupt):
            grow(config)
    return config


def test_until_it_is_decided_the_cache_is_the_old_one_byte_for_byte(interrupted, finished, no_teacher):
    wanted = tree(finished.parent / "cache")
    there = tree(interrupted.parent / "cache")
    assert {name: value for name, value in there.items() if not name.startswith("next/")} == wanted
    report = verify_cache(interrupted.parent / "cache")
    assert report.findings == [] and "next/" in report.notes[0]
    assert len(stage_one(interrupted).images) == 30
    cache = grow(interrupted)  # all shards are there: the teacher is not needed
    assert len(cache.images) == 33 and np.isfinite(cache.images.embeddings[:]).all()
    assert not (interrupted.parent / "cache/next").exists()


@pytest.mark.parametrize("moved", [0, 1, 20, 39])
def test_stopped_while_files_are_moved_into_place_the_old_rows_are_served_and_any_writer_finishes_it(
    interrupted, monkeypatch, moved
):
    root, left = interrupted.parent / "cache", moved
    before = FeatureCache.open(root)

    def move(source, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)

    with monkeypatch.context() as patched:
        patched.setattr(dimefm.cache.version.versions, "move_file", move)
        with pytest.raises(KeyboardInterrupt):
            grow(interrupted)
    between = FeatureCache.open(root)
    assert between.manifest == before.manifest
    assert np.array_equal(between.images.embeddings[:], before.images.embeddings[:])
    assert between.images.usable.tolist() == list(range(30)) and len(between.evaluate["dev"].labels) == 12
    report = verify_cache(root)
    assert report.findings == [] and "decided" in report.notes[0]
    add_mask(Layout(root), "sentences", "some", np.arange(23) < 9)  # of the new version's 23
    after = FeatureCache.open(root)
    assert len(after.images) == 33 and after.manifest.version == 3
    assert verify_cache(root).findings == [] and not (root / "next").exists()


def test_an_interrupted_append_goes_on_with_the_list_it_began_with(interrupted):
    add_images(interrupted.parent, ["9/later.png"])
    add_lines(interrupted.parent, "later")
    cache = grow(interrupted)
    assert len(cache.images) == 33 and len(cache.sentences) == 23
    cache = grow(interrupted)
    assert len(cache.images) == 34 and len(cache.sentences) == 24


def test_an_interrupted_append_whose_sources_have_changed_is_refused(interrupted):
    path = interrupted.parent / "captions.txt"
    path.write_text(path.read_text().replace("new", "changed"))
    with pytest.raises(CacheError, match=r"next: made from other lines: sentences\.source"):
        grow(interrupted)


def test_other_changes_of_the_cache_may_come_between(interrupted, no_teacher):
    """Another k makes version 2, so the append becomes version 3."""
    edit(interrupted, "k = 3", "k = 2")
    assert stage_one(interrupted).manifest.version == 2
    cache = grow(interrupted)
    assert cache.manifest.version == 3 and cache.pairs("image_to_sentence").ids.shape == (33, 2)
    files = set(tree(interrupted.parent / "cache"))
    assert files == {*cache.manifest.files, *cache.manifest.superseded, "manifest.json", "manifest.xxh3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda world: (world / "captions.txt").write_text("other\n" * 30), "does not begin with the 22 lines"),
        (lambda world: (world / "captions.txt").write_text("short\n"), "does not begin with the 22 lines"),
        (lambda world: edit(world / "run.toml", "batch_size = 4", "batch_size = 5"), r"teacher\.batch_size = 4"),
        (lambda world: edit(world / "run.toml", "shard_rows = 4", "shard_rows = 8"), r"cache\.shard_rows = 4"),
        (lambda world: edit(world / "run.toml", 'source = "images/"', 'source = "test/"'), "none of the 30 images"),
        (lambda world: (world / "templates.txt").write_text("an {}\n"), r"evaluate\.dev\.prompts"),
        (lambda world: (world / "cache/manifest.json").unlink(), "not a finished cache"),
    ],
    ids=["lines", "fewer", "teacher", "division", "folder", "prompts", "unfinished"],
)
def test_what_is_not_growth_is_refused(config, no_teacher, change, message):
    Image.new("RGB", (32, 32)).save(config.parent / "images/0/new.png")
    (config.parent / "test").mkdir()
    Image.new("RGB", (32, 32)).save(config.parent / "test/new.png")
    change(config.parent)
    before = tree(config.parent / "cache")
    with pytest.raises(CacheError, match=message):
        grow(config)
    assert tree(config.parent / "cache") == before


def test_other_weights_under_the_same_name_are_refused(config, tmp_path):
    _, weights = make_teacher(tmp_path / "other", seed=1)
    old = next(line for line in config.read_text().splitlines() if line.startswith("pretrained"))
    edit(config, old, f'pretrained = "{weights}"')
    add_lines(config.parent, "new")
    with pytest.raises(CacheError, match=r"teacher\.weights"):
        grow(config)


def test_other_library_versions_may_add_rows_and_the_plan_says_which(config, monkeypatch):
    """Last bits may differ between versions: the plan names the versions of every growth."""
    before = FeatureCache.open(config.parent / "cache")
    add_lines(config.parent, "new")
    identity = dimefm.stages.models.open_clip_teacher.OpenClipTeacher.identity
    later = {"libraries": {**before.teacher["libraries"], "torch": "99.0"}}
    monkeypatch.setattr(
        dimefm.stages.models.open_clip_teacher.OpenClipTeacher, "identity", lambda self: {**identity(self), **later}
    )
    plan = grow(config).plan
    assert plan.teacher.to_dict() == before.teacher
    (grown,) = plan.grown
    assert grown.libraries["torch"] == "99.0"
    assert grown.plan == before.manifest.plan and grown.rows[SENTENCES] == 22


def test_a_damaged_last_chunk_is_not_sealed_with_a_new_checksum(config):
    path = chunk_path(Layout(config.parent / "cache").teacher_zarr, SENTENCES, 5)
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    add_lines(config.parent, "new")
    with pytest.raises(CacheError, match="repair"):
        grow(config)


def test_a_second_writer_is_refused_at_once_with_the_name_of_the_first(config):
    add_lines(config.parent, "new")
    with (
        writer_lock(Layout(config.parent / "cache")),
        pytest.raises(CacheError, match=f"being written by .*{os.getpid()}"),
    ):
        grow(config)


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
