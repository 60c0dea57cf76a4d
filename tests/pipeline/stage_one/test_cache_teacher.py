"""Stage one, whole: what is on disk at its end, what a second run does, what is refused, what failures cost."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
import zarr
from PIL import Image
from safetensors.torch import load_file, save_file

import dimefm.stages.models.load_teacher
from dimefm.cache import CacheError, FeatureCache, InputError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher

from ...support.worlds import make_world


def run(config: Path, *changes: tuple[str, str]) -> FeatureCache:
    """Stage one on a config after textual changes to it."""
    text = config.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    loaded = load_config(config)
    cache_teacher(loaded)
    return FeatureCache.open(loaded.cache.dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher):
    """A world whose stage one has run; tests that change it work on a copy."""
    config = make_world(tmp_path_factory.mktemp("finished"), tiny_teacher)
    run(config)
    return config


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path / "world", copy_function=shutil.copy2)
    return tmp_path / "world" / "run.toml"


@pytest.fixture
def fresh(tmp_path, tiny_teacher):
    return make_world(tmp_path, tiny_teacher)


@pytest.fixture
def no_teacher(monkeypatch):
    """Loading a teacher raises."""

    def refuse(*arguments):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(dimefm.stages.models.load_teacher, "load_teacher", refuse)


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def test_a_reader_that_knows_only_zarr_and_pyarrow_finds_what_is_promised(finished):
    root = finished.parent / "cache"
    group = zarr.open_group(root / "teacher.zarr", mode="r")
    images, sentences = group["images/embedding"], group["sentences/embedding"]
    assert (images.shape, images.dtype, images.chunks) == ((30, 32), np.float16, (4, 32))
    assert (sentences.shape, sentences.dtype) == ((22, 32), np.float16)
    assert np.isfinite(images[:]).all() and np.isfinite(sentences[:]).all()
    assert group["evaluate/dev/images/embedding"].shape == (12, 32)
    head = group["evaluate/dev/head"]
    assert (head.shape, head.dtype) == ((4, 32), np.float32)
    np.testing.assert_allclose(np.linalg.norm(head[:], axis=1), 1, rtol=1e-6)
    rows = pq.read_table(root / "rows/images.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(30))
    assert rows[0]["source"] == "0/000.jpg" and rows[0]["status"] == "ok"
    assert rows[0]["bytes"] == (finished.parent / "images/0/000.jpg").stat().st_size
    assert [row["source"] for row in rows] == sorted(row["source"] for row in rows)
    texts = pq.read_table(root / "rows/sentences.parquet").to_pylist()
    assert texts[3] == {"row": 3, "text": "picture number 3 of something white", "origin": "captions.txt"} | {
        "status": "ok",
        "reason": None,
    }
    pairs = zarr.open_group(root / "pairs.zarr", mode="r")
    for side, num_rows in (("image_to_sentence", 30), ("sentence_to_image", 22)):
        assert (pairs[f"{side}/ids"].shape, pairs[f"{side}/ids"].dtype) == ((num_rows, 3), np.int64)
        assert pairs[f"{side}/scores"].dtype == np.float32
    assert json.loads((root / "manifest.json").read_bytes())["arrays"]["images/embedding"]["rows"] == 30
    assert sorted(path.name for path in (root / "index").glob("*.faiss")) == ["images.faiss", "sentences.faiss"]


def test_pairs_are_the_most_similar_rows_with_their_cosines(finished):
    group = zarr.open_group(finished.parent / "cache/teacher.zarr", mode="r")
    unit = [group[f"{side}/embedding"][:].astype(np.float64) for side in ("images", "sentences")]
    images, sentences = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in unit)
    pairs = zarr.open_group(finished.parent / "cache/pairs.zarr", mode="r")
    for side, cosines in (("image_to_sentence", images @ sentences.T), ("sentence_to_image", sentences @ images.T)):
        best = -np.sort(-cosines, axis=1)[:, :3]
        np.testing.assert_allclose(pairs[f"{side}/scores"][:], best, atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(cosines, pairs[f"{side}/ids"][:], 1), best, atol=1e-6)


def test_embeddings_and_head_are_what_open_clip_itself_computes(finished, tiny_teacher):
    open_clip.add_model_config(tiny_teacher[0])
    model, _, preprocess = open_clip.create_model_and_transforms("tiny", pretrained=str(tiny_teacher[1]))
    model.eval()
    tokenizer = open_clip.get_tokenizer("tiny")
    cache = FeatureCache.open(finished.parent / "cache")
    with torch.no_grad():
        pixels = preprocess(Image.open(finished.parent / "images/1/004.jpg"))[None]
        (row,) = (i for i, s in enumerate(cache.images.rows.column("source").to_pylist()) if s == "1/004.jpg")
        np.testing.assert_allclose(cache.images.embeddings[[row]], model.encode_image(pixels), rtol=2e-3, atol=2e-3)
        text = model.encode_text(tokenizer(["picture number 5 of something green"]))
        np.testing.assert_allclose(cache.sentences.embeddings[[5]], text, rtol=2e-3, atol=2e-3)
        templates = ["a {} picture", "something {}"]
        head = open_clip.build_zero_shot_classifier(model, tokenizer, ["blue", "green", "red", "white"], templates)
    np.testing.assert_allclose(cache.evaluate["dev"].head, head.T, atol=1e-5)
    assert cache.teacher["logit_scale"] == pytest.approx(model.logit_scale.exp().item())


def test_a_second_run_touches_no_file_and_loads_no_teacher(copy, no_teacher):
    before = snapshot(copy.parent / "cache")
    run(copy)
    assert snapshot(copy.parent / "cache") == before


def test_a_second_run_needs_no_sources(copy, no_teacher, capsys):
    shutil.rmtree(copy.parent / "images")
    (copy.parent / "captions.txt").unlink()
    run(copy)
    assert "not at hand" in capsys.readouterr().err


def test_new_images_and_lines_are_reported_and_not_taken_in(copy, capsys):
    Image.new("RGB", (32, 32)).save(copy.parent / "images/0/new.jpg")
    with (copy.parent / "captions.txt").open("a") as file:
        file.write("one more line\n")
    assert len(run(copy).images) == 30
    said = capsys.readouterr().err
    assert "1 images have appeared since" in said and "1 lines have appeared since" in said


def test_another_k_makes_new_pairs_without_the_teacher_and_leaves_the_old_ones_to_their_readers(copy, no_teacher):
    before = FeatureCache.open(copy.parent / "cache").pairs("image_to_sentence")
    after = run(copy, ("k = 3", "k = 5")).pairs("image_to_sentence")
    assert after.ids.shape == (30, 5)
    assert np.array_equal(after.ids[:][:, :3], before.ids[:])


def test_every_file_of_a_finished_cache_is_in_its_manifest_with_its_checksum(finished):
    root = finished.parent / "cache"
    files = json.loads((root / "manifest.json").read_bytes())["files"]
    there = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    outside = {name for name in there if name.startswith("log/")} | {"manifest.json", "manifest.xxh3"}
    assert set(files) == set(there) - outside
    for name, entry in files.items():
        data = there[name].read_bytes()
        assert entry == {"bytes": len(data), "digest": xxhash.xxh3_128(data).hexdigest()}


def test_an_edited_manifest_is_refused(copy):
    path = copy.parent / "cache/manifest.json"
    path.write_text(path.read_text().replace('"rows": 30', '"rows": 29'))
    with pytest.raises(CacheError, match="its checksum differs"):
        FeatureCache.open(copy.parent / "cache")


def test_an_unfinished_cache_wants_the_evaluation_sets_that_it_was_begun_with(copy):
    (copy.parent / "cache/manifest.json").unlink()
    text = copy.read_text()
    copy.write_text(text[: text.index("[evaluate.dev]")])
    with pytest.raises(CacheError, match=r"evaluate\.dev, which the config no longer has"):
        run(copy)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("batch_size = 4", "batch_size = 5"), "teacher.batch_size = 4"),
        (("shard_rows = 4", "shard_rows = 8"), "cache.shard_rows = 4"),
        (('workers = 2\ndevice = "cpu"\n[im', 'workers = 2\nprecision = "bf16"\n[im'), "teacher.precision = fp32"),
        (("[evaluate.dev]", "[evaluate.other]"), "evaluate.other is not in this cache"),
    ],
)
def test_another_runs_cache_is_refused_with_the_key(copy, no_teacher, change, key):
    with pytest.raises(CacheError, match=key.replace(".", r"\.")):
        run(copy, change)


def test_keys_that_say_what_a_cache_was_made_with_leave_it_open(copy, no_teacher):
    teacher = FeatureCache.open(copy.parent / "cache").teacher
    said = f"logit_scale = {teacher['logit_scale']!r}\n[teacher.preprocess]\nmean = {teacher['preprocess']['mean']}\n"
    run(copy, ("[images]", f'{said}resize_mode = "shortest"\n[images]'))
    for change, key in (
        (("0.48145466", "0.5"), "teacher.preprocess.mean"),
        (("mean", "std"), "teacher.preprocess.std"),
    ):
        before = copy.read_text()
        with pytest.raises(CacheError, match=key):
            run(copy, change)
        copy.write_text(before)
    with pytest.raises(CacheError, match=r"teacher\.logit_scale"):
        run(copy, ("logit_scale = ", "logit_scale = 1"))


def test_an_unusual_scale_and_a_chosen_average_are_said_before_the_long_run(fresh, tiny_teacher, tmp_path, capsys):
    state = {**load_file(tiny_teacher[1]), "logit_scale": torch.tensor(0.07)}
    torch.save({"model": load_file(tiny_teacher[1]), "ema": state}, tmp_path / "both.pt")
    run(fresh, (str(tiny_teacher[1]), str(tmp_path / "both.pt")))
    said = capsys.readouterr()
    said = said.out + said.err
    assert "logit scale 1.073 is unusual" in said
    assert "both.pt: averaged weights under `ema` are taken; others are under `model`" in said


def test_changed_sentences_are_refused(copy, no_teacher):
    path = copy.parent / "captions.txt"
    path.write_text(path.read_text().replace("number 3", "number three"))
    with pytest.raises(CacheError, match=r"sentences\.source"):
        run(copy)


def test_other_weights_under_the_same_name_are_refused_before_an_unfinished_cache_is_touched(copy, tmp_path):
    from ...support.teachers import make_teacher

    (copy.parent / "cache/manifest.json").unlink()
    journal = copy.parent / "cache/log/shards.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[2:]))
    _, weights = make_teacher(tmp_path / "other", seed=1)
    old = next(line for line in copy.read_text().splitlines() if line.startswith("pretrained"))
    before = snapshot(copy.parent / "cache/teacher.zarr")
    with pytest.raises(CacheError, match=r"teacher\.weights"):
        run(copy, (old, f'pretrained = "{weights}"'))
    assert snapshot(copy.parent / "cache/teacher.zarr") == before


def test_an_unreadable_image_costs_its_own_row(fresh):
    bad = fresh.parent / "images/0/006.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    cache = run(fresh, ('source = "images/"', 'source = "images/"\nmax_failed = 0.1'))
    (row,) = set(range(30)) - set(cache.images.usable.tolist())
    assert np.isnan(cache.images.embeddings[[row]]).all()
    table = pq.read_table(fresh.parent / "cache/rows/images.parquet").to_pylist()
    assert table[row]["source"] == "0/006.jpg" and table[row]["status"] == "failed" and table[row]["reason"]
    assert np.isfinite(cache.images.embeddings[cache.images.usable]).all()
    assert (cache.pairs("image_to_sentence").ids[[row]] == -1).all()
    assert np.isnan(cache.pairs("image_to_sentence").scores[[row]]).all()
    assert row not in cache.pairs("sentence_to_image").ids[:]


def test_an_unreadable_image_does_not_change_the_rows_beside_it(fresh, finished):
    bad = fresh.parent / "images/0/006.jpg"
    bad.write_bytes(b"")
    cache = run(fresh, ('source = "images/"', 'source = "images/"\nmax_failed = 0.1'))
    whole = FeatureCache.open(finished.parent / "cache")
    assert len(cache.images.usable) == 29
    assert np.array_equal(cache.images.embeddings[cache.images.usable], whole.images.embeddings[cache.images.usable])


def test_too_many_unreadable_images_stop_the_run_with_the_reasons_counted(fresh):
    for i in (0, 3, 6):
        (fresh.parent / f"images/0/{i:03d}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"images have no embedding \(\d x .*max_failed = 0.01"):
        run(fresh)
    assert not (fresh.parent / "cache/manifest.json").exists()
    assert len(run(fresh, ('source = "images/"', 'source = "images/"\nmax_failed = 0.2')).images.usable) == 27


def test_blank_and_undecodable_sentences_keep_their_rows(fresh):
    path = fresh.parent / "captions.txt"
    path.write_bytes(b"first\n \n\xff\xfe bytes\n" + b"last\n" * 3)
    cache = run(fresh)
    assert cache.sentences.usable.tolist() == [0, 3, 4, 5]
    assert np.isnan(cache.sentences.embeddings[[1, 2]]).all()
    assert not np.isin(cache.pairs("image_to_sentence").ids[:], [1, 2]).any()


def test_fewer_sentences_than_neighbours_leaves_the_rest_empty(fresh):
    (fresh.parent / "captions.txt").write_text("one\ntwo\n")
    ids = run(fresh).pairs("image_to_sentence").ids[:]
    assert (ids[:, 2] == -1).all() and set(ids[:, :2].ravel()) == {0, 1}


def test_no_retrieval_no_index(fresh):
    assert run(fresh, ("k = 3", "k = 0")).pairs("image_to_sentence") is None
    assert not list((fresh.parent / "cache").glob("index/*"))


def test_prompts_follow_the_lines_and_make_the_run_transductive(fresh):
    prompts = '[sentences.prompts]\nclasses = "classes.json"\ntemplates = "templates.txt"\n[cache]'
    cache = run(fresh, ("[cache]", prompts))
    assert len(cache.sentences) == 22 + 4 * 2
    assert cache.sentences.rows.take([22, 23], "text") == ["a blue picture", "something blue"]
    assert cache.sentences.rows.take([22], "origin") == ["prompts"]
    assert cache.transductive == ["dev"]


def test_where_the_time_went_is_said_at_the_end(fresh, capsys):
    run(fresh)
    said = capsys.readouterr().err
    assert re.search(r"embedded 68 rows in [\d.]+ s, [\d,]+ rows/s", said)  # 30 images, 22 sentences, 12 + 4 of dev
    seconds = r"([\d.]+) s"
    assert re.search(f"where the time went: read {seconds}, decode {seconds}, infer {seconds}, .*write {seconds}", said)


def test_a_profile_changes_no_byte_of_the_cache_and_may_be_asked_for_later(fresh, finished, capsys):
    profiled = ("[cache]", "[cache]\nprofile = true")
    cache = run(fresh, profiled)
    folder = cache.layout.root / "log/profile"
    seconds = json.loads((folder / "phases.json").read_bytes())
    assert seconds.keys() == {"read", "decode", "crop", "copy", "forward", "tokenise", "wait", "write"}
    assert all(line in capsys.readouterr().err for line in (folder / "table.txt").read_text().splitlines()[:1])
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"copy", "forward", "wait", "aten::convolution"} <= names
    whole = FeatureCache.open(finished.parent / "cache")
    assert np.array_equal(cache.images.embeddings[:], whole.images.embeddings[:])
    assert cache.identity == whole.identity
    run(fresh)  # the key may go, or come, at any time


@pytest.mark.parametrize(
    ("what", "says"),
    [("NaN", r"visual\.proj: NaN or infinite in fp32"), ("constant", "embeddings of images: the same for all")],
)
def test_a_teacher_that_cannot_be_one_stops_before_anything_is_planned(fresh, tiny_teacher, what, says):
    tensors = load_file(tiny_teacher[1])
    tensors["visual.proj"][:] = float("nan") if what == "NaN" else 0.0
    if what == "constant":  # what remains of an image is the bias of the last norm
        tensors["visual.ln_post.weight"][:] = 0.0
        tensors["visual.ln_post.bias"][:] = 1.0
        tensors["visual.proj"][:] = 0.1
    save_file(tensors, fresh.parent / "broken.safetensors")
    with pytest.raises(InputError, match=says):
        run(fresh, (str(tiny_teacher[1]), str(fresh.parent / "broken.safetensors")))
    assert not (fresh.parent / "cache/plan.json").exists()


def test_a_full_disk_is_seen_before_the_start(fresh, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(InputError, match="GB free"):
        run(fresh)
    assert not (fresh.parent / "cache/plan.json").exists()


def test_room_for_the_text_tower_is_looked_for_too(fresh, finished, monkeypatch):
    """The tower takes 6.5 MB here, everything else a tenth of a megabyte: two are not enough."""
    tower = (finished.parent / "cache/text_tower/open_clip_text.safetensors").stat().st_size
    assert tower > 6_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 2_000_000))
    with pytest.raises(InputError, match=r"takes 0\.01 GB and the disk has 0\.00 GB free"):
        run(fresh)


def test_a_folder_with_other_things_in_it_is_not_written_to(fresh):
    (fresh.parent / "cache").mkdir()
    (fresh.parent / "cache/thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match=r"thesis\.tex"):
        run(fresh)
    assert [path.name for path in (fresh.parent / "cache").iterdir()] == ["thesis.tex"]


def test_a_kill_while_the_plan_was_written_does_not_block_the_next_run(fresh):
    (fresh.parent / "cache").mkdir()
    (fresh.parent / "cache/.plan.json.0123.partial").write_text('{"teach')
    run(fresh)
    assert not list((fresh.parent / "cache").rglob("*.partial"))


def test_an_edited_plan_is_not_vouched_for(copy, no_teacher):
    path = copy.parent / "cache/plan.json"
    path.write_text(path.read_text().replace('"logit_scale": 14', '"logit_scale": 15'))
    with pytest.raises(CacheError, match=r"plan\.json is not the one"):
        run(copy)


@pytest.mark.parametrize("missing", ["images", "captions.txt", "classes.json", "dev"])
def test_a_missing_source_is_one_line(fresh, missing):
    path = fresh.parent / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=missing.replace(".", r"\.")):
        run(fresh)


def test_an_unfinished_cache_is_not_opened(fresh, tmp_path):
    with pytest.raises(CacheError, match="no teacher cache"):
        FeatureCache.open(fresh.parent / "cache")
    run(fresh)
    (fresh.parent / "cache/manifest.json").unlink()
    with pytest.raises(CacheError, match="unfinished"):
        FeatureCache.open(fresh.parent / "cache")
