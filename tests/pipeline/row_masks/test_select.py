"""`cache select`: the sentences that images retrieve, against brute force, into a mask that a run can name."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm.cache import FeatureCache, InputError
from dimefm.cache.audit.inspect import skewness
from dimefm.cache.reader.masks import add_mask, read_mask
from dimefm.pipeline.row_masks.select import select, select_lines
from dimefm.stages.retrieve import hubs
from dimefm.stages.retrieve.hubs import PairScores
from dimefm.stages.retrieve.select import select_sentences

from ...support.small_cache import make_cache
from ...support.small_pairs import add_pairs

BETA = 20.0


def brute_force(pairs, first, least, cap, target):
    """(kept sentences, images that have one, those that count for one, those that had any): loops over all of them."""
    counting = {}
    for row in np.flatnonzero(pairs.usable_images).tolist():
        ids, cosines, scores = (column[0] for column in pairs.rank(np.array([row])))
        counting[row] = [
            (int(ids[j]), float(scores[j]))
            for j in range(min(first, pairs.k))
            if ids[j] >= 0 and (least is None or cosines[j] >= least)
        ]
    near = {row: [y for y, _ in found] for row, found in counting.items()}
    if cap is not None:
        for y in {y for found in counting.values() for y, _ in found}:
            asking = sorted((-score, row) for row, found in counting.items() for z, score in found if z == y)
            for _, row in asking[cap:]:
                counting[row] = [(z, score) for z, score in counting[row] if z != y]
    left, kept = {y for found in counting.values() for y, _ in found}, []
    for turn in range(pairs.k):
        asked = {}
        for found in counting.values():
            if turn < len(found) and found[turn][0] not in kept:
                y, score = found[turn]
                asked[y] = max(score, asked.get(y, -np.inf))
        kept += sorted(asked, key=lambda y: (-asked[y], y))
    assert set(kept) == left
    chosen = set(kept[:target])
    covered = {row for row, found in near.items() if any(y in chosen for y in found)}
    counted = {row for row, found in counting.items() if any(y in chosen for y, _ in found)}
    return chosen, covered, counted, {row for row, found in near.items() if found}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Caches whose pairs have many equal scores, few and many sentences to find."""
    made = {}

    def cache(seed):
        if seed not in made:
            rng = np.random.default_rng(seed)
            ids = np.array([rng.choice(30 if seed % 2 else 8, 5, replace=False) for _ in range(40)])
            scores = (rng.integers(0, 5, (40, 5)) / 5).astype(np.float32)
            ids[rng.random((40, 5)) < 0.2] = -1
            scores[ids < 0] = np.nan
            small = make_cache(tmp_path_factory.mktemp("select"), embed_dim=4)
            made[seed] = add_pairs(small, k=5, image_to_sentence=(ids, scores))
        return made[seed]

    return cache


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 5),
    first=st.integers(1, 5),
    least=st.sampled_from([None, 0.0, 0.5, 0.9]),
    cap=st.sampled_from([None, 1, 2, 5]),
    target=st.sampled_from([None, 1, 4, 9, 100]),
    ranking=st.sampled_from(["cosine", "csls", "inverted_softmax"]),
    block=st.sampled_from([7, 64]),
)
def test_a_choice_is_that_of_brute_force(many, seed, first, least, cap, target, ranking, block):
    pairs = PairScores.of(many(seed), ranking, BETA)
    patch = pytest.MonkeyPatch()
    patch.setattr(hubs, "BLOCK_ROWS", block)
    try:
        found = select_sentences(pairs, first, least, cap, target)
    finally:
        patch.undo()
    chosen, covered, counted, near = brute_force(pairs, first, least, cap, target)
    assert set(np.flatnonzero(found.keep).tolist()) == chosen
    assert (len(found.cosines), found.with_candidate) == (len(covered), len(near))
    assert counted <= covered and found.crowded_out == len(covered - counted)
    assert found.images == 39 and (cap is None or found.degrees.max(initial=0) <= cap)


