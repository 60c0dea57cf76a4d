"""Verify finds every kind of damage, names its rows and what to do, and leaves a sound cache alone."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dimefm.cache import CacheError, FeatureCache
from dimefm.cache.audit.findings import runs_of
from dimefm.cache.audit.inventory import pieces
from dimefm.cache.audit.scan import BLOCK_BYTES, Piece, scan_file
from dimefm.cache.disk.layout import IMAGES, Layout
from dimefm.cache.disk.row_tables import RowTable, restate_rows
from dimefm.cache.version.manifest import file_entry, read_manifest
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one import pseudo_pairs
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.verify import report_lines, require_sound, verify

from ...support.damage import change_byte, replace_index, rewrite, rewrite_pairs, rewrite_rows


def findings(root, **options):
    return verify(root, **options)["findings"]


def only(root):
    (finding,) = findings(root)
    return finding


def test_a_sound_cache_has_no_findings_and_every_byte_of_it_is_read(root):
    found = verify(root)
    assert found["sound"] and found["findings"] == [] and found["version"] == 1
    files = [path for path in root.rglob("*") if path.is_file() and "log" not in path.relative_to(root).parts]
    assert found["files"] == len(files) - 2  # all but manifest.json and manifest.xxh3, which are read first
    assert found["bytes"] == sum(p.stat().st_size for p in files if not p.name.startswith("manifest."))


def test_verify_writes_nothing_and_needs_no_right_to(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    verify(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("teacher.zarr/images/embedding/c/2/0", [[8, 11]]),
        ("teacher.zarr/images/embedding/c/7/0", [[28, 29]]),
        ("teacher.zarr/sentences/embedding/c/0/0", [[0, 3]]),
        ("teacher.zarr/evaluate/dev/images/embedding/c/1/0", [[4, 7]]),
        ("teacher.zarr/evaluate/dev/head/c/0/0", []),
        ("teacher.zarr/images/embedding/zarr.json", []),
        ("pairs.zarr/image_to_sentence/ids/c/7/0", [[28, 29]]),
        ("pairs.zarr/sentence_to_image/scores/c/1/0", [[4, 7]]),
        ("index/images.faiss", []),
        ("index/images.json", []),
        ("rows/sentences.parquet", []),
        ("text_tower/open_clip_text.safetensors", []),
        ("plan.json", []),
        ("manifest.json", []),
        ("manifest.xxh3", []),
    ],
)
def test_a_changed_byte_is_found_in_every_kind_of_file_with_the_rows_it_costs(root, name, rows):
    change_byte(root / name, at=(root / name).stat().st_size // 2)
    finding = only(root)
    assert (finding["kind"], finding["where"], finding["rows"]) == ("changed", name, rows)
    assert "dimefm cache repair" in finding["repair"]


def test_a_changed_byte_in_the_padding_is_found(root):
    path = root / "teacher.zarr/images/embedding/c/7/0"  # rows 28 and 29, and room for two more
    change_byte(path, at=path.stat().st_size - 1)
    assert only(root)["where"] == "teacher.zarr/images/embedding/c/7/0"


def test_missing_cut_and_longer_files_are_told_apart(root):
    (root / "teacher.zarr/images/embedding/c/0/0").unlink()
    os.truncate(root / "teacher.zarr/images/embedding/c/1/0", 100)
    with (root / "teacher.zarr/images/embedding/c/2/0").open("ab") as file:
        file.write(b"\0")
    assert [(f["kind"], f["rows"]) for f in findings(root)] == [
        ("missing", [[0, 3]]),
        ("short", [[4, 7]]),
        ("long", [[8, 11]]),
    ]


def test_a_missing_manifest_is_read_from_its_spare_copy(root):
    (root / "manifest.json").unlink()
    change_byte(root / "plan.json")
    assert [(f["kind"], f["where"]) for f in findings(root)] == [("missing", "manifest.json"), ("changed", "plan.json")]


def test_a_manifest_that_was_edited_is_found_even_where_it_still_makes_sense(root):
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace('"rows": 30', '"rows": 29'))
    assert only(root)["where"] == "manifest.json"


def test_a_stranger_and_what_a_killed_writer_left_are_named_as_such(root):
    (root / "index/notes.txt").write_text("mine")
    (root / "rows/.images.parquet.0a1b2c3d4e5f.partial").write_bytes(b"PAR1")
    found = {finding["where"]: finding["kind"] for finding in findings(root)}
    assert found == {"index/notes.txt": "extra", "rows/.images.parquet.0a1b2c3d4e5f.partial": "leftover"}


def test_the_log_and_pairs_of_the_version_before_are_no_strangers(root, finished):
    (root / "log/mine.txt").write_text("a note")
    config = root.parent / "run.toml"
    config.write_text(config.read_text().replace("k = 3", "k = 2"))
    cache_teacher(load_config(config))
    assert (root / "pairs.zarr").exists() and (root / "pairs-2.zarr").exists()
    assert findings(root) == []


def test_pairs_that_an_interrupted_run_was_making_are_no_strangers_and_are_finished(root, monkeypatch):
    config = root.parent / "run.toml"
    config.write_text(config.read_text().replace("k = 3", "k = 2"))
    write, calls = pseudo_pairs.write_bytes, itertools.count(1)

    def stopping(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pseudo_pairs, "write_bytes", stopping)
        cache_teacher(load_config(config))
    found = verify(root)
    assert found["sound"], found["lines"]
    (note,) = found["notes"]
    made = [path for path in root.rglob("*") if path.is_file() and "-2." in path.relative_to(root).as_posix()]
    assert note.startswith(f"pairs-2.zarr/, index/: {len(made)} files of pairs that are not in force yet")
    (root / "pairs-3.zarr").mkdir()
    (root / "pairs-3.zarr/zarr.json").write_text("{}")
    assert only(root)["where"] == "pairs-3.zarr/zarr.json"  # no run of this version writes there
    shutil.rmtree(root / "pairs-3.zarr")
    cache_teacher(load_config(config))
    found = verify(root)
    assert found["sound"] and not found["notes"] and found["version"] == 2


def test_a_nan_row_that_the_table_calls_good_is_found(root):
    def spoil(block):
        block[1, 5] = np.nan

    rewrite_rows(root, 3, spoil)
    finding = only(root)
    assert (finding["kind"], finding["rows"]) == ("rows", [[13, 13]])
    assert "NaN" in finding["message"]


def test_a_zero_row_is_found(root):
    def spoil(block):
        block[2:4] = 0

    rewrite_rows(root, 0, spoil)
    assert [(f["kind"], f["rows"]) for f in findings(root) if f["kind"] == "rows"] == [("rows", [[2, 3]])]


def test_numbers_in_a_row_that_the_table_calls_failed_are_found(root):
    table = root / "rows/images.parquet"
    restate_rows(table, table, {9: "unreadable"}, 4)
    rewrite(root, "rows/images.parquet")
    kinds = {finding["kind"]: finding for finding in findings(root)}
    assert kinds["rows"]["rows"] == [[9, 9]] and "failed" in kinds["rows"]["message"]
    assert "the manifest counts 0" in kinds["table"]["message"]


def test_rows_that_are_not_numbered_by_their_place_are_found(root):
    path = root / "rows/sentences.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.take([0, 2, 1, *range(3, 22)]), path, row_group_size=4)
    rewrite(root, "rows/sentences.parquet")
    assert (only(root)["kind"], only(root)["rows"]) == ("table", [[1, 2]])


def test_a_table_that_is_shorter_than_its_array_is_found(root):
    path = root / "rows/sentences.parquet"
    pq.write_table(pq.read_table(path).slice(0, 20), path, row_group_size=4)
    rewrite(root, "rows/sentences.parquet")
    assert "holds 20 rows, the manifest counts 22" in only(root)["message"]


def test_a_pair_out_of_range_is_found(root):
    rewrite_pairs(root, "ids", lambda block: block.__setitem__((2, 0), 22))
    kinds = [(f["kind"], f["rows"]) for f in findings(root)]
    assert kinds == [("pairs", [[4, 7]]), ("pairs", [[6, 6]])]  # the chunk it is in, and the row that was sampled


def test_a_score_that_is_not_the_cosine_of_its_pair_is_found(root):
    rewrite_pairs(root, "scores", lambda block: block.__setitem__((0, 1), block[0, 1] - 0.01))
    finding = only(root)
    assert (finding["kind"], finding["where"], finding["rows"]) == ("pairs", "pairs.zarr/image_to_sentence", [[4, 4]])


def test_an_index_of_other_embeddings_is_found(root):
    images = FeatureCache.open(root).images
    embeddings = np.array(images.embeddings[:])
    embeddings[20] = -embeddings[20]
    replace_index(root, embeddings, images.usable)
    assert (only(root)["kind"], only(root)["rows"]) == ("index", [[20, 20]])


def test_an_index_over_other_rows_is_found(root):
    images = FeatureCache.open(root).images
    replace_index(root, np.array(images.embeddings[:]), images.usable[:-2])
    finding = only(root)
    assert (finding["kind"], finding["rows"]) == ("index", [[28, 29]])
    assert "over 28 rows, wanted the 30 usable ones" in finding["message"]


def test_a_journal_that_disagrees_is_found_before_the_next_version_believes_it(root):
    journal = root / "log/shards.jsonl"
    wanted = read_manifest(Layout(root)).files["teacher.zarr/images/embedding/c/1/0"].digest
    journal.write_text(journal.read_text().replace(wanted, wanted[::-1]))
    assert (only(root)["kind"], only(root)["where"]) == ("journal", "log/shards.jsonl")


def test_an_unfinished_cache_and_no_cache_are_said_to_be_so(root, tmp_path):
    (root / "manifest.json").unlink()
    (root / "manifest.xxh3").unlink()
    with pytest.raises(CacheError, match="unfinished"):
        verify(root)
    with pytest.raises(CacheError, match="no such folder"):
        verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match="no teacher cache"):
        verify(tmp_path / "empty")


def test_the_live_teacher_agrees_with_its_cache_and_another_image_under_a_name_does_not(root):
    assert verify(root, teacher=True)["teacher"][IMAGES]["cosine"]["least"] > 0.99999
    source = RowTable(root / "rows/images.parquet").take([4], "source")[0]
    other = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(other).save(root.parent / "images" / source)
    config = root.parent / "run.toml"  # the note in the cache is of the world that was copied
    found = verify(root, config, teacher=True)
    (finding,) = found["findings"]
    assert (finding["kind"], finding["array"], finding["rows"]) == ("teacher", IMAGES, [[4, 4]])


def test_where_no_sampled_image_can_be_read_there_is_nothing_to_compare(root):
    for path in (root.parent / "images").rglob("*.jpg"):
        path.unlink()
    compared = verify(root, teacher=True)["teacher"][IMAGES]
    assert compared == {"rows": 0, "cosine": None, "unreadable": list(range(30)), "differ": []}


def test_another_teacher_is_refused(root, tmp_path):
    from ...support.teachers import make_teacher

    _, weights = make_teacher(tmp_path / "other", seed=1)
    text = (root.parent / "run.toml").read_text()
    old = next(line for line in text.splitlines() if line.startswith("pretrained"))
    (root.parent / "run.toml").write_text(text.replace(old, f'pretrained = "{weights}"'))
    with pytest.raises(ValueError, match=r"teacher\.weights"):
        verify(root, root.parent / "run.toml", teacher=True)


def test_changed_gone_and_new_sources_are_reported_and_are_no_damage(root):
    images = root.parent / "images"
    sources = RowTable(root / "rows/images.parquet").column("source").to_pylist()
    (images / sources[3]).unlink()
    with (images / sources[5]).open("ab") as file:
        file.write(b"more")
    shutil.copy(images / sources[0], images / "new.jpg")
    captions = root.parent / "captions.txt"
    captions.write_text(captions.read_text().replace("number 2 ", "number two ") + "one more\n")
    found = verify(root, root.parent / "run.toml", sources=True)
    assert found["sound"]
    assert found["sources"]["images"]["counts"] == {"changed": 1, "touched": 0, "gone": 1, "new": 1}
    assert found["sources"]["images"]["rows"] == {"changed": [[5, 5]], "gone": [[3, 3]]}
    assert found["sources"]["sentences"]["counts"] == {"changed": 1, "gone": 0, "new": 1}
    assert found["sources"]["sentences"]["rows"]["changed"] == [[2, 2]]


def test_the_command_reports_damage_with_exit_code_1_and_one_json_document(root):
    def run(*words):
        command = [sys.executable, "-m", "dimefm", "cache", "verify", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    change_byte(root / "teacher.zarr/images/embedding/c/2/0")
    done = run("--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["findings"][0]["rows"] == [[8, 11]]
    assert done.stderr.splitlines()[-1].startswith(f"error: {root}: 1 problems, in teacher.zarr/images")


def test_a_person_reads_the_file_the_rows_and_what_to_do(root):
    change_byte(root / "teacher.zarr/images/embedding/c/2/0")
    found = verify(root)
    line = report_lines(found)[0]
    assert line.startswith("teacher.zarr/images/embedding/c/2/0: its bytes have changed")
    assert "[images/embedding: rows 8-11]" in line and line.endswith("run `dimefm cache repair` on this folder")
    with pytest.raises(CacheError, match="1 problems"):
        require_sound(found)


def test_rows_are_looked_at_across_the_blocks_that_a_file_is_read_in(tmp_path):
    """Chunks of real caches are larger than a block; rows on both sides of an edge count once, padding not at all."""
    rows = BLOCK_BYTES // 64 * 2 + 10
    block = np.ones((rows + 7, 32), dtype="<f2")
    bad = [0, BLOCK_BYTES // 64 - 1, BLOCK_BYTES // 64, rows - 1]
    block[bad, [0, 31, 0, 5]] = [np.nan, np.inf, -np.inf, np.nan]
    block[17] = -0.0
    block[30, :10] = 0  # zero to begin with, and no zero row
    block[rows:] = np.nan
    path = tmp_path / "chunk"
    path.write_bytes(block.tobytes())
    entry = file_entry(path)
    piece = Piece("c", entry.bytes, entry.digest, "embeddings", IMAGES, 1, 1000, rows, 64)
    found = scan_file(piece, path)
    assert found.sound
    assert found.not_finite.tolist() == [1000 + row for row in bad] and found.zero.tolist() == [1017]


def test_every_file_of_the_manifest_is_a_piece_and_chunks_know_their_rows(root):
    manifest = read_manifest(Layout(root))
    by_name = {piece.name: piece for piece in pieces(manifest, 4)}
    assert set(by_name) == set(manifest.files)
    last = by_name["teacher.zarr/images/embedding/c/7/0"]
    assert (last.array, last.chunk, last.first, last.num_rows, last.row_bytes) == (IMAGES, 7, 28, 2, 64)
    assert by_name["pairs.zarr/image_to_sentence/ids/c/7/0"].runs == ((28, 29),)


def test_stretches_of_rows():
    assert runs_of([]) == () and runs_of([4]) == ((4, 4),)
    assert runs_of(np.array([0, 1, 2, 7, 9, 10])) == ((0, 2), (7, 7), (9, 10))


def test_a_broken_note_of_the_config_is_one_line(root):
    (root / "log/config.json").write_text("{")
    with pytest.raises(ValueError, match="give --config"):
        verify(root, teacher=True)


def test_a_checksum_file_without_a_checksum_of_its_own_still_vouches(root):
    """As the first caches had it."""
    path = root / "manifest.xxh3"
    path.write_text(path.read_text().splitlines()[-2] + "\n")
    assert FeatureCache.open(root).manifest.version == 1
    assert [finding["where"] for finding in verify(root)["findings"]] == ["manifest.xxh3"]
