"""Near-duplicates and leaks: planted ones are found through a real teacher, and the search agrees with brute force."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dimefm.cache import FeatureCache, InputError
from dimefm.cache.disk.index import build_index
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.row_masks.duplicates import duplicate_lines, duplicates, leakage, leakage_lines
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.stages.retrieve.near_duplicates import (
    MAX_NEIGHBOURS,
    find_duplicates,
    find_links,
    first_identical,
    lowest_linked,
    nearest_leak,
)

from ...support.worlds import make_world

NUM_SCENES = 24
THRESHOLD = 0.995
"""Between this teacher's nearest two of the distinct scenes, 0.990, and its farthest planted copy, 0.997."""


def scene(seed: int, side: int = 96) -> Image.Image:
    """Twelve shapes of random colours: no two seeds look alike."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, width, height = (*random.integers(-20, side, 2), *random.integers(15, 60, 2))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape([x, y, x + width, y + height], fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_teacher):
    """A finished cache. Copies of scenes 5 to 9 come after them by name; a crop of scene 10 is in the labelled set."""
    folder = tmp_path_factory.mktemp("planted")
    config = make_world(folder, tiny_teacher)
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    for i in range(NUM_SCENES):
        scene(i).save(folder / f"images/{i:03d}.png")
    scene(5).save(folder / "images/copy.png")
    scene(6).save(folder / "images/jpeg.jpg", quality=80)
    scene(7).resize((64, 64)).save(folder / "images/small.png")
    scene(8).crop((3, 3, 93, 93)).save(folder / "images/vcrop.png")
    scene(8).crop((2, 2, 92, 92)).save(folder / "images/wcrop.png")
    scene(10).crop((4, 4, 92, 92)).save(folder / "dev/c_red/leak.png")
    with (folder / "captions.txt").open("a") as file:
        file.write("Picture  number 3 of something WHITE\nnothing like the others at all\n")
    cache_teacher(load_config(config))
    return config


@pytest.fixture
def cache(planted, tmp_path) -> Path:
    return Path(shutil.copytree(planted.parent / "cache", tmp_path / "cache"))


def test_planted_copies_and_crops_are_found_and_nothing_else(cache):
    found = duplicates(cache, THRESHOLD)
    pairs = {(row["name"], row["kept_name"]) for row in found["rows"]}
    expected = {"copy.png": 5, "jpeg.jpg": 6, "small.png": 7, "vcrop.png": 8, "wcrop.png": 8}
    assert pairs == {(name, f"{i:03d}.png") for name, i in expected.items()}
    assert (found["dropped"], found["groups"], found["identical"], found["cut"]) == (5, 4, 1, 0)
    assert found["rows"][0]["name"] == "copy.png" and found["rows"][0]["cosine"] == pytest.approx(1)
    assert all(row["cosine"] >= THRESHOLD for row in found["rows"])


def test_the_mask_chooses_all_rows_but_the_later_copies(cache):
    assert len(duplicates(cache, THRESHOLD, mask="clean")["rows"]) == 5
    chosen = FeatureCache.open(cache).masked(images="clean")
    names = np.array(chosen.images.rows.column("source").to_pylist())[chosen.images.usable]
    assert names.tolist() == [f"{i:03d}.png" for i in range(NUM_SCENES)]


def test_sentences_that_the_teacher_cannot_tell_apart_are_duplicates(cache):
    found = duplicates(cache, 0.9999, "sentences", mask="texts")
    assert [(row["row"], row["kept_row"]) for row in found["rows"]] == [(22, 3)]
    assert found["rows"][0]["name"] == "Picture  number 3 of something WHITE"
    assert 22 not in FeatureCache.open(cache).masked(sentences="texts").sentences.usable


def test_a_training_image_that_is_in_the_labelled_set_is_listed_and_left_out(cache):
    found = leakage(cache, THRESHOLD, mask="honest")
    (row,) = found["rows"]
    assert (row["row"], row["name"], row["set"], row["evaluate_name"]) == (10, "010.png", "dev", "c_red/leak.png")
    assert row["cosine"] >= THRESHOLD and found["sets"] == {"dev": {"images": 13, "leaks": 1}}
    usable = FeatureCache.open(cache).masked(images="honest").images.usable
    assert set(range(NUM_SCENES + 5)) - set(usable.tolist()) == {10}


def test_a_mask_within_a_mask_leaves_out_what_both_do(cache):
    duplicates(cache, THRESHOLD, mask="clean")
    leakage(cache, THRESHOLD, mask="both", within="clean")
    usable = FeatureCache.open(cache).masked(images="both").images.usable
    assert usable.tolist() == [i for i in range(NUM_SCENES) if i != 10]
    assert duplicates(cache, THRESHOLD, within="both")["rows"] == []


def test_nothing_is_written_without_a_mask(cache):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    duplicates(cache, THRESHOLD)
    leakage(cache, THRESHOLD)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_cache_without_indexes_is_searched_all_the_same(planted, tmp_path):
    config = tmp_path / "run.toml"
    shutil.copytree(planted.parent, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "cache")
    config.write_text(config.read_text().replace("k = 3", "k = 0"))
    cache_teacher(load_config(config))
    assert duplicates(tmp_path / "cache", THRESHOLD)["dropped"] == 5


def test_what_was_found_is_shown_with_scores_and_as_json(cache):
    words = [sys.executable, "-m", "dimefm", "cache"]
    done = subprocess.run([*words, "duplicates", cache, "--threshold", str(THRESHOLD), "--json"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == duplicates(cache, THRESHOLD)
    shown = "\n".join(duplicate_lines(duplicates(cache, THRESHOLD)))
    assert "5 of 29 images" in shown and "1.0000  24 copy.png = 5 005.png" in shown and "--mask NAME" in shown
    shown = "\n".join(leakage_lines(leakage(cache, THRESHOLD, mask="m")))
    assert "1 into dev (13 images)" in shown and 'images.mask = "m"' in shown


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(cache, threshold):
    for search in (duplicates, leakage):
        with pytest.raises(InputError, match="wanted above 0 and at most 1"):
            search(cache, threshold)


def test_a_name_that_is_no_masks_is_refused_before_the_search(cache, monkeypatch):
    monkeypatch.setattr("dimefm.pipeline.row_masks.duplicates.FeatureCache.open", None)
    for find in (duplicates, leakage):
        with pytest.raises(InputError, match="the name becomes a file"):
            find(cache, THRESHOLD, mask="a/b")


def test_an_unknown_side_and_an_unknown_mask_are_refused_by_name(cache):
    with pytest.raises(InputError, match="--side pictures: wanted images or sentences"):
        duplicates(cache, THRESHOLD, "pictures")
    duplicates(cache, THRESHOLD, mask="clean")
    with pytest.raises(InputError, match="it has: clean"):
        leakage(cache, THRESHOLD, within="cleen")


def clustered(num_rows: int = 600, groups: int = 60, spread: float = 0.35, seed: int = 0) -> np.ndarray:
    """Float16 rows around some centres; cosines within a group are spread around 0.9."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(groups, 24))
    return (centres[random.integers(0, groups, num_rows)] + spread * random.normal(size=(num_rows, 24))).astype("f2")