def test_a_target_gives_every_image_one_before_any_has_two(tmp_path):
    # Images 0-19 find sentences 0, 1, 2 (cosines .9 .8 .7), images 20-39 sentence 3 alone (.5), 4 after it (.4).
    # Two sentences are every image's best: 0 and 3, though 1 and 2 are nearer to somebody than 3.
    ids = np.repeat(np.array([[0, 1, 2], [3, 4, -1]]), 20, axis=0)
    scores = np.repeat(np.array([[0.9, 0.8, 0.7], [0.5, 0.4, np.nan]], dtype=np.float32), 20, axis=0)
    cache = add_pairs(make_cache(tmp_path), k=3, image_to_sentence=(ids, scores))
    pairs = PairScores.of(cache, "cosine", BETA)
    kept = [np.flatnonzero(select_sentences(pairs, 3, target=target).keep).tolist() for target in range(1, 6)]
    assert kept == [[0], [0, 3], [0, 1, 3], [0, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert len(select_sentences(pairs, 3, target=2).cosines) == 39


def test_a_planted_hub_leaves_room_where_it_is_capped(tmp_path):
    # Every image's best is sentence 0, its second one of 1 to 29. Two images at most for the hub: in the first round
    # the others ask for their own, so that twelve kept sentences cover far more than a hub and eleven others do.
    ids = np.column_stack([np.zeros(40, dtype=np.int64), np.arange(40) % 29 + 1])
    scores = np.column_stack([np.linspace(0.9, 0.8, 40), np.full(40, 0.7)]).astype(np.float32)
    cache = add_pairs(make_cache(tmp_path), k=2, image_to_sentence=(ids, scores))
    report = select(cache.layout.root, "capped", cap=2, target=40)
    hub = report["hubs"]["before"]["largest"][0]
    assert hub == {"row": 0, "text": "s0", "images": 39} and report["hubs"]["after"]["largest"][0]["images"] == 2
    assert report["hubs"]["before"]["skewness"] > 4 > report["hubs"]["after"]["skewness"]
    assert report["sentences"] == {"kept": 30, "qualify": 30, "of": 30}
    assert report["images"] == {"covered": 39, "crowded_out": 0, "without": 0, "without_candidate": 0, "of": 39}


def test_the_report_is_what_the_mask_holds(tmp_path):
    cache = add_pairs(make_cache(tmp_path))
    add_mask(cache.layout, "sentences", "most", np.arange(30) < 25)
    add_mask(cache.layout, "images", "half", np.arange(40) % 2 == 0)
    report = select(cache.layout.root, "fit", k=2, within="most", images_mask="half", rank="csls", min_score=0.2)
    again = FeatureCache.open(cache.layout.root)
    keep = read_mask(again.layout, again.manifest, "sentences", "fit", 30)
    pairs = PairScores.of(again.masked("half", "most"), "csls", 20.0)
    ids, cosines, scores = pairs.rank(again.masked("half").images.usable)
    counting = (ids[:, :2] >= 0) & (np.nan_to_num(cosines[:, :2], nan=-1) >= 0.2)
    wanted = np.unique(ids[:, :2][counting])
    assert np.flatnonzero(keep).tolist() == wanted.tolist() and wanted.max() < 25
    assert report["sentences"] == {"kept": len(wanted), "qualify": len(wanted), "of": 25}
    best = np.where(counting, cosines[:, :2], -1).max(axis=1)
    assert report["images"]["covered"] == (best >= 0.2).sum() and report["images"]["of"] == 20
    assert report["cosine"]["0.5"] == pytest.approx(np.median(best[best >= 0.2]))
    most = [scores[:, :2][counting & (ids[:, :2] == y)].max() for y in wanted]
    assert report["score"]["0.5"] == pytest.approx(np.median(most), abs=1e-6)
    degrees = np.bincount(ids[:, :2][counting], minlength=30)
    assert report["hubs"]["after"]["skewness"] == pytest.approx(skewness(degrees[wanted]))
    assert report["origins"] == {"not recorded": {"kept": len(wanted), "of": 25}}
    assert any(f"kept {len(wanted)} of 25 sentences" in line for line in select_lines(report))


def test_the_command_prints_a_report_or_one_document_and_saves_the_mask(tmp_path):
    cache = add_pairs(make_cache(tmp_path))
    words = [
        sys.executable,
        "-m",
        "dimefm",
        "cache",
        "select",
        str(cache.layout.root),
        "--k",
        "1",
        "--side",
        "sentences",
    ]
    done = subprocess.run([*words, "--mask", "one", "--json"], capture_output=True, check=True)
    document = json.loads(done.stdout)
    shown = subprocess.run([*words, "--mask", "one"], capture_output=True, check=True, text=True).stdout
    assert f"kept {document['sentences']['kept']} of 30 sentences" in shown and 'sentences.mask = "one"' in shown
    masked = FeatureCache.open(cache.layout.root).masked(sentences="one")
    assert len(masked.sentences.usable) == document["sentences"]["kept"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, r"--k 5: the cache holds 4 sentences for each image; wanted 1 to 4, or a larger pairs\.k"),
        ({"k": 0}, "wanted 1 to 4"),
        ({"min_score": 0.9999}, r"--min-score 0\.9999: no image has a sentence that near \(the nearest has 0\.\d+\)"),
        ({"min_score": 1.5}, "wanted -1 to 1"),
        ({"cap": 0}, "--cap 0: wanted at least 1"),
        ({"target": -1}, "--target -1: wanted at least 1"),
        ({"rank": "best"}, "--rank best: wanted cosine, csls, inverted_softmax"),
        ({"side": "images"}, "--side images: wanted sentences"),
        ({"within": "nothing"}, "no such mask of sentences"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_saved(tmp_path, arguments, message):
    cache = add_pairs(make_cache(tmp_path))
    with pytest.raises(InputError, match=message) as refusal:
        select(cache.layout.root, "none", **arguments)
    assert "\n" not in str(refusal.value)
    assert FeatureCache.open(cache.layout.root).manifest.files == {}


def test_a_choice_of_nothing_is_refused(tmp_path):
    cache = add_pairs(make_cache(tmp_path))
    add_mask(cache.layout, "images", "failed", np.arange(40) == 3)
    with pytest.raises(InputError, match="nothing would be kept"):
        select(cache.layout.root, "none", images_mask="failed")
