"""Metrics by hand and against scikit-learn; bootstrap intervals against SciPy and the exact binomial."""

import doctest

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from dimefm.stages.score import bootstrap, metrics
from dimefm.stages.score.bootstrap import bootstrap_means, compared, interval, mean_interval, paired_interval
from dimefm.stages.score.metrics import (
    agreement,
    mean_cosine,
    per_class_accuracy,
    top_k_hits,
    unit_rows,
)

NAN = float("nan")


def top_k_accuracy(logits, labels, k):
    return top_k_hits(logits, labels, k).mean()


@pytest.fixture
def guesses():
    """Logits of 300 images and 12 classes that are often right, and labels of uneven frequency; class 11 has none."""
    numbers = np.random.default_rng(7)
    labels = np.minimum(numbers.geometric(0.3, 300) - 1, 10)
    logits = numbers.normal(size=(300, 12))
    logits[np.arange(300), labels] += 1.5
    return logits, labels


@pytest.mark.parametrize("module", [metrics, bootstrap])
def test_the_worked_examples_hold(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 4


def test_top_k_by_hand():
    logits = np.array([[0.1, 0.5, 0.4], [0.9, 0.05, 0.05], [0.2, 0.3, 0.5], [NAN, NAN, NAN]])
    labels = np.array([2, 0, 0, 1])
    # Ranks of the labels: second, first, third, unreadable.
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 0.75, 0.75]


def test_equal_logits_are_no_free_hits():
    # Ten classes that look the same: the first one is chosen, whatever the label.
    labels = np.arange(10)
    assert top_k_accuracy(np.zeros((10, 10)), labels, 1) == 0.1
    assert top_k_accuracy(np.zeros((10, 10)), labels, 5) == 0.5


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_is_scikit_learns(guesses, k):
    logits, labels = guesses
    wanted = sklearn_metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(12))
    assert top_k_accuracy(logits, labels, k) == pytest.approx(wanted, rel=1e-6)


def test_accuracy_of_each_class_is_scikit_learns_recall(guesses):
    logits, labels = guesses
    hits, chosen = top_k_hits(logits, labels, 1), logits.argmax(axis=1)
    wanted = sklearn_metrics.recall_score(labels, chosen, labels=range(11), average=None)
    found = per_class_accuracy(hits, labels, 12)
    np.testing.assert_allclose(found[:11], wanted, rtol=1e-6)
    assert np.isnan(found[11])  # no image of it


def test_the_mean_over_classes_is_scikit_learns_balanced_accuracy(guesses):
    logits, labels = guesses
    chosen = logits.argmax(axis=1)
    keep = chosen != 11  # scikit-learn warns of a class that is only ever guessed
    wanted = sklearn_metrics.balanced_accuracy_score(labels[keep], chosen[keep])
    found = per_class_accuracy(top_k_hits(logits, labels, 1)[keep], labels[keep], 12)
    assert np.nanmean(found) == pytest.approx(wanted, rel=1e-6)


def test_agreement_and_cosine_leave_out_what_one_could_not_read():
    first = np.array([[1.0, 0.0], [0.0, 1.0], [NAN, NAN]])
    second = np.array([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert agreement(first, second) == 0.5
    assert mean_cosine(first, second) == 0.5
    nothing = np.full((2, 2), NAN)
    assert np.isnan(agreement(nothing, nothing)) and np.isnan(mean_cosine(nothing, nothing))


def test_unit_rows_are_of_length_1_and_zeros_stay():
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_nothing_is_retained_of_a_teacher_that_is_never_right():
    four, three = np.arange(5) < 4, np.arange(5) < 3
    assert compared("top1", three, four)["retention"] == pytest.approx(0.75)
    scores = compared("top1", three, np.zeros(5, dtype=bool))
    assert scores["retention"] is scores["retention_interval"] is None


def test_intervals_are_scipys_on_the_same_draws():
    values = np.random.default_rng(1).random(211)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=400, confidence_level=0.9, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    np.testing.assert_allclose(mean_interval(values, 400, seed=5, level=0.9), wanted, rtol=1e-6)


@pytest.mark.parametrize("statistic", [np.subtract, np.divide])
def test_paired_intervals_are_scipys_on_the_same_draws(statistic):
    numbers = np.random.default_rng(2)
    first = numbers.random(150) < 0.4
    second = first ^ (numbers.random(150) < 0.2)
    wanted = stats.bootstrap(
        (first, second),
        lambda one, two, axis: statistic(one.mean(axis=axis), two.mean(axis=axis)),
        n_resamples=300,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(9),
    ).confidence_interval
    np.testing.assert_allclose(paired_interval(first, second, statistic, 300, seed=9), wanted, rtol=1e-6)


def test_the_interval_of_an_accuracy_is_the_binomials():
    # Resampled hits are a binomial; 2,000 draws place its quantiles to about one image in 500.
    hits = np.arange(500) < 150
    wanted = stats.binom(500, 0.3).ppf([0.025, 0.975]) / 500
    np.testing.assert_allclose(mean_interval(hits), wanted, atol=2.5 / 500)


def test_what_both_get_right_or_wrong_does_not_widen_a_difference():
    same = np.arange(400) % 3 == 0
    better = same.copy()
    better[:400:8] = True  # never worse on any image
    low, high = paired_interval(better, same)
    assert 0 < low < better.mean() - same.mean() < high
    alone = mean_interval(better)[1] - mean_interval(better)[0]
    assert high - low < alone


def test_intervals_repeat_and_depend_on_the_seed_and_not_on_how_draws_are_grouped(monkeypatch):
    hits = np.arange(90) % 4 == 0
    assert mean_interval(hits) == mean_interval(hits)
    assert (bootstrap_means(hits[:, None], 50, seed=0) != bootstrap_means(hits[:, None], 50, seed=1)).any()
    whole = bootstrap_means(hits[:, None], 50)
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 7 * 90)
    np.testing.assert_array_equal(bootstrap_means(hits[:, None], 50), whole)


def test_a_ratio_by_0_has_no_interval():
    assert np.isnan(paired_interval(np.array([True, True]), np.array([False, False]), np.divide)).all()
    assert np.isnan(interval(np.array([0.1, np.inf]))).all()


def test_runs_over_other_numbers_of_images_are_refused():
    with pytest.raises(ValueError, match="3 and 2 images"):
        paired_interval(np.zeros(3), np.zeros(2))
