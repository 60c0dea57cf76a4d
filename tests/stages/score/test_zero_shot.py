"""Scores of a labelled set from embeddings: by hand, and each part as the function that it comes from."""

import doctest
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dimefm.cache import InputError
from dimefm.stages.score import predictions
from dimefm.stages.score.bootstrap import mean_interval, paired_interval
from dimefm.stages.score.embedded_set import EmbeddedSet
from dimefm.stages.score.predictions import hits, versus, write_predictions, zero_shot_predictions
from dimefm.stages.score.probe import fit_linear_probe, knn_scores, probe_scores
from dimefm.stages.score.score_inputs import Memo
from dimefm.stages.score.zero_shot import zero_shot_scores

IDS = ["ant", "bee", "cat"]


def embedded(seed, per_class=8, noise=0.8):
    """Three classes around the axes; the teacher is nearer to them than the student. Image 1 could not be read."""
    numbers = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    student, teacher = (
        (np.eye(3, 5)[labels] + spread * numbers.normal(size=(len(labels), 5))).astype(np.float32)
        for spread in (noise, noise / 2)
    )
    student[1] = teacher[1] = np.nan
    sources = [f"{IDS[label]}/{i}.jpg" for i, label in enumerate(labels)]
    return EmbeddedSet(student, teacher, np.eye(3, 5, dtype=np.float32), labels, IDS, sources)


def test_the_worked_examples_hold():
    result = doctest.testmod(predictions)
    assert result.failed == 0 and result.attempted >= 2


def test_zero_shot_scores_by_hand():
    # Four images of two classes, the second class's vector the second axis; image 3 could not be read.
    student = np.array([[1, 0], [0, 1], [1, 0], [np.nan, np.nan]], np.float32)
    teacher = np.array([[1, 0], [1, 0], [0, 1], [np.nan, np.nan]], np.float32)
    labels = np.array([0, 0, 1, 1])
    item = EmbeddedSet(student, teacher, np.eye(2, dtype=np.float32), labels, ["a", "b"], list("wxyz"))
    scores = zero_shot_scores(item)
    assert (scores["n"], scores["unreadable"]) == (4, 1)
    assert (scores["student_top1"], scores["teacher_top1"]) == (0.25, 0.75)
    assert scores["retention"] == pytest.approx(1 / 3)
    assert (scores["student_class_mean"], scores["teacher_class_mean"]) == (0.25, 0.75)
    assert scores["per_class"] == {
        "a": {"n": 2, "student_top1": 0.5, "teacher_top1": 1.0},
        "b": {"n": 2, "student_top1": 0.0, "teacher_top1": 0.5},
    }
    assert scores["agreement"] == pytest.approx(1 / 3) and scores["cosine"] == pytest.approx(1 / 3)


def test_intervals_are_those_of_the_hits():
    item = embedded(0)
    scores, table = zero_shot_scores(item), zero_shot_predictions(item)
    student, teacher = hits(table), hits(table, "teacher")
    assert scores["student_top1"] == student.mean() < scores["teacher_top1"] == teacher.mean()
    assert scores["student_top1_interval"] == pytest.approx(mean_interval(student), rel=1e-6)
    assert scores["teacher_top1_interval"] == pytest.approx(mean_interval(teacher), rel=1e-6)
    assert scores["retention_interval"] == pytest.approx(paired_interval(student, teacher, np.divide), rel=1e-6)
    json.dumps(scores, allow_nan=False)


def test_a_probe_learns_from_one_set_and_is_scored_on_the_other():
    fit, scored = embedded(1), embedded(2)
    scores = probe_scores(scored, fit, "test", "dev", Memo())
    assert scores["fitted_on"] == "dev" and scores["fit_images"] == 23 and scores["near_duplicates"] == 0
    known, readable = fit.readable, scored.readable
    for side in ("student", "teacher"):
        fitting, queries = getattr(fit, side)[known], getattr(scored, side)[readable]
        votes = knn_scores(fitting, fit.labels[known], queries, 3).argmax(axis=1)
        probe = fit_linear_probe(fitting, fit.labels[known], 3)
        answers = probe.scores(queries).argmax(axis=1)
        right = scored.labels[readable]
        # Of 24 images one could not be read: it is wrong.
        assert scores["knn"][f"{side}_top1"] == pytest.approx(np.sum(votes == right) / 24)
        assert scores["linear"][f"{side}_top1"] == pytest.approx(np.sum(answers == right) / 24)
        assert scores["linear"][f"{side}_c"] == probe.c and scores["linear"][f"{side}_converged"]
    assert scores["linear"]["retention"] == scores["linear"]["student_top1"] / scores["linear"]["teacher_top1"]
    json.dumps(scores, allow_nan=False)


def test_scored_images_that_are_among_the_fitting_ones_are_counted():
    assert probe_scores(embedded(1), embedded(1), "test", "dev", Memo())["near_duplicates"] == 23


def test_labels_of_the_scored_set_change_nothing_but_what_counts_as_right():
    fit, scored = embedded(1), embedded(2)
    turned = EmbeddedSet(scored.student, scored.teacher, scored.head, (scored.labels + 1) % 3, IDS, scored.sources)
    one, other = (probe_scores(item, fit, "test", "dev", Memo())["linear"] for item in (scored, turned))
    assert (one["student_c"], one["teacher_c"]) == (other["student_c"], other["teacher_c"])
    assert one["student_top1"] > other["student_top1"]


def test_a_probe_of_too_few_images_is_refused():
    fit, scored = embedded(1), embedded(2)
    blind = EmbeddedSet(fit.student * np.nan, fit.teacher * np.nan, fit.head, fit.labels, IDS, fit.sources)
    with pytest.raises(InputError, match=r"evaluate\.test\.probe: dev has 0 readable images"):
        probe_scores(scored, blind, "test", "dev", Memo())


def test_predictions_name_the_classes_and_come_back_from_disk(tmp_path):
    item = embedded(0)
    table = zero_shot_predictions(item)
    write_predictions(tmp_path / "predictions" / "dev.parquet", table)
    back = pq.read_table(tmp_path / "predictions" / "dev.parquet")
    assert back.equals(table) and back.column_names == ["source", "class_id", "student", "teacher"]
    assert back.slice(0, 1).column("class_id").to_pylist() == ["ant"]
    assert back.slice(1, 1).to_pylist()[0]["student"] is None  # it could not be read
    best = item.student[2] @ item.head.T
    assert back.slice(2, 1).to_pylist()[0]["student"] == IDS[int(best.argmax())]


def test_two_runs_are_compared_image_by_image():
    one, other = (zero_shot_predictions(item) for item in (embedded(0, noise=0.2), embedded(3, noise=1.5)))
    found = versus(one, other)
    assert found["student_top1"] == pytest.approx(hits(one).mean() - hits(other).mean()) and found["student_top1"] > 0
    assert found["student_top1_interval"] == list(paired_interval(hits(one), hits(other)))
    fewer = one.slice(0, 5)
    relabelled = one.set_column(1, "class_id", pa.array(["bee"] * len(one)))
    assert versus(fewer, one) is None and versus(relabelled, one) is None
