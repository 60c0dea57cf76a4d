"""What a repair decides to do, from what is damaged and what is at hand: no file is read."""

from pathlib import Path

import pytest

from dimefm.cache.audit.findings import Finding, Report
from dimefm.cache.audit.inventory import Piece
from dimefm.cache.disk.layout import IMAGES, SENTENCES, Layout
from dimefm.cache.version.journal import ShardRecord
from dimefm.cache.version.schema import Manifest
from dimefm.pipeline.upkeep.repair.actions import Actions, AtHand, plan_actions
from dimefm.pipeline.upkeep.repair.context import Damage

HEAD = Piece("teacher.zarr/evaluate/dev/head/c/0/0", 8, "d", "head", "evaluate/dev/head", 0)
FIRST, SECOND = (
    Piece(f"teacher.zarr/{IMAGES}/c/{chunk}/0", 8, "d", "embeddings", IMAGES, chunk, 4 * chunk, 4) for chunk in (0, 1)
)
LINES = Piece(f"teacher.zarr/{SENTENCES}/c/0/0", 8, "d", "embeddings", SENTENCES, 0, 0, 4)
PACK = Piece("pixels/jpeg-24/0.pack", 8, "d", "pixels", "pixels/jpeg-24", 0, 0, 4)
PIECES = [HEAD, FIRST, SECOND, LINES, PACK]
ALL = AtHand(teacher=True, arrays={IMAGES, SENTENCES, HEAD.array}, pictures=True)


def planned(*findings, lost=None, at_hand=ALL):
    listed = [*(piece.name for piece in PIECES), "rows/images.parquet", "teacher.zarr/zarr.json", "text_tower/t.json"]
    manifest = Manifest(arrays={}, files={name: {"bytes": 8, "digest": "d"} for name in listed})
    damage = Damage.of(Report(findings=list(findings)), manifest)
    return plan_actions(Layout(Path("nowhere")), damage, PIECES, lost or {}, at_hand)


def changed(where):
    return Finding("changed", where, "its bytes have changed")


def wrong(piece, *rows):
    return Finding("rows", piece.name, "rows are zero", array=piece.array, rows=rows)


def test_nothing_is_done_about_a_sound_cache():
    assert planned() == Actions()


def test_with_everything_at_hand_all_is_made_again():
    files = [*(piece.name for piece in PIECES), "teacher.zarr/zarr.json", "text_tower/t.json"]
    assert planned(*map(changed, files)) == Actions(
        metadata=["teacher.zarr/zarr.json"],
        text_tower=["text_tower/t.json"],
        embed=[HEAD, FIRST, SECOND, LINES],
        packs=[PACK],
    )


def test_without_the_teacher_rows_are_given_up_and_class_vectors_left():
    actions = planned(changed(HEAD.name), changed(FIRST.name), changed(PACK.name), at_hand=AtHand(without="no config"))
    assert actions.give_up == {FIRST: None} and not actions.embed and not actions.packs
    assert set(actions.left) == {HEAD.name, PACK.name} and all("no config" in why for why in actions.left.values())


def test_of_a_file_whose_bytes_are_right_only_its_wrong_rows_are_given_up():
    assert planned(wrong(FIRST, (1, 1)), wrong(FIRST, (3, 3)), at_hand=AtHand()).give_up == {FIRST: ((1, 1), (3, 3))}
    assert planned(wrong(FIRST, (1, 1)), changed(FIRST.name), at_hand=AtHand()).give_up == {FIRST: None}


@pytest.mark.parametrize("at_hand", [ALL, AtHand()])
def test_a_shard_without_its_row_table_is_left_and_so_are_packs(at_hand):
    lost = {IMAGES: {5: "lost: damaged"}}
    actions = planned(
        changed("rows/images.parquet"), *map(changed, (FIRST.name, PACK.name)), lost=lost, at_hand=at_hand
    )
    assert actions == Actions()


def test_lost_rows_are_tried_again_with_their_shard_once_their_source_is_there():
    lost = {IMAGES: {5: "lost: damaged"}, SENTENCES: {}}
    assert planned(lost=lost) == Actions(retry={IMAGES: lost[IMAGES]}, embed=[SECOND])
    assert planned(lost=lost, at_hand=AtHand(teacher=True, arrays={SENTENCES})) == Actions()


def test_a_shard_that_a_killed_repair_has_embedded_is_taken_even_where_its_source_is_gone_since():
    record = ShardRecord(IMAGES, 0, 4, "d")
    waiting = {(IMAGES, 0): record}
    assert planned(changed(FIRST.name), at_hand=AtHand(teacher=True, waiting=waiting)).reuse == {FIRST: record}
    assert planned(changed(FIRST.name), at_hand=AtHand(waiting=waiting)).give_up == {FIRST: None}  # not comparable
