"""Packs of kept pixels on disk: their bytes by hand, growth, readers of every kind, and damage."""

import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

import dimefm.cache.reader.pixel_packs
from dimefm.cache import CacheError
from dimefm.cache.reader.pixel_packs import PixelPacks, pack_path, read_offsets, writing_pack
from dimefm.stages.inputs.image_source import row_keys
from dimefm.stages.inputs.kept_pixels import KeptPixels

SHARD_ROWS = 4
JPEGS = [b"\xff\xd8\xffone", b"", b"\xff\xd8\xffthree!"]


def write(path, jpegs, shard_rows=SHARD_ROWS):
    with writing_pack(path, shard_rows) as writer:
        for jpeg in jpegs:
            writer.add(jpeg)
    return writer.digest


def packs(folder, num_rows, shard_rows=SHARD_ROWS):
    return PixelPacks(folder, "jpeg-256", num_rows, shard_rows)


def test_a_pack_is_its_jpegs_and_then_a_table_of_offsets(tmp_path):
    written = write(tmp_path / "000000.pack", JPEGS)
    data = (tmp_path / "000000.pack").read_bytes()
    assert data == b"".join(JPEGS) + struct.pack("<5Q", 0, 6, 6, 15, 15)
    assert written == xxhash.xxh3_128(data).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["000000.pack"]


def test_a_pack_whose_writing_fails_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), writing_pack(tmp_path / "000000.pack", SHARD_ROWS) as writer:
        writer.add(JPEGS[0])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_pack_that_grows_is_what_it_would_have_been_in_one_go_and_begins_as_it_did(tmp_path):
    before, after, fresh = (tmp_path / name for name in ("before", "after", "fresh"))
    old = write(before, JPEGS)
    with writing_pack(after, SHARD_ROWS) as writer:
        writer.take_over(before, len(JPEGS), old)
        writer.add(b"\xff\xd8\xfffour")
    assert writer.digest == write(fresh, [*JPEGS, b"\xff\xd8\xfffour"])
    assert after.read_bytes() == fresh.read_bytes()
    assert after.read_bytes().startswith(b"".join(JPEGS))


def test_no_pack_grows_out_of_a_damaged_one(tmp_path):
    old = write(tmp_path / "before", JPEGS)
    data = bytearray((tmp_path / "before").read_bytes())
    data[3] ^= 1
    (tmp_path / "before").write_bytes(data)
    with pytest.raises(CacheError, match="before: damaged"), writing_pack(tmp_path / "after", SHARD_ROWS) as writer:
        writer.take_over(tmp_path / "before", len(JPEGS), old)
    assert not (tmp_path / "after").exists()


def test_a_reader_finds_its_rows_before_and_after_its_pack_was_replaced_by_a_longer_one(tmp_path):
    old = write(tmp_path / "000000.pack", JPEGS)
    early, late = packs(tmp_path, 3), packs(tmp_path, 3)
    assert early.read(0) == JPEGS[0]
    with writing_pack(tmp_path / "000000.pack", SHARD_ROWS) as writer:
        writer.take_over(tmp_path / "000000.pack", 3, old)
        writer.add(JPEGS[0])
    for reader in (early, late):
        assert [reader.read(row) for row in (2, 0)] == [JPEGS[2], JPEGS[0]]
        with pytest.raises(IndexError):
            reader.read(3)
    assert packs(tmp_path, 4).read(3) == JPEGS[0]


def test_rows_without_pixels_and_rows_that_are_not_there_are_refused(tmp_path):
    write(tmp_path / "000000.pack", JPEGS)
    reader = packs(tmp_path, 3)
    with pytest.raises(CacheError, match=r"000000\.pack: row 1 has no kept pixels"):
        reader.read(1)
    for row in (-1, 3):
        with pytest.raises(IndexError, match="of 3 rows"):
            reader.read(row)


def test_a_pack_that_is_missing_or_cut_is_one_line_and_no_crash(tmp_path):
    reader = packs(tmp_path, 12)
    with pytest.raises(CacheError, match=r"000002\.pack: missing"):
        reader.read(8)
    path = tmp_path / "000000.pack"
    write(path, JPEGS)
    whole = path.read_bytes()
    for length in (0, 10, 39, 40, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheError, match=r"000000\.pack"):
            packs(tmp_path, 3).read(2)
        with pytest.raises(CacheError, match="table of offsets"):
            read_offsets(path, SHARD_ROWS)


@pytest.mark.parametrize("table", [(0, 6, 6, 15, 16), (0, 6, 6, 15, 14), (1, 6, 6, 15, 15), (0, 6, 5, 15, 15)])
def test_a_table_that_cannot_be_its_jpegs_is_refused(tmp_path, table):
    (tmp_path / "x").write_bytes(b"".join(JPEGS) + struct.pack("<5Q", *table))
    with pytest.raises(CacheError, match="table of offsets does not fit"):
        read_offsets(tmp_path / "x", SHARD_ROWS)


def test_a_reader_travels_as_a_path_and_three_numbers_however_many_rows_there_are(tmp_path):
    for shard in range(3):
        write(pack_path(tmp_path, shard), [b"\xff\xd8\xff%d" % row for row in range(4 * shard, 4 * shard + 4)])
    small, large = packs(tmp_path, 12), packs(tmp_path, 10**9)
    small.read(5)
    assert abs(len(pickle.dumps(small)) - len(pickle.dumps(large))) < 8
    assert pickle.loads(pickle.dumps(small)).read(9) == b"\xff\xd8\xff9"


def num_open():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_packs_that_are_open_at_once_do_not_grow_with_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(dimefm.cache.reader.pixel_packs, "MAX_OPEN", 5)
    for shard in range(40):
        write(pack_path(tmp_path, shard), [b"\xff\xd8\xff%d" % shard], shard_rows=1)
    reader = packs(tmp_path, 40, shard_rows=1)
    before = num_open()
    rows = np.random.default_rng(0).integers(0, 40, 400).tolist()
    assert [reader.read(row) for row in rows] == [b"\xff\xd8\xff%d" % row for row in rows]
    assert num_open() <= before + 5


def test_a_worker_that_reads_them_opens_no_cache():
    program = (
        "import sys, dimefm.stages.inputs.kept_pixels\n"
        "heavy = {'torch', 'zarr', 'pyarrow', 'faiss', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kept_pixels_are_a_source_of_images_by_row(tmp_path):
    write(tmp_path / "000000.pack", JPEGS)
    source = pickle.loads(pickle.dumps(KeptPixels(packs(tmp_path, 3))))
    keys = row_keys(source, None)(np.array([2, 0, 2]))
    assert keys == [2, 0, 2] and all(type(ticket) is int for ticket in keys)
    assert [source.read(ticket) for ticket in keys] == [JPEGS[2], JPEGS[0], JPEGS[2]]
    assert source.locate(2) == f"{tmp_path}/000000.pack: row 2" and source.name == "jpeg-256"
