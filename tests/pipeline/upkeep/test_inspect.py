"""`cache inspect`: numbers that agree with what was put in, on one screen, from a cache that nobody writes to."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from dimefm.cache import FeatureCache
from dimefm.cache.audit.inspect import skewness
from dimefm.cache.reader.masks import add_mask
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.inspect import inspect, inspect_lines

from ...support.commands import refused, run_dimefm
from ...support.worlds import make_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher):
    """A finished cache of 30 images, two of them empty, 22 sentences, one of them blank, and a cut picture of dev."""
    config = make_world(tmp_path_factory.mktemp("inspect"), tiny_teacher)
    (config.parent / "images/0/006.jpg").write_bytes(b"")
    (config.parent / "images/0/009.jpg").write_bytes(b"")
    lines = (config.parent / "captions.txt").read_text().splitlines()
    (config.parent / "captions.txt").write_text("\n".join([*lines[:-1], " "]) + "\n")
    config.write_text(config.read_text().replace('source = "images/"', 'source = "images/"\nmax_failed = 0.2'))
    cut = config.parent / "dev/c_green/1.png"
    cut.write_bytes(cut.read_bytes()[:200])
    cache_teacher(load_config(config))
    return config.parent / "cache"


@pytest.fixture
def cache(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "cache")


def test_counts_failures_and_sizes_are_those_on_disk(cache):
    found = inspect(cache)
    assert found["arrays"]["images/embedding"] == {"rows": 30, "failed": 2, "reasons": {"empty file": 2}}
    assert found["arrays"]["sentences/embedding"] == {"rows": 22, "failed": 1, "reasons": {"blank": 1}}
    assert found["evaluate"] == {"dev": {"images": 12, "classes": 4}}
    there = [path for path in cache.rglob("*") if path.is_file() and path.parts[len(cache.parts)] != "log"]
    assert found["bytes"]["total"] == sum(p.stat().st_size for p in there if p.name not in MANIFEST_FILES)
    assert found["bytes"]["embeddings"] == sum(
        p.stat().st_size for p in (cache / "teacher.zarr").rglob("*") if p.is_file()
    )
    assert found["teacher"]["embed_dim"] == 32 and found["teacher"]["model"] == "tiny.json"


MANIFEST_FILES = ("manifest.json", "manifest.xxh3")


def test_hubs_are_counted_over_all_pairs(cache):
    ids = FeatureCache.open(cache).pairs("image_to_sentence").ids[:]
    counts = np.bincount(ids[ids >= 0], minlength=22)[:21]  # the last one is blank: it cannot be retrieved
    found = inspect(cache)["hubs"]["image_to_sentence"]
    assert found["max"] == counts.max() and found["max_row"] == counts.argmax()
    assert found["max_name"].startswith(f"picture number {counts.argmax()} ")
    assert found["mean"] == pytest.approx(28 * 3 / 21) and found["never"] == np.mean(counts == 0)
    away = counts - counts.mean()
    assert found["skewness"] == pytest.approx(np.mean(away**3) / np.std(counts) ** 3)


def test_the_skew_of_first_sentences_is_shown_for_every_ranking(cache):
    found = inspect(cache)
    nearest = found["hubs"]["image_to_sentence"]["nearest"]
    first = FeatureCache.open(cache).pairs("image_to_sentence").ids[:][:, 0]
    counts = np.bincount(first[first >= 0], minlength=22)[:21]
    assert nearest["cosine"] == {
        "max": counts.max(),
        "never": np.mean(counts == 0),
        "skewness": pytest.approx(scipy.stats.skew(counts)),
    }
    assert list(nearest) == ["cosine", "csls", "inverted_softmax"]
    assert len({item["skewness"] for item in nearest.values()}) > 1
    assert "nearest" not in found["hubs"]["sentence_to_image"]
    shown = [line for line in inspect_lines(found) if "first by" in line]
    assert len(shown) == 3 and f"{nearest['csls']['skewness']:.2f}" in shown[1]


def test_skewness_is_0_where_nothing_stands_out():
    assert skewness(np.array([3, 3, 3])) == 0
    assert skewness(np.array([1, 2, 3])) == pytest.approx(0)
    assert skewness(np.array([0, 0, 0, 4])) == pytest.approx(6 / 3**1.5)  # by hand


def test_similarities_of_a_small_cache_are_those_of_all_its_rows(cache):
    opened = FeatureCache.open(cache)
    units = []
    for rows in (opened.images, opened.sentences):
        block = rows.embeddings[rows.usable].astype(np.float64)
        units.append(block / np.linalg.norm(block, axis=1, keepdims=True))
    found = inspect(cache)["similarity"]
    wanted = np.quantile(units[0] @ units[1].T, [0.01, 0.5, 0.99])
    assert [found["image_sentence"][q] for q in ("0.01", "0.5", "0.99")] == pytest.approx(wanted, abs=1e-5)
    best = (units[0] @ units[1].T).max(axis=1)
    assert found["image_to_sentence_nearest"]["0.5"] == pytest.approx(np.median(best), abs=1e-5)
    own = (units[1] @ units[1].T)[np.triu_indices(21, k=1)]
    assert found["sentence_sentence"]["0.25"] == pytest.approx(np.quantile(own, 0.25), abs=1e-5)


def test_masks_and_versions_are_shown(cache):
    opened = FeatureCache.open(cache)
    add_mask(opened.layout, "images", "half", np.arange(30) % 2 == 0)
    found = inspect(cache)
    usable = opened.images.usable
    assert found["masks"] == [{"side": "images", "name": "half", "kept": int((usable % 2 == 0).sum()), "of": 28}]
    assert found["version"] == 2
    assert "images/half keeps" in "\n".join(inspect_lines(found))


def test_a_person_gets_one_screen(cache):
    lines = inspect_lines(inspect(cache))
    assert len(lines) <= 40 and all("\n" not in line for line in lines)
    text = "\n".join(lines)
    for shown in ("tiny.json", "2 x empty file", "1 x blank", "recall@3 1.000", "masks: none", "pairs: 3 neighbours"):
        assert shown in text


def test_json_is_one_document_and_nothing_is_written(cache):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    words = [sys.executable, "-m", "dimefm", "cache", "inspect", str(cache), "--json"]
    done = subprocess.run(words, capture_output=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(inspect(cache)))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_cache_without_pairs_has_no_hubs(tmp_path, tiny_teacher):
    config = make_world(tmp_path, tiny_teacher, num_images=6, num_sentences=5)
    config.write_text(config.read_text().replace("k = 3", "k = 0"))
    cache_teacher(load_config(config))
    found = inspect(tmp_path / "cache")
    assert found["hubs"] == {} and set(found["similarity"]) == {"image_sentence", "image_image", "sentence_sentence"}
    assert "pairs: none" in inspect_lines(found)


def test_an_unfinished_cache_is_looked_into_as_far_as_it_goes(cache, capsys):
    for name in MANIFEST_FILES:
        (cache / name).unlink()
    found = inspect(cache)
    assert found["state"] == "unfinished"
    assert found["arrays"]["images/embedding"] == {
        "rows": 30,
        "failed": 2,
        "reasons": {"empty file": 2},
        "shards": 8,
        "shards_done": 8,
    }
    text = run_dimefm(capsys, "cache", "inspect", cache).out
    assert "unfinished" in text and "8 of 8 shards done, 2 failed: 2 x empty file" in text and "--failed" in text
    (cache / "plan.json").unlink()
    assert "no teacher cache" in refused(capsys, "cache", "inspect", cache)
    assert "no teacher cache" in refused(capsys, "cache", "inspect", cache, "--failed")


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_failures_of_every_kind_are_listed_by_name_and_reason(cache, state, capsys):
    if state == "unfinished":
        for name in MANIFEST_FILES:
            (cache / name).unlink()
    lines = run_dimefm(capsys, "cache", "inspect", cache, "--failed").out.splitlines()
    assert lines == [
        "images\t2\t0/006.jpg\tempty file",
        "images\t3\t0/009.jpg\tempty file",
        "sentences\t21\t' '\tblank",
        "evaluate.dev\t4\tc_green/1.png\ttruncated",
    ]
    found = json.loads(run_dimefm(capsys, "cache", "inspect", cache, "--failed", "--json").out)["failed"]
    assert found[2] == {"set": "sentences", "row": 21, "name": " ", "origin": "captions.txt", "reason": "blank"}
