"""Recall at k, by hand, against scikit-learn and against a plain sort; captions files that are refused."""

import doctest
import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import top_k_accuracy_score

from dimefm.cache import InputError
from dimefm.stages.score import recall
from dimefm.stages.score.embedded_set import EmbeddedSet
from dimefm.stages.score.recall import best_own_ranks, read_captions, recall_scores

DIM = 6


def some(num_images=40, seed=0):
    """Images, one to four captions of all but the last, and which image each caption is of; images in no order."""
    numbers = np.random.default_rng(seed)
    image_of = numbers.permutation(np.repeat(np.arange(num_images - 1), numbers.integers(1, 5, num_images - 1)))
    images = numbers.normal(size=(num_images, DIM)).astype(np.float32)
    captions = (images[image_of] + 1.2 * numbers.normal(size=(len(image_of), DIM))).astype(np.float32)
    return images, captions, image_of


def embedded(images):
    teacher = images + 0.1 * np.random.default_rng(9).normal(size=images.shape).astype(np.float32)
    teacher[np.isnan(images)] = np.nan
    labels = np.zeros(len(images), np.int64)
    return EmbeddedSet(images, teacher, np.eye(1, DIM, dtype=np.float32), labels, ["all"], [str(i) for i in labels])


def by_sorting(queries, candidates, own):
    """Position of the first own candidate in the list of all, nearest first."""
    cosines = queries @ candidates.T / np.linalg.norm(candidates, axis=1)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return [next(i for i, row in enumerate(line) if row in own(q)) for q, line in enumerate(order)]


def test_the_worked_example_holds():
    result = doctest.testmod(recall)
    assert result.failed == 0 and result.attempted >= 2


def test_ranks_are_those_of_a_sorted_list():
    images, captions, image_of = some()
    pairs = np.stack([image_of, np.arange(len(image_of))], axis=1)
    wanted = by_sorting(images[:-1], captions, lambda image: set(np.flatnonzero(image_of == image)))
    assert best_own_ranks(images, captions, pairs).tolist() == [*wanted, len(captions)]  # the last one has none
    wanted = by_sorting(captions, images, lambda caption: {image_of[caption]})
    assert best_own_ranks(captions, images, pairs[:, ::-1]).tolist() == wanted


@pytest.mark.parametrize("num_queries", [1, 33])
def test_of_equal_candidates_the_first_comes_first(num_queries):
    """All but the last are one caption; its i-th copy has rank i, whatever the last bits of a product are."""
    numbers = np.random.default_rng(0)
    queries, candidates = (numbers.normal(size=(n, 300)).astype(np.float32) for n in (num_queries, 203))
    candidates[:202] = candidates[0]
    for own in (0, 1, 17, 100, 201):
        pairs = np.stack([np.arange(num_queries), np.full(num_queries, own)], axis=1)
        last = (queries @ candidates[202] / np.linalg.norm(candidates[202])) > (
            queries @ candidates[0] / np.linalg.norm(candidates[0])
        )
        assert best_own_ranks(queries, candidates, pairs).tolist() == (own + last).tolist()


def test_ranks_do_not_depend_on_how_queries_are_grouped(monkeypatch):
    images, captions, image_of = some()
    pairs = np.stack([image_of, np.arange(len(image_of))], axis=1)
    whole = best_own_ranks(images, captions, pairs)
    monkeypatch.setattr(recall, "_COSINES_AT_ONCE", 7 * len(captions))
    np.testing.assert_array_equal(best_own_ranks(images, captions, pairs), whole)


def test_recall_with_one_caption_an_image_is_scikit_learns_top_k_accuracy():
    images = np.random.default_rng(1).normal(size=(60, DIM)).astype(np.float32)
    captions = images + np.random.default_rng(2).normal(size=images.shape).astype(np.float32)
    scores = recall_scores(embedded(images), captions, np.arange(60))
    cosines = images @ captions.T / np.outer(np.linalg.norm(images, axis=1), np.linalg.norm(captions, axis=1))
    for k in (1, 5, 10):
        for direction, table in (("image_to_text", cosines), ("text_to_image", cosines.T)):
            wanted = top_k_accuracy_score(np.arange(60), table, k=k)
            assert scores[direction][f"student_r{k}"] == pytest.approx(wanted, rel=1e-6)


