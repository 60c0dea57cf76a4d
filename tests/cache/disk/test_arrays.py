"""The store: what is written through chunks is read by anybody's zarr and by our own memory maps."""

import shutil

import numpy as np
import pytest
import zarr

from dimefm.cache.disk.arrays import ArraySpec, chunk_path, declare_arrays, write_chunk
from dimefm.cache.disk.mapped import MappedArray
from dimefm.cache.errors import CacheError

SPEC = ArraySpec((10, 3), "float16", 4)


@pytest.fixture
def store(tmp_path):
    """Ten rows in chunks of four: row i is [i, i + 0.25, i + 0.5]."""
    declare_arrays(tmp_path, {"images/embedding": SPEC})
    for chunk in range(3):
        write_chunk(tmp_path, "images/embedding", SPEC, chunk, rows_of()[chunk * 4 : chunk * 4 + 4])
    return tmp_path


def rows_of(num_rows=10):
    return (np.arange(num_rows)[:, None] + np.array([0, 0.25, 0.5])).astype(np.float16)


def test_zarr_itself_reads_what_was_written(store):
    assert np.array_equal(zarr.open_group(store, mode="r")["images/embedding"][:], rows_of())


def test_a_gather_returns_rows_in_the_order_asked_for_with_repeats(store):
    array = MappedArray.open(store, "images/embedding")
    assert np.array_equal(array[[9, 0, 5, 0, 4]], rows_of()[[9, 0, 5, 0, 4]])
    assert array[[9]].dtype == np.float16


def test_slices_and_no_rows_at_all_are_gathers_too(store):
    array = MappedArray.open(store, "images/embedding")
    assert np.array_equal(array[2:7], rows_of()[2:7])
    assert array[[]].shape == (0, 3)


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_does_not_exist_is_refused(store, row):
    with pytest.raises(IndexError):
        MappedArray.open(store, "images/embedding")[[row]]


def test_the_manifests_row_count_decides_what_exists(store):
    array = MappedArray.open(store, "images/embedding", 9)
    assert len(array) == 9
    assert [len(block) for _, block in array.blocks()] == [4, 4, 1]
    with pytest.raises(IndexError):
        array[[9]]


def test_a_chunk_file_is_the_raw_array_padded_with_nan(store):
    raw = np.fromfile(chunk_path(store, "images/embedding", 2), dtype="<f2").reshape(4, 3)
    assert np.array_equal(raw[:2], rows_of()[8:])
    assert np.isnan(raw[2:]).all()


def test_an_unwritten_row_reads_as_nan_in_zarr_and_as_a_lost_chunk_here(store):
    chunk_path(store, "images/embedding", 1).unlink()
    assert np.isnan(zarr.open_array(store / "images/embedding", mode="r")[4:8]).all()
    with pytest.raises(CacheError, match=r"c/1/0: missing"):
        MappedArray.open(store, "images/embedding")


def test_a_cut_chunk_is_named(store):
    path = chunk_path(store, "images/embedding", 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match="23 bytes, wanted 24"):
        MappedArray.open(store, "images/embedding")


@pytest.mark.parametrize("views", [(), (2,)])
def test_chunks_of_whole_pages_are_gathered_alike(tmp_path, monkeypatch, views):
    # 64 rows x 32 numbers x 2 bytes = 4096 bytes, one page; the last chunk is partly filled
    spec = ArraySpec((150, *views, 32), "float16", 64)
    values = np.random.default_rng(0).normal(size=spec.shape).astype(np.float16)
    declare_arrays(tmp_path, {"rows": spec})
    for chunk in range(3):
        write_chunk(tmp_path, "rows", spec, chunk, values[chunk * 64 : chunk * 64 + 64])
    rows = np.random.default_rng(1).integers(0, 150, 400)
    joined = MappedArray.open(tmp_path, "rows")
    monkeypatch.setattr("dimefm.cache.disk.mapped.map_side_by_side", lambda paths, chunk_bytes: None)
    apart = MappedArray.open(tmp_path, "rows")
    assert joined._sparse._joined is not None and apart._sparse._joined is None
    for array in (joined, apart):
        assert np.array_equal(array[rows], values[rows])
        assert np.array_equal(np.concatenate([block for _, block in array.blocks()]), values)
        with pytest.raises(IndexError):
            array[[150]]
    shutil.rmtree(tmp_path / "rows" / "c")  # a map outlives its file
    assert np.array_equal(joined[rows], values[rows])


def test_an_all_nan_chunk_still_has_a_file(store):
    write_chunk(store, "images/embedding", SPEC, 0, np.full((4, 3), np.nan, np.float16))
    assert np.isnan(MappedArray.open(store, "images/embedding")[[0, 3]]).all()


def test_ids_are_filled_with_minus_one_and_views_have_an_axis_of_their_own(tmp_path):
    specs = {"ids": ArraySpec((3, 2), "int64", 2), "views": ArraySpec((3, 5, 2), "float32", 2)}
    declare_arrays(tmp_path, specs)
    write_chunk(tmp_path, "ids", specs["ids"], 1, np.array([[7, 8]]))
    assert np.fromfile(chunk_path(tmp_path, "ids", 1), dtype="<i8").tolist() == [7, 8, -1, -1]
    views = np.arange(30, dtype=np.float32).reshape(3, 5, 2)
    for chunk in range(2):
        write_chunk(tmp_path, "views", specs["views"], chunk, views[chunk * 2 : chunk * 2 + 2])
    assert np.array_equal(MappedArray.open(tmp_path, "views")[[2, 0]], views[[2, 0]])
    assert np.array_equal(zarr.open_array(tmp_path / "views", mode="r")[:], views)


def test_declaring_again_touches_nothing(store):
    files = {path: path.stat().st_mtime_ns for path in store.rglob("zarr.json")}
    declare_arrays(store, {"images/embedding": SPEC})
    assert files == {path: path.stat().st_mtime_ns for path in store.rglob("zarr.json")}


def test_a_compressed_array_is_refused(tmp_path):
    zarr.create_array(tmp_path / "foreign", shape=(4, 2), chunks=(2, 2), dtype="float16")
    with pytest.raises(CacheError, match="compressed"):
        MappedArray.open(tmp_path, "foreign")


def test_a_block_of_another_width_is_refused(store):
    with pytest.raises(ValueError, match="does not fit"):
        write_chunk(store, "images/embedding", SPEC, 0, np.zeros((4, 2), np.float16))