def cosine_table(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = (rows.astype(np.float64) for rows in (one, other))
    return (one / np.linalg.norm(one, axis=1, keepdims=True)) @ (other / np.linalg.norm(other, axis=1, keepdims=True)).T


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_links_are_those_of_brute_force(kind):
    rows, usable = clustered(), np.delete(np.arange(600), [7, 300])
    index, _ = build_index(rows, usable, rows[:50], 16, kind=kind, min_recall=1.0)
    links = find_links(rows, usable, rows, usable, index, 0.9, same=True)
    table = cosine_table(rows, rows)
    np.fill_diagonal(table, 0)
    table[[7, 300]] = 0
    table[:, [7, 300]] = 0
    wanted = set(zip(*(axis.tolist() for axis in np.nonzero(table >= 0.9)), strict=True))
    found = set(zip(links.queries.tolist(), links.targets.tolist(), strict=True))
    assert len(wanted) > 600 and found == wanted
    np.testing.assert_allclose(links.scores, table[links.queries, links.targets], atol=1e-6)


def test_more_neighbours_than_were_asked_for_at_first_are_found():
    rows = np.vstack([clustered(300, groups=1, spread=0.01), clustered(50, seed=1)])
    index, _ = build_index(rows, np.arange(350), rows[:10], 8)
    links = find_links(rows, np.arange(350), rows, np.arange(350), index, 0.99, same=True)
    counts = np.bincount(links.queries, minlength=350)
    assert (counts[:300] == 299).all() and links.num_cut == 0


def test_thousands_of_copies_of_two_placeholders_hide_nothing():
    placeholder, others = clustered(1), clustered(40, groups=40, seed=2)
    again = (placeholder.astype("f4") + 0.01).astype("f2")  # the same picture, encoded anew
    copies = MAX_NEIGHBOURS + 500
    rows = np.vstack([others[:20], np.repeat(placeholder, copies, 0), others[20:], np.repeat(again, copies, 0)])
    index, _ = build_index(rows, np.arange(len(rows)), rows[:10], 8)
    found = find_duplicates(rows, np.arange(len(rows)), index, 0.99)
    assert found.rows.tolist() == [*range(21, 20 + copies), *range(40 + copies, 40 + 2 * copies)]
    assert set(found.kept.tolist()) == {20}
    assert (found.num_identical, found.num_cut) == (2 * copies - 2, 0)


def test_a_chain_is_one_group_and_says_how_far_its_ends_are_apart():
    angles = np.deg2rad([0, 10, 20, 90])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("f4")
    index, _ = build_index(rows, np.arange(4), rows, 4)
    found = find_duplicates(rows, np.arange(4), index, 0.98)  # cos 10 degrees is 0.985, cos 20 degrees 0.940
    assert found.rows.tolist() == [1, 2] and found.kept.tolist() == [0, 0]
    np.testing.assert_allclose(found.scores, np.cos(angles[1:3]), atol=1e-6)


def test_each_leaking_image_is_listed_once_with_its_nearest_labelled_image():
    rows, labelled = clustered(), clustered(40, seed=0)
    labelled = np.vstack([labelled, np.full((1, 24), np.nan, "f2")])
    usable, labelled_usable = np.arange(1, 600), np.arange(40)
    index, _ = build_index(rows, usable, labelled[:40], 8)
    found = nearest_leak(labelled, labelled_usable, rows, usable, index, 0.9)
    table = cosine_table(rows, labelled[:40])
    table[0] = 0
    leaks = np.flatnonzero(table.max(axis=1) >= 0.9)
    assert sorted(found.targets.tolist()) == leaks.tolist()
    assert found.queries.tolist() == table[found.targets].argmax(axis=1).tolist()
    assert (np.diff(found.scores) <= 0).all()


def test_only_equal_bytes_are_identical():
    rows = clustered(200)
    rows[150] = rows[3]
    rows[151] = rows[3]
    rows[152] = rows[3]
    rows[152, 0] = np.nextafter(rows[3, 0], np.float16(9))
    first = first_identical(rows, np.arange(2, 200))
    assert {row: int(one) for row, one in zip(range(2, 200), first, strict=True) if row != one} == {150: 3, 151: 3}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_groups_are_those_of_a_plain_union(links):
    group = list(range(31))
    for one, other in links:
        low, high = sorted((group[one], group[other]))
        group = [low if value == high else value for value in group]
    first, second = (np.array([link[side] for link in links], dtype=np.int64) for side in (0, 1))
    assert lowest_linked(31, first, second).tolist() == group