def test_each_caption_is_a_query_and_an_image_finds_any_of_its_own():
    # Image 0 has captions 0 and 1, image 1 has caption 2: caption 1 lies beside image 1.
    images = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    captions = np.array([[1.0, 0.1], [0.1, 1.0], [0.2, 1.0]], np.float32)
    item = EmbeddedSet(images, images, np.eye(1, 2), np.zeros(2, np.int64), ["all"], ["x", "y"])
    scores = recall_scores(item, captions, np.array([0, 0, 1]))
    assert (scores["images"], scores["captions"]) == (2, 3)
    assert scores["image_to_text"]["student_r1"] == 0.5  # image 1's nearest caption is image 0's
    assert scores["text_to_image"]["student_r1"] == pytest.approx(2 / 3)
    assert scores["image_to_text"]["student_r5"] == scores["text_to_image"]["teacher_r5"] == 1.0
    json.dumps(scores, allow_nan=False)


def test_an_unreadable_image_neither_finds_nor_is_found():
    images, captions, image_of = some()
    whole = recall_scores(embedded(images), captions, image_of)
    lost = images.copy()
    lost[0] = np.nan
    scores = recall_scores(embedded(lost), captions, image_of)
    assert scores["images"] == whole["images"] == 39
    pairs = np.stack([np.arange(len(image_of)), image_of], axis=1)
    ranks = best_own_ranks(captions, lost, pairs)
    assert (ranks[image_of == 0] == 40).all() and (ranks[image_of != 0] < 40).all()


def test_equal_captions_are_no_free_hits():
    images = np.random.default_rng(0).normal(size=(20, DIM)).astype(np.float32)
    scores = recall_scores(embedded(images), np.ones((20, DIM), np.float32), np.arange(20))
    assert [scores["image_to_text"][f"student_r{k}"] for k in (1, 5, 10)] == [0.05, 0.25, 0.5]


def test_intervals_are_scipys_with_images_drawn_and_their_captions_with_them():
    images, captions, image_of = some()
    scores = recall_scores(embedded(images), captions, image_of)["text_to_image"]
    pairs = np.stack([np.arange(len(image_of)), image_of], axis=1)
    found = best_own_ranks(captions, images, pairs) < 5
    of_image = [found[image_of == image] for image in range(39)]
    wanted = stats.bootstrap(
        ([hits.sum() for hits in of_image], [len(hits) for hits in of_image]),
        lambda hits, asked, axis: hits.sum(axis=axis) / asked.sum(axis=axis),
        n_resamples=2000,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    np.testing.assert_allclose(scores["student_r5_interval"], wanted, rtol=1e-6)


def test_captions_are_read_with_the_rows_of_their_images(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"b/2.jpg": ["two", "second"], "a/1.jpg": ["one"]}))
    texts, image_of = read_captions(path, ["a/1.jpg", "b/2.jpg", "b/3.jpg"], "dev")
    assert texts == ["two", "second", "one"] and image_of.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "no captions"),
        ('{"z.jpg": ["text"]}', r"'z\.jpg' is no image of evaluate\.dev \(its first is 'a\.jpg'\)"),
        ('{"a.jpg": "text"}', "wanted a list of captions"),
        ('{"a.jpg": []}', "at least one"),
        ('{"a.jpg": [" "]}', "is no text"),
    ],
)
def test_captions_that_are_none_are_refused_in_one_line(tmp_path, text, wanted):
    path = tmp_path / "captions.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=wanted) as caught:
        read_captions(path, ["a.jpg"], "dev")
    assert "\n" not in str(caught.value)
