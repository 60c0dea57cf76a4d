"""Pseudo-pairs: exact cosines, a fixed order, and the same bytes for a shard whenever it is computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.cosine import cosines, nearest_rows, unit_rows
from dimefm.cache.disk.mapped import MappedArray
from dimefm.cache.disk.row_tables import FAILED, IMAGE_COLUMNS, OK, RowTable, write_rows
from dimefm.cache.reader.feature_cache import EmbeddingSet
from dimefm.stages.retrieve.pairs import MOST_CANDIDATES, RECALL_QUERIES, build_side, retrieve
from dimefm.stages.settings.cache import PairsSettings

WIDTH = 8


def embedding_set(folder: Path, embeddings: NDArray[Any], chunk_rows: int = 64) -> EmbeddingSet:
    """A side of a cache; rows of NaN are failed."""
    spec = ArraySpec(embeddings.shape, "float16", chunk_rows)
    declare_arrays(folder / "a.zarr", {"embedding": spec})
    for chunk in range(spec.num_chunks):
        write_chunk(folder / "a.zarr", "embedding", spec, chunk, embeddings[chunk * chunk_rows :][:chunk_rows])
    rows = ({"source": "x", "status": FAILED if np.isnan(row).any() else OK} for row in embeddings)
    write_rows(folder / "rows.parquet", IMAGE_COLUMNS, rows, chunk_rows)
    return EmbeddingSet(MappedArray.open(folder / "a.zarr", "embedding"), RowTable(folder / "rows.parquet"))


@pytest.fixture
def sides(tmp_path: Path) -> tuple[EmbeddingSet, EmbeddingSet]:
    """300 images and 500 sentences, the seventh of each failed, sentences 10 and 20 the same."""
    rng = np.random.default_rng(0)
    images, sentences = (rng.standard_normal((n, WIDTH)).astype(np.float16) * 3 for n in (300, 500))
    images[6] = sentences[6] = np.nan
    sentences[20] = sentences[10]
    return embedding_set(tmp_path / "images", images), embedding_set(tmp_path / "sentences", sentences)


def cosine_by_float64(queries: EmbeddingSet, targets: EmbeddingSet) -> NDArray[np.float64]:
    unit = [side.embeddings[:].astype(np.float64) for side in (queries, targets)]
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in unit]
    return np.nan_to_num(unit[0] @ unit[1].T, nan=-2)


def test_exact_pairs_are_the_top_k_of_a_float64_product(sides: tuple[EmbeddingSet, EmbeddingSet]) -> None:
    images, sentences = sides
    index, info = build_side(sentences, images, PairsSettings(k=5))
    ids, scores = retrieve(images.embeddings, sentences.embeddings, index, 5, 0, 300)
    cosine = cosine_by_float64(images, sentences)
    wanted = np.argsort(-cosine, axis=1, kind="stable")[:, :5]
    found = images.usable
    assert info["recall"] == 1.0 and info["recall_queries"] == 299
    assert np.mean(ids[found] == wanted[found]) > 0.995  # two cosines may be equal to within a rounding
    np.testing.assert_allclose(scores[found], np.take_along_axis(cosine, wanted, axis=1)[found], atol=3e-7)
    assert (ids[6] == -1).all() and np.isnan(scores[6]).all()
    assert not (ids == 6).any()


def test_scores_are_exact_cosines_where_the_index_is_approximate(sides: tuple[EmbeddingSet, EmbeddingSet]) -> None:
    images, sentences = sides
    index, info = build_side(sentences, images, PairsSettings(k=5, index="ivf", min_recall=0.99))
    ids, scores = retrieve(images.embeddings, sentences.embeddings, index, 5, 0, 300)
    cosine = cosine_by_float64(images, sentences)
    true = np.argsort(-cosine, axis=1)[:, :5]
    found = images.usable
    np.testing.assert_allclose(scores[found], np.take_along_axis(cosine, ids, axis=1)[found], atol=3e-7)
    overlap = np.mean([np.isin(true[row], ids[row]).mean() for row in found])
    assert overlap == pytest.approx(info["recall"], abs=1e-3) and info["recall"] >= 0.99  # the sample is all 299 here


def test_scores_fall_and_among_equals_the_lower_row_comes_first(sides: tuple[EmbeddingSet, EmbeddingSet]) -> None:
    images, sentences = sides
    index, _ = build_side(sentences, images, PairsSettings(k=500))
    ids, scores = retrieve(images.embeddings, sentences.embeddings, index, 500, 0, 300)
    assert (np.diff(scores[0][:499]) <= 0).all() and (np.sort(ids[0][:499]) == sentences.usable).all()
    assert ids[0, 499] == -1 and np.isnan(scores[0, 499])  # there are 499
    places = [int(np.flatnonzero(ids[0] == row)[0]) for row in (10, 20)]
    assert places[1] == places[0] + 1


def by_hand(queries: NDArray[Any], targets: NDArray[Any], k: int) -> NDArray[np.int64]:
    """(n, k) ids by float64 cosines that are computed once for all equal rows, the lower row first among equals."""
    distinct, group = np.unique(targets, axis=0, return_inverse=True)
    one, other = (rows.astype(np.float64) for rows in (queries, distinct))
    cosine = (one / np.linalg.norm(one, axis=1)[:, None]) @ (other / np.linalg.norm(other, axis=1)[:, None]).T
    return np.argsort(-cosine[:, group.ravel()], axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_of_equal_rows_the_lowest_are_kept(tmp_path: Path, kind: Any, blocks: str, monkeypatch: Any) -> None:
    """60 equal sentences among 90, in several chunks: an image whose nearest they are has the five lowest."""
    if blocks == "many":
        monkeypatch.setattr("dimefm.cache.disk.cosine.BLOCK_BYTES", 4 * WIDTH * 7)
    rng = np.random.default_rng(3)
    sentences, images = (rng.standard_normal((n, WIDTH)).astype(np.float16) for n in (90, 200))
    sentences[np.sort(rng.permutation(90)[:60])] = sentences[int(rng.integers(90))]
    sides = embedding_set(tmp_path / "sentences", sentences, 16), embedding_set(tmp_path / "images", images, 32)
    index, info = build_side(*sides, PairsSettings(k=5, index=kind, min_recall=1.0))
    assert info["recall"] == 1.0
    ids, scores = retrieve(sides[1].embeddings, sides[0].embeddings, index, 5, 0, 200)
    np.testing.assert_array_equal(ids, by_hand(images, sentences, 5))
    for row in range(200):  # equal rows have equal cosines, bit for bit
        for i in range(1, 5):
            if (sentences[ids[row, i]] == sentences[ids[row, i - 1]]).all():
                assert scores[row, i] == scores[row, i - 1]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_more_equal_rows_than_an_index_is_asked_for_do_not_hide_the_lowest(tmp_path: Path, kind: Any) -> None:
    rng = np.random.default_rng(4)
    sentences = rng.standard_normal((MOST_CANDIDATES + 600, WIDTH)).astype(np.float16)
    sentences[np.sort(rng.permutation(len(sentences))[: MOST_CANDIDATES + 500])] = 1.0
    images = (1 + 0.01 * rng.standard_normal((20, WIDTH))).astype(np.float16)
    sides = embedding_set(tmp_path / "sentences", sentences, 500), embedding_set(tmp_path / "images", images)
    index, _ = build_side(*sides, PairsSettings(k=3, index=kind))
    ids, _ = retrieve(sides[1].embeddings, sides[0].embeddings, index, 3, 0, 20)
    np.testing.assert_array_equal(ids, by_hand(images, sentences, 3))


def test_queries_that_are_asked_for_in_pieces_find_the_same(sides: Any, monkeypatch: Any) -> None:
    images, sentences = sides
    index, _ = build_side(sentences, images, PairsSettings(k=5))
    whole = retrieve(images.embeddings, sentences.embeddings, index, 5, 0, 300)
    monkeypatch.setattr("dimefm.stages.retrieve.pairs.BLOCK_BYTES", 32 * 13 * 7)
    parts = retrieve(images.embeddings, sentences.embeddings, index, 5, 0, 300)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(whole, parts))


def test_a_cosine_has_the_same_bits_wherever_its_rows_stand() -> None:
    rng = np.random.default_rng(5)
    rows, (queries, _) = rng.standard_normal((700, 96)).astype(np.float16), unit_rows(rng.standard_normal((9, 96)))
    alone = np.array([[cosines(query[None], np.array([[i]]), rows)[0, 0] for i in range(40)] for query in queries])
    np.testing.assert_array_equal(cosines(queries, np.tile(np.arange(40), (9, 1)), rows), alone)
    for start in (0, 1, 3, 17, 250):
        moved = np.concatenate([rng.standard_normal((start, 96)).astype(np.float16) - 9, rows[:40]])
        ids, scores = nearest_rows(queries, moved, np.arange(start + 40), start + 40)
        there = np.argsort(ids, axis=1)
        np.testing.assert_array_equal(np.take_along_axis(scores, there, axis=1)[:, start:], alone)


def test_rows_found_in_parts_are_those_found_at_once(monkeypatch: Any) -> None:
    """Any order of the parts, equal rows on both sides of a cut, more neighbours than a part has rows."""
    rng = np.random.default_rng(6)
    rows, (queries, _) = (
        rng.standard_normal((90, WIDTH)).astype(np.float16),
        unit_rows(rng.standard_normal((30, WIDTH))),
    )
    rows[rng.permutation(90)[:50]] = rows[0]
    rows[33] = np.nan
    whole = nearest_rows(queries, rows, np.arange(90), 12)
    assert (whole[0] >= 0).all() and not (whole[0] == 33).any()
    for block in (1, 4, 90):
        monkeypatch.setattr("dimefm.cache.disk.cosine.BLOCK_BYTES", 4 * WIDTH * block)
        for first in (np.arange(0, 90, 2), np.arange(85, 90), np.arange(3)):
            best = nearest_rows(queries, rows, first, 12)
            found = nearest_rows(queries, rows, np.setdiff1d(np.arange(90), first), 12, best)
            for ours, theirs in zip(found, whole):
                assert ours.tobytes() == theirs.tobytes()


def test_both_directions_come_from_the_same_function(sides: tuple[EmbeddingSet, EmbeddingSet]) -> None:
    images, sentences = sides
    index, _ = build_side(images, sentences, PairsSettings(k=1))
    ids, scores = retrieve(sentences.embeddings, images.embeddings, index, 1, 490, 500)
    assert ids.shape == scores.shape == (10, 1) and (ids.dtype, scores.dtype) == (np.int64, np.float32)
    assert ids.max() < 300


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_shard_repeats_its_bytes_through_a_saved_index(
    tmp_path: Path, sides: tuple[EmbeddingSet, EmbeddingSet], kind: Any
) -> None:
    images, sentences = sides
    settings = PairsSettings(k=4, index=kind)
    first, info = build_side(sentences, images, settings)
    again, info_again = build_side(sentences, images, settings)
    again.save(tmp_path / "index.faiss")
    loaded = type(first).load(tmp_path / "index.faiss", WIDTH, 500)
    assert info == info_again
    for index in (again, loaded):
        for got, wanted in zip(
            retrieve(images.embeddings, sentences.embeddings, index, 4, 64, 128),
            retrieve(images.embeddings, sentences.embeddings, first, 4, 64, 128),
        ):
            assert got.tobytes() == wanted.tobytes()


def test_recall_is_measured_on_a_sample_of_the_other_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    few = embedding_set(tmp_path / "few", rng.standard_normal((20, WIDTH)))
    many = embedding_set(tmp_path / "many", rng.standard_normal((RECALL_QUERIES + 100, WIDTH)), chunk_rows=200)
    assert build_side(few, many, PairsSettings(k=2))[1]["recall_queries"] == RECALL_QUERIES
    assert build_side(many, few, PairsSettings(k=2))[1]["recall_queries"] == 20


def test_a_side_without_a_single_embedding_has_no_pairs(tmp_path: Path) -> None:
    images = embedding_set(tmp_path / "images", np.ones((3, WIDTH)))
    nothing = embedding_set(tmp_path / "nothing", np.full((4, WIDTH), np.nan))
    index, info = build_side(nothing, images, PairsSettings(k=2))
    ids, scores = retrieve(images.embeddings, nothing.embeddings, index, 2, 0, 3)
    assert (ids == -1).all() and np.isnan(scores).all()
    assert (info["rows"], info["recall"]) == (0, None)
    index, info = build_side(images, nothing, PairsSettings(k=2))
    assert (info["rows"], info["recall"], info["recall_queries"]) == (3, None, 0)


def test_an_index_of_another_array_is_refused(sides: tuple[EmbeddingSet, EmbeddingSet]) -> None:
    images, sentences = sides
    index, _ = build_side(sentences, images, PairsSettings(k=2))
    with pytest.raises(ValueError, match=r"the index is over \(500, 8\)"):
        retrieve(images.embeddings, images.embeddings, index, 2, 0, 10)
