"""Nearest neighbours and the linear probe, against scikit-learn, torch and the condition that an optimum meets."""

import doctest

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from dimefm.stages.score import probe
from dimefm.stages.score.probe import fit_linear_probe, fitted_once, held_out, knn_scores
from dimefm.stages.score.score_inputs import Memo

DIM, CLASSES = 12, 6


def blobs(seed, per_class=15, spread=1.0, norm=1.0):
    """Embeddings around one direction for each class and a common one, as CLIP's are: rows, labels."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, DIM)) + 2
    labels = np.repeat(np.arange(CLASSES), per_class)
    noise = np.random.default_rng(seed).normal(size=(len(labels), DIM))
    return (norm * (centres[labels] + spread * noise)).astype(np.float32), labels


def unit(rows):
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


def test_the_worked_examples_hold():
    result = doctest.testmod(probe)
    assert result.failed == 0 and result.attempted >= 2


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_of_neighbours_are_scikit_learns(k):
    fitting, labels = blobs(1)
    queries, _ = blobs(2)
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    model.fit(fitting.astype(np.float64), labels)
    wanted = model.predict_proba(queries.astype(np.float64))
    np.testing.assert_allclose(knn_scores(fitting, labels, queries, CLASSES, k), wanted, rtol=1e-6, atol=1e-12)


def test_neighbours_know_what_they_have_seen_and_count_few_images():
    fitting, labels = blobs(1)
    assert (knn_scores(fitting, labels, fitting, CLASSES, k=1).argmax(axis=1) == labels).all()
    few = knn_scores(fitting[::15], labels[::15], fitting, CLASSES)  # 20 neighbours are asked for, 6 are there
    np.testing.assert_allclose(few.sum(axis=1), 1.0)


def test_votes_do_not_depend_on_how_queries_are_grouped(monkeypatch):
    fitting, labels = blobs(1)
    queries, _ = blobs(2)
    whole = knn_scores(fitting, labels, queries, CLASSES)
    monkeypatch.setattr(probe, "_COSINES_AT_ONCE", 7 * len(fitting))
    np.testing.assert_allclose(knn_scores(fitting, labels, queries, CLASSES), whole, rtol=1e-12)


def test_the_probe_is_scikit_learns_regression_on_standardised_rows():
    fitting, labels = blobs(1)
    queries, answers = blobs(2)
    fitted = fit_linear_probe(fitting, labels, CLASSES)
    rows, asked = unit(fitting), unit(queries)
    mean, scale = rows.mean(axis=0), np.sqrt(DIM)
    model = LogisticRegression(C=fitted.c, max_iter=1000, tol=1e-5).fit((rows - mean) * scale, labels)
    wanted = model.decision_function((asked - mean) * scale)
    np.testing.assert_allclose(fitted.scores(queries), wanted, rtol=1e-6, atol=1e-9)
    assert accuracy_score(answers, fitted.scores(queries).argmax(axis=1)) == model.score(
        (asked - mean) * scale, answers
    )


def test_the_probe_is_at_the_minimum_of_its_loss_that_torch_finds():
    """Cross-entropy summed over images + |w|^2 / 2C, minimised in float64 by another program."""
    fitting, labels = blobs(1)
    fitted = fit_linear_probe(fitting, labels, CLASSES)
    rows, target = torch.from_numpy(unit(fitting)), torch.from_numpy(labels)

    def loss(weight, bias):
        penalty = weight.square().sum() / (2 * fitted.c * DIM)  # C counts in rows of length sqrt(DIM)
        return torch.nn.functional.cross_entropy(rows @ weight.T + bias, target, reduction="sum") + penalty

    weight = torch.zeros(CLASSES, DIM, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        value = loss(weight, bias)
        value.backward()
        return value

    solver.step(closure)
    found = loss(torch.from_numpy(fitted.weight), torch.from_numpy(fitted.bias))
    assert fitted.converged
    assert found.item() == pytest.approx(loss(weight, bias).item(), rel=1e-6)


def test_neither_depends_on_the_norm_of_embeddings():
    fitting, labels = blobs(1)
    queries, _ = blobs(2)
    large, _ = blobs(2, norm=1000.0)
    np.testing.assert_allclose(
        knn_scores(1000 * fitting, labels, large, CLASSES), knn_scores(fitting, labels, queries, CLASSES), rtol=1e-4
    )
    one, other = fit_linear_probe(fitting, labels, CLASSES), fit_linear_probe(1000 * fitting, labels, CLASSES)
    assert one.c == other.c
    assert (one.scores(queries).argmax(axis=1) == other.scores(large).argmax(axis=1)).all()


def test_the_same_images_and_labels_are_fitted_once():
    fitting, labels = blobs(1)
    memo = Memo()
    first = fitted_once(memo, fitting, labels, CLASSES)
    assert fitted_once(memo, fitting.copy(), labels.copy(), CLASSES) is first
    others = [(fitting + 1, labels, CLASSES), (fitting, labels[::-1].copy(), CLASSES), (fitting, labels, CLASSES + 1)]
    assert all(fitted_once(memo, *other) is not first for other in others)
    assert (first.weight == fit_linear_probe(fitting, labels, CLASSES).weight).all()


def test_the_penalty_is_chosen_on_images_that_are_held_out():
    # Directions that say nothing: the weaker the penalty, the more a probe learns by heart. The split tells.
    noise = np.random.default_rng(3).normal(size=(200, 40))
    labels = np.random.default_rng(4).integers(0, 2, 200)
    noise[:, 0] += 1.5 * (2 * labels - 1)
    chosen = fit_linear_probe(noise, labels, 2)
    assert chosen.c < 1.0
    fresh = np.random.default_rng(5).normal(size=(400, 40))
    answers = np.random.default_rng(6).integers(0, 2, 400)
    fresh[:, 0] += 1.5 * (2 * answers - 1)
    assert np.mean(chosen.scores(fresh).argmax(axis=1) == answers) > 0.8


def test_a_fifth_of_each_class_is_held_out_and_no_class_vanishes():
    labels = np.array([0] * 15 + [1] * 2 + [2])
    held = held_out(labels)
    assert [held[labels == label].sum() for label in range(3)] == [3, 1, 0]
    np.testing.assert_array_equal(held, held_out(labels))
    assert (held != held_out(labels, seed=1)).any()


def test_rows_of_nan_get_nan_and_a_class_without_images_is_never_chosen():
    fitting, labels = blobs(1)
    queries, _ = blobs(2)
    queries[3] = np.nan
    linear = fit_linear_probe(fitting, labels + 1, CLASSES + 2).scores(queries)
    votes = knn_scores(fitting, labels + 1, queries, CLASSES + 2)
    for scores in (linear, votes):
        assert np.isnan(scores[3]).all() and not np.isnan(np.delete(scores, 3, axis=0)).any()
        assert set(np.delete(scores, 3, axis=0).argmax(axis=1)) <= set(range(1, CLASSES + 1))


def test_two_classes_of_many_are_told_apart():
    fitting, labels = blobs(1)
    two = labels >= CLASSES - 2
    fitted = fit_linear_probe(fitting[two], labels[two], CLASSES)
    assert np.mean(fitted.scores(fitting[two]).argmax(axis=1) == labels[two]) > 0.9


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_too_few_images_to_choose_on_are_refused(labels):
    with pytest.raises(ValueError, match="two classes or more, and at least two of one"):
        fit_linear_probe(np.eye(3), np.array(labels), 3)
