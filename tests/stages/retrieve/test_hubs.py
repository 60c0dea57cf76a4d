"""Hubs: rankings against formulas written out, caps against brute force, and a planted hub that loses its place."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm.cache import InputError
from dimefm.cache.audit.inspect import skewness
from dimefm.cache.reader.masks import add_mask
from dimefm.stages.retrieve import hubs
from dimefm.stages.retrieve.hubs import PairScores, allowed, in_degrees, largest_hubs

from ...support.small_cache import make_cache
from ...support.small_pairs import add_pairs, nearest, unit

BETA = 20.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """40 images, of which row 3 failed, 30 sentences, 4 neighbours both ways."""
    return add_pairs(make_cache(tmp_path_factory.mktemp("hubs")))


def by_hand(cache, ranking, k=4):
    """{(image, sentence): score} of all pairs, the formulas written out pair by pair."""
    images, sentences = unit(cache.images.embeddings[:]), unit(cache.sentences.embeddings[:])
    (ids, cosines), (back, back_cosines) = nearest(images, sentences, k), nearest(sentences, images, k)
    found = {}
    for x, row in enumerate(ids):
        for place, y in enumerate(row):
            if y < 0:
                continue
            cosine = float(images[x] @ sentences[y])
            near_x, near_y = cosines[x].astype(float), back_cosines[y].astype(float)
            found[x, int(y)] = {
                "cosine": cosine,
                "csls": 2 * cosine - near_x.mean() - near_y.mean(),
                "inverted_softmax": math.log(math.exp(BETA * cosine) / sum(math.exp(BETA * c) for c in near_y)),
            }[ranking]
            assert cosines[x, place] == pytest.approx(cosine, abs=1e-6) and back[y].min() >= 0
    return found


@pytest.mark.parametrize("ranking", ["cosine", "csls", "inverted_softmax"])
def test_scores_are_the_formulas_and_order_the_candidates(cache, ranking):
    pairs, wanted = PairScores.of(cache, ranking, BETA), by_hand(cache, ranking)
    rows = np.array([7, 0, 39, 7, 3])
    ids, cosines, scores = pairs.rank(rows)
    assert (ids.dtype, cosines.dtype, scores.dtype) == (np.int64, np.float32, np.float32)
    for i, row in enumerate(rows[:4]):
        assert sorted(ids[i]) == sorted(y for x, y in wanted if x == row)
        assert scores[i] == pytest.approx([wanted[row, y] for y in ids[i]], abs=1e-5)
        assert (np.diff(scores[i]) <= 0).all()
        plain = by_hand(cache, "cosine")
        assert cosines[i] == pytest.approx([plain[row, y] for y in ids[i]], abs=1e-6)
    assert (ids[4] == -1).all() and np.isnan(cosines[4]).all() and np.isnan(scores[4]).all()  # it failed


def test_equal_scores_go_by_the_lower_sentence_and_nothing_stays_last(tmp_path):
    ids = np.tile(np.array([[5, 2, 9, -1]]), (40, 1))
    scores = np.tile(np.array([[0.5, 0.5, 0.5, np.nan]], dtype=np.float32), (40, 1))
    pairs = PairScores.of(add_pairs(make_cache(tmp_path), image_to_sentence=(ids, scores)), "cosine", BETA)
    assert pairs.rank(np.array([0]))[0].tolist() == [[2, 5, 9, -1]]


@pytest.mark.parametrize("ranking", ["cosine", "csls", "inverted_softmax"])
def test_sentences_that_a_mask_drops_are_no_candidates_and_the_others_keep_their_scores(cache, ranking, tmp_path):
    own = add_pairs(make_cache(tmp_path))
    add_mask(own.layout, "sentences", "odd", np.arange(30) % 2 == 1)
    add_mask(own.layout, "images", "few", np.arange(40) < 10)
    whole = PairScores.of(own, ranking, BETA)
    masked = PairScores.of(type(own).open(own.layout.root).masked("few", "odd"), ranking, BETA)
    for (ids, _, scores), (some, cosines, left) in zip(
        [whole.rank(np.array([row])) for row in range(40)], [masked.rank(np.array([row])) for row in range(40)]
    ):
        stays = ids[0] % 2 == 1  # -1 is odd, and stays nothing
        assert some[0][: stays.sum()].tolist() == ids[0][stays].tolist()
        np.testing.assert_array_equal(left[0][: stays.sum()], scores[0][stays])
        assert (some[0][stays.sum() :] == -1).all() and np.isnan(cosines[0][stays.sum() :]).all()
    degrees = in_degrees(masked)
    assert (
        degrees[::2].sum() == 0 and degrees.sum() == (masked.rank(np.flatnonzero(masked.usable_images))[0] >= 0).sum()
    )


def test_a_planted_hub_is_first_everywhere_by_cosine_and_nowhere_where_it_is_corrected(tmp_path):
    # Sentence 0 has cosine 0.6 to every image, each image's own sentence 0.59: the hub wins by 0.01. Of the hub's
    # nearest images each has 0.6; each own sentence has its image alone near, the other neighbours at 0.1.
    own = np.arange(40) % 29 + 1
    ids = np.column_stack([np.zeros(40, dtype=np.int64), own])
    scores = np.tile(np.array([[0.60, 0.59]], dtype=np.float32), (40, 1))
    back = np.tile(np.array([[0, 1, 2, 4]]), (30, 1))
    near = np.tile(np.array([[0.59, 0.1, 0.1, 0.1]], dtype=np.float32), (30, 1))
    near[0] = 0.6
    cache = add_pairs(make_cache(tmp_path), k=2, image_to_sentence=(ids, scores), sentence_to_image=(back, near))
    assert (PairScores.of(cache, "cosine", BETA).rank(np.arange(40))[0][:, 0] == 0).all()
    for ranking in ("csls", "inverted_softmax"):
        pairs = PairScores.of(cache, ranking, BETA)
        assert (pairs.rank(np.arange(40))[0][:, 0] == own).all()
        assert in_degrees(pairs, 1)[0] == 0 and in_degrees(pairs)[0] == 39  # all but the image that failed


def random_pairs(tmp_path, seed, num_scores, k=5):
    """Pairs whose scores take few values, so that many are equal."""
    rng = np.random.default_rng(seed)
    ids = np.array([rng.choice(12, k, replace=False) for _ in range(40)])
    scores = (rng.integers(0, num_scores, (40, k)) / num_scores).astype(np.float32)
    ids[rng.random((40, k)) < 0.2] = -1
    scores[ids < 0] = np.nan
    return add_pairs(make_cache(tmp_path, embed_dim=4), k=k, image_to_sentence=(ids, scores))


@pytest.mark.parametrize("prune", [1, 4_000_000])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cap=st.integers(1, 9),
    block=st.sampled_from([1, 7, 64]),
    first=st.sampled_from([None, 1, 3]),
    least=st.sampled_from([None, 0.25, 0.6]),
)
def test_a_cap_keeps_the_best_images_of_each_sentence_the_lower_row_among_equals(
    tmp_path_factory, prune, seed, cap, block, first, least
):
    pairs = PairScores.of(random_pairs(tmp_path_factory.mktemp("cap"), seed, 4), "csls", BETA)
    patch = pytest.MonkeyPatch()
    patch.setattr(hubs, "BLOCK_ROWS", block)
    patch.setattr(hubs, "_PRUNE_ENTRIES", prune)
    try:
        keep = allowed(pairs, cap, first, least)
    finally:
        patch.undo()
    rows = np.flatnonzero(pairs.usable_images)
    ids, cosines, scores = pairs.rank(rows)
    if first is not None:
        ids[:, first:] = -1
    if least is not None:
        ids[~(cosines >= least)] = -1
    wanted = np.zeros((40, pairs.k), dtype=bool)
    for y in range(30):
        those = [(-scores[i, j], rows[i], j) for i, j in zip(*np.nonzero(ids == y))]
        for _, row, place in sorted(those)[:cap]:
            wanted[row, place] = True
    np.testing.assert_array_equal(keep, wanted)


def test_in_degrees_count_the_first_candidates(cache):
    pairs = PairScores.of(cache, "cosine", BETA)
    ids = cache.pairs("image_to_sentence").ids[:]
    for first in (1, 3, 4, None):
        wanted = ids[:, :first]
        assert in_degrees(pairs, first).tolist() == np.bincount(wanted[wanted >= 0], minlength=30).tolist()


@settings(max_examples=50, deadline=None)
@given(degrees=st.lists(st.integers(0, 50), min_size=2, max_size=30))
def test_skewness_is_that_of_scipy(degrees):
    found = skewness(np.array(degrees))
    assert found == pytest.approx(0 if len(set(degrees)) == 1 else scipy.stats.skew(degrees), abs=1e-9)


def test_the_largest_hubs_are_those_that_are_retrieved():
    assert largest_hubs(np.array([0, 0, 2]), 3).tolist() == [2]


def test_a_cache_without_pairs_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"has no pseudo-pairs \(pairs\.k = 0\); set pairs\.k"):
        PairScores.of(make_cache(tmp_path), "csls", BETA)


def test_a_cap_below_1_is_a_mistake(cache):
    with pytest.raises(ValueError, match="wanted at least 1"):
        allowed(PairScores.of(cache, "cosine", BETA), 0)
