"""Nearest rows: what an index finds, leaves out, costs, writes and refuses."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from dimefm.cache.disk.cosine import best_cosines, cosines, recall, unit_rows
from dimefm.cache.disk.index import Index, build_index
from dimefm.cache.disk.index_size import FLAT_ROWS, build_bytes, index_bytes, num_lists, resolve_kind
from dimefm.cache.errors import CacheError

WIDTH = 16
KINDS = ["flat", "ivf"]


def clustered(num_rows: int, seed: int) -> NDArray[np.float16]:
    """Rows around 40 directions, of norms 1 to 5."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((40, WIDTH))
    rows = centres[rng.integers(40, size=num_rows)] + 0.5 * rng.standard_normal((num_rows, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True) * rng.uniform(1, 5, (num_rows, 1))).astype(np.float16)


def build(rows: NDArray[Any], **options: Any) -> tuple[Index, dict[str, Any]]:
    return build_index(rows, np.arange(len(rows)), options.pop("queries", clustered(64, 2)), 4, **options)


def test_the_nearest_rows_are_those_of_a_cosine_computed_by_hand() -> None:
    rows = np.array([[1, 0], [0, 2], [3, 3], [-1, 0]], dtype=np.float16)
    index, _ = build_index(rows, np.arange(4), rows, 2)
    ids, scores = index.search(np.array([[5.0, 0.0], [0.0, 0.1]]), 3)
    assert ids.tolist() == [[0, 2, 1], [1, 2, 0]] or ids.tolist() == [[0, 2, 1], [1, 2, 3]]  # 0 and 3 are equally far
    np.testing.assert_allclose(scores, [[1, 0.5**0.5, 0], [1, 0.5**0.5, 0]], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_width_of_float_finds_the_same(dtype: type) -> None:
    rows = clustered(300, 1)
    index, _ = build(rows)
    queries = clustered(20, 3)
    np.testing.assert_array_equal(index.search(queries.astype(dtype), 4)[0], index.search(queries, 4)[0])


def test_norms_beyond_float32_do_not_matter() -> None:
    rows = clustered(100, 1).astype(np.float64)
    index, _ = build(rows)
    for scale in (1e-200, 1e200):
        np.testing.assert_array_equal(index.search(rows * scale, 1)[0][:, 0], np.arange(100))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_direction_are_never_found(kind: str) -> None:
    rows = clustered(400, 1)
    rows[3], rows[50, 2], rows[399] = 0, np.nan, np.inf
    index, info = build(rows, kind=kind)
    ids, _ = index.search(clustered(50, 3), 400)
    assert info["rows"] == 397
    assert not np.isin([3, 50, 399], ids).any()


@pytest.mark.parametrize("kind", KINDS)
def test_only_usable_rows_are_found(kind: str) -> None:
    rows = clustered(400, 1)
    index, _ = build_index(rows, np.arange(0, 400, 2), clustered(9, 2), 4, kind=kind, min_recall=1.0)
    ids, _ = index.search(rows, 200)
    assert (ids[ids >= 0] % 2 == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("good", [0, 1, 3])
def test_missing_neighbours_are_minus_one_and_nan(kind: str, good: int) -> None:
    rows = clustered(5, 1)
    rows[good:] = np.nan
    index, _ = build(rows, kind=kind)
    ids, scores = index.search(clustered(2, 3), 4)
    assert (ids[:, good:] == -1).all() and np.isnan(scores[:, good:]).all()
    assert (np.sort(ids[:, :good]) == np.arange(good)).all() and np.isfinite(scores[:, :good]).all()


def test_a_query_without_a_direction_finds_nothing_and_disturbs_nobody() -> None:
    index, _ = build(clustered(300, 1))
    queries = clustered(4, 3)
    alone = index.search(queries[[1, 3]], 4)[0]
    queries[0], queries[2, 5] = 0, np.nan
    ids, scores = index.search(queries, 4)
    assert (ids[[0, 2]] == -1).all() and np.isnan(scores[[0, 2]]).all()
    np.testing.assert_array_equal(ids[[1, 3]], alone)


def test_what_does_not_fit_is_refused() -> None:
    index, _ = build(clustered(50, 1))
    for queries in (np.zeros((2, WIDTH + 1)), np.zeros(WIDTH), np.zeros((2, WIDTH), dtype=np.int64)):
        with pytest.raises(ValueError, match="wanted floats of shape"):
            index.search(queries, 3)
    with pytest.raises(ValueError, match="k = 0"):
        index.search(clustered(2, 1), 0)
    with pytest.raises(ValueError, match=r"queries of shape"):
        build(clustered(50, 1), queries=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"wanted \(rows, width\)"):
        build(np.zeros((5, 2, WIDTH)))
    for usable in ([-1, 2], [2, 50], [3, 3]):
        with pytest.raises(ValueError, match="usable rows"):
            build_index(clustered(50, 1), np.array(usable), clustered(2, 1), 3)


def test_lists_are_probed_until_the_measured_recall_is_what_was_asked_for() -> None:
    rows = clustered(6000, 1)
    _, low = build(rows, kind="ivf", min_recall=0.01)
    index, high = build(rows, kind="ivf", min_recall=0.97)
    assert low["nprobe"] == 1 and low["recall"] < 0.97
    assert high["nprobe"] > 1 and high["recall"] >= 0.97
    assert high["type"] == "IVF128,SQfp16" and high["nlist"] == 128  # 6000 / 39 = 153
    # Independently: the share of true neighbours by ids, over the same queries.
    queries, exact = clustered(64, 2).astype(np.float64), rows.astype(np.float64)
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (exact / np.linalg.norm(exact, axis=1)[:, None]).T
    truth = np.argsort(-cosine, axis=1)[:, :4]
    ids, _ = index.search(clustered(64, 2), 4)
    assert np.mean([np.isin(t, i).mean() for t, i in zip(truth, ids)]) == pytest.approx(high["recall"], abs=1 / 256)


def test_an_exact_index_measures_a_recall_of_one() -> None:
    _, info = build(clustered(2000, 1), kind="flat")
    assert (info["recall"], info["recall_k"], info["recall_queries"], info["nprobe"]) == (1.0, 4, 64, None)


def test_a_built_index_has_as_many_lists_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the training sample, counted as if it were all rows, would have fewer."""
    monkeypatch.setattr("dimefm.cache.disk.index.TRAIN_ROWS_PER_LIST", 40)
    index, info = build(clustered(66_000, 1), kind="ivf", min_recall=0.01)
    index.save(tmp_path / "index.faiss")
    assert info["nlist"] == faiss.read_index(str(tmp_path / "index.faiss")).nlist == 1024  # 4 * sqrt(66,000) = 1,028
    assert info["train_rows"] == 40 * 1024


def test_rows_without_clusters_are_searched_by_products_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the lists is not enough: exact search costs less than more of them."""
    rows, queries = (np.random.default_rng(seed).standard_normal((n, 64)) for seed, n in ((1, 3000), (2, 50)))
    rows[5], rows[2999] = 0, np.nan
    flat, _ = build(rows, queries=queries, kind="flat")
    built, info = build(rows, queries=queries, kind="ivf")
    assert info["type"] == "IDMap,SQfp16" and info["rows"] == info["trained_on"] == 2998 and info["recall"] == 1.0
    assert info["tried"]["nprobe"] == info["tried"]["nlist"] // 4 and info["tried"]["recall"] < 0.95
    built.save(tmp_path / "index.faiss")
    loaded = Index.load(tmp_path / "index.faiss", 64, 3000)
    np.testing.assert_array_equal(loaded.rows(), flat.rows())
    monkeypatch.setattr("dimefm.cache.disk.cosine.BLOCK_BYTES", 4 * 64 * 333)
    plain = faiss.read_index(str(tmp_path / "index.faiss"))
    unit, _ = unit_rows(queries)
    for k in (1, 7, 400):
        (ids, scores), wanted = loaded.search(queries, k), flat.search(queries, k)
        np.testing.assert_allclose(scores, wanted[1], atol=loaded.error)
        np.testing.assert_allclose(scores, plain.search(unit, k)[0], atol=1e-5)
        assert k > 7 or np.mean(ids == wanted[0]) > 0.99  # of 400, some are as near as float16 tells
    assert loaded.search(queries, 3000)[0][:, -2:].tolist() == [[-1, -1]] * 50


def test_recall_is_unknown_without_queries_and_then_every_list_is_probed() -> None:
    _, info = build(clustered(500, 1), kind="ivf", queries=np.full((3, WIDTH), np.nan))
    assert info["recall"] is None and info["recall_queries"] == 0
    assert info["nprobe"] == info["nlist"] == 8


def test_either_of_two_equal_rows_counts_as_found() -> None:
    rows = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    best = best_cosines(rows[:1], rows, np.arange(3), 1)
    assert [recall(np.array([[i]]), rows[:1], rows, best) for i in (0, 1, 2, -1)] == [1.0, 1.0, 0.0, 0.0]


def test_blocks_do_not_change_what_is_built_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = clustered(500, 1)
    whole, whole_info = build(rows, kind="ivf")
    monkeypatch.setattr("dimefm.cache.disk.cosine.BLOCK_BYTES", 4 * WIDTH * 33)
    pieces, pieces_info = build(rows, kind="ivf")
    assert whole_info == pieces_info
    np.testing.assert_array_equal(whole.search(rows, 3)[0], pieces.search(rows, 3)[0])


def test_cosines_are_those_of_float64_and_of_each_pair_alone() -> None:
    rows = clustered(50, 1)
    unit, _ = unit_rows(clustered(6, 2))
    ids = np.random.default_rng(0).integers(-1, 50, size=(6, 5))
    got = cosines(unit, ids, rows)
    wide = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    wanted = np.where(ids >= 0, np.einsum("nd,nkd->nk", unit, wide[ids]), np.nan)
    np.testing.assert_allclose(got, wanted, atol=3e-7)
    np.testing.assert_array_equal(cosines(unit[2:3], ids[2:3, 1:2], rows), got[2:3, 1:2])


@pytest.mark.parametrize("kind", KINDS)
def test_building_twice_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    for path in files:
        build(clustered(3000, 1), kind=kind)[0].save(path)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_index_finds_the_same_and_faiss_alone_reads_it(tmp_path: Path, kind: str) -> None:
    built, info = build(clustered(3000, 1), kind=kind, min_recall=0.99)
    built.save(tmp_path / "folder" / "sentences.faiss")
    loaded = Index.load(tmp_path / "folder" / "sentences.faiss", WIDTH, 3000)
    for got, wanted in zip(loaded.search(clustered(40, 3), 5), built.search(clustered(40, 3), 5)):
        np.testing.assert_array_equal(got, wanted)
    plain = faiss.read_index(str(tmp_path / "folder" / "sentences.faiss"))
    assert plain.ntotal == info["rows"] == 3000
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["sentences.faiss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_file_is_refused_in_one_line(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "index.faiss"
    build(clustered(3000, 1), kind=kind)[0].save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CacheError, match=r"index\.faiss: not a readable FAISS index .* again$") as caught:
        Index.load(path, WIDTH, 3000)
    assert "\n" not in str(caught.value)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    with pytest.raises(CacheError, match="missing"):
        Index.load(path, WIDTH, 10)
    path.write_bytes(b"hello, this is a diary and no index")
    with pytest.raises(CacheError, match="not a readable"):
        Index.load(path, WIDTH, 10)
    for other in (faiss.IndexHNSWFlat(WIDTH, 8), faiss.IndexIDMap2(faiss.IndexFlatL2(WIDTH))):
        faiss.write_index(other, str(path))
        with pytest.raises(CacheError, match="of another kind"):
            Index.load(path, WIDTH, 10)
    build(clustered(50, 1))[0].save(path)
    with pytest.raises(CacheError, match="wanted at most 49 of 16"):
        Index.load(path, WIDTH, 49)
    with pytest.raises(CacheError, match="wanted at most 50 of 17"):
        Index.load(path, WIDTH + 1, 50)


def test_a_row_that_the_array_does_not_have_is_damage(tmp_path: Path) -> None:
    other = faiss.IndexIDMap2(faiss.IndexFlatIP(WIDTH))
    other.add_with_ids(np.ones((1, WIDTH), dtype=np.float32), np.array([77]))
    faiss.write_index(other, str(tmp_path / "index.faiss"))
    with pytest.raises(CacheError, match="names row 77 of 10"):
        Index.load(tmp_path / "index.faiss", WIDTH, 10).search(np.ones((1, WIDTH)), 1)


def test_auto_is_exact_while_small() -> None:
    assert [resolve_kind(n, "auto") for n in (0, FLAT_ROWS, FLAT_ROWS + 1)] == ["flat", "flat", "ivf"]
    assert resolve_kind(10**9, "flat") == "flat" and resolve_kind(10, "ivf") == "ivf"


def test_lists_grow_with_the_root_of_the_rows() -> None:
    # By hand: 4 * sqrt(200,000) = 1,789 and 4 * sqrt(28.4 M) = 21,317; 100 rows train two lists of 39.
    assert [num_lists(n) for n in (0, 1, 100, 200_000, 28_400_000)] == [1, 1, 2, 1024, 16_384]


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_that_is_foretold_is_the_size_on_disk(tmp_path: Path, kind: Any) -> None:
    build(clustered(5000, 1), kind=kind)[0].save(tmp_path / "index.faiss")
    assert index_bytes(5000, WIDTH, kind) == pytest.approx((tmp_path / "index.faiss").stat().st_size, rel=0.02)
    assert build_bytes(5000, WIDTH, kind) >= index_bytes(5000, WIDTH, kind)


class StandIn:
    """Searches as the CPU index does and counts; it cannot be saved."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.searches = 0

    def search(self, queries: NDArray[np.float32], k: int) -> Any:
        self.searches += 1
        return self.index.search(queries, k)


@pytest.mark.parametrize("kind", KINDS)
def test_where_there_are_gpus_searching_is_theirs_and_saving_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows = clustered(500, 1)
    built, _ = build(rows, kind=kind)
    on_cpu = built.search(rows, 3)
    built.save(tmp_path / "cpu")
    moved: list[StandIn] = []

    def to_all_gpus(index: Any, co: Any) -> StandIn:
        assert co.shard
        moved.append(StandIn(index))
        return moved[-1]

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", type("Options", (), {}), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_all_gpus, raising=False)
    index = Index.load(tmp_path / "cpu", WIDTH, 500)
    for _ in range(2):
        np.testing.assert_array_equal(index.search(rows, 3)[0], on_cpu[0])
    assert [gpu.searches for gpu in moved] == [2]  # moved once, searched twice
    index.save(tmp_path / "gpu")
    assert Index.load(tmp_path / "gpu", WIDTH, 500).num_rows == 500


def test_gpus_that_cannot_hold_the_index_leave_it_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_small(index: Any, co: Any) -> None:
        raise RuntimeError("Error in somewhere at StandardGpuResources.cpp:1: Error: 'err' failed: out of memory\nmore")

    built, _ = build(clustered(500, 1))
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", type("Options", (), {}), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", too_small, raising=False)
    assert built.search(clustered(3, 3), 2)[0].shape == (3, 2)
    built_again = Index(built._cpu_index, 500)
    built_again.search(clustered(3, 3), 2)
    assert "stays on the CPU: 'err' failed: out of memory more" in caplog.text
