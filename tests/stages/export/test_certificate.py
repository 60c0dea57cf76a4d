"""The certificate: 1 for the teacher itself, chance for noise, and by hand in between."""

import numpy as np
import pytest

from dimefm.cache.disk.index import build_index
from dimefm.stages.export.certificate import (
    Queries,
    against_student_vectors,
    against_teacher_vectors,
    exact,
    kept_share,
    rounded,
)

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(300, 16)).astype(np.float32)
SENTENCES = RANDOM.normal(size=(400, 16)).astype(np.float32)


def searched(vectors):
    index, _ = build_index(vectors, np.arange(len(vectors)), vectors[:0], 1, kind="flat")
    return lambda queries, k: index.search(queries.astype(np.float32), k)[0]


def kept(document, who="student"):
    return {k: value["kept"] for k, value in document[who].items()}


def test_the_teacher_itself_keeps_everything_in_both_directions():
    one = against_teacher_vectors(Queries(IMAGES, IMAGES), searched(SENTENCES), 400)
    other = against_student_vectors(Queries(SENTENCES, SENTENCES), Queries(IMAGES, IMAGES))
    for document in (one, other):
        assert kept(document) == {"1": 1.0, "10": 1.0, "100": 1.0}
        assert all(value > 0.98 for value in kept(document, "teacher_fp16").values())
    assert one["rows"] == 400 and other["rows"] == 300


def test_a_student_of_noise_keeps_as_much_as_chance_would():
    noise = np.random.default_rng(5).normal(size=IMAGES.shape)
    for document in (
        against_teacher_vectors(Queries(noise, IMAGES), searched(SENTENCES), 400),
        against_student_vectors(Queries(SENTENCES, SENTENCES), Queries(noise, IMAGES)),
    ):
        for k in ("10", "100"):
            low, high = document["student"][k]["interval"]
            assert low - 0.02 < document["chance"][k] < high + 0.02
            assert document["student"][k]["kept"] == pytest.approx(document["chance"][k], abs=0.03)


def test_a_row_never_finds_itself():
    rows = np.arange(0, 300, 3)
    asked = Queries(IMAGES[rows], IMAGES[rows], rows)
    document = against_teacher_vectors(asked, searched(IMAGES), 300)
    assert document["chance"]["1"] == pytest.approx(1 / 299)
    # The student's picture of an image is its own nearest row: counted, it would keep k = 1 by itself.
    shifted = Queries(IMAGES[rows] + RANDOM.normal(scale=0.3, size=(100, 16)), IMAGES[rows], rows)
    others = against_teacher_vectors(shifted, searched(IMAGES), 300)
    counted = against_teacher_vectors(Queries(shifted.student, shifted.teacher), searched(IMAGES), 300)
    assert kept(counted)["1"] == 1.0 > kept(others)["1"]
    own = against_student_vectors(asked, Queries(IMAGES, IMAGES, np.arange(300)))
    assert kept(own)["1"] == 1.0 and own["chance"]["1"] == pytest.approx(1 / 299)


def test_shares_by_hand_and_ks_that_there_are_rows_for():
    found, wanted = np.array([[3, 1, 2], [7, 8, 9]]), np.array([[1, 2, 4], [9, -1, -1]])
    assert kept_share(found, wanted).tolist() == [2 / 3, 1.0]
    vectors = np.eye(4, dtype=np.float32)
    document = against_student_vectors(Queries(vectors, vectors), Queries(vectors, vectors))
    assert list(document["student"]) == ["1"]  # of four rows there is no top 10


def test_exact_search_takes_the_lower_of_equal_rows_and_rounding_is_to_half_precision():
    vectors = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    assert exact(vectors)(vectors[:1], 3).tolist() == [[0, 2, 1]]
    assert rounded(vectors * 3).dtype == np.float16 and rounded(vectors * 3).tolist() == vectors.tolist()
