"""Mending embeddings: bad shards computed again by the teacher; rows that cannot be are marked as lost.

What comes out with the bytes of the manifest goes straight to its place. What does not waits in `mend/`, journal and
all, until the whole repair is decided (pipeline/upkeep/repair/repair.py); a repair that was killed goes on from there.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ....cache.audit.findings import Runs
from ....cache.audit.inventory import Piece
from ....cache.disk.arrays import read_chunk, write_chunk
from ....cache.disk.durable import digest, make_folder, to_json_line, write_bytes
from ....cache.disk.layout import IMAGES, SENTENCES, Layout, table_of
from ....cache.disk.row_tables import LOST, OK, RowTable, good_rows, restate_rows
from ....cache.version.journal import Journal, ShardRecord, read_records
from ....cache.version.versions import move_file
from ....stages.images.crops import Crops
from ....stages.images.decode import ImageError
from ....stages.inputs.image_source import keys_of
from ...stage_one.inputs import classes_document, evaluate_prompts
from ..live_teacher import SAME_ROW, compare_live, image_source
from .context import Hands, Shards

if TYPE_CHECKING:
    from ....stages.embed.shard import ShardTask


def mend_shards(hands: Hands, bad: Mapping[Piece, Runs | None], lost_before: Mapping[str, Mapping[int, str]]) -> Shards:
    """Compute bad shards again.

    Args:
        bad: chunk files, each with the rows that are bad; None where nothing in it can be relied on.
        lost_before: for each array, rows that an earlier repair gave up.
    """
    found = Shards(states={array: dict.fromkeys(rows) for array, rows in lost_before.items()})
    waiting = _waiting(hands.mend)
    probes: dict[str, dict[str, Any]] = {}
    tasks, pieces = [], {}
    for piece, rows in bad.items():
        record = waiting.get((piece.array, piece.chunk))
        if record and hands.teacher:
            probe = None if piece.content == "head" else _probe(hands, piece.array, probes, list(bad))
            _take(hands, found, piece, record, _origin(hands, probe))
            continue
        task = _task(hands, piece, found.states)
        if task is None:
            _give_up(hands, found, piece, rows)
        else:
            tasks.append(task)
            pieces[piece.array, piece.chunk] = piece
    if tasks:
        from ...stage_one.cluster import run_shards

        assert hands.config is not None
        for done in run_shards(tasks, hands.config.teacher, str(hands.plan["teacher"]["weights"]), None):
            piece = pieces[done.record.array, done.record.shard]
            if done.record.digest == piece.digest:
                move_file(hands.mend.root / piece.name, hands.layout.root / piece.name)
                found.same.append(piece.name)
                if done.record.failures:  # a row that the teacher cannot embed, and that nobody had marked
                    states = found.states.setdefault(piece.array, {})
                    states |= {piece.first + row: reason for row, reason in done.record.failures}
            else:
                _settle(hands, found, piece, done.record, probes, list(bad))
    _keep_old_reasons(found, bad, lost_before)
    return found


def _keep_old_reasons(found: Shards, bad: Iterable[Piece], lost_before: Mapping[str, Mapping[int, str]]) -> None:
    """A row that was lost and is lost still keeps its reason: nothing has changed, so nothing is to be written."""
    left = [piece for piece in bad if piece.name in found.left]
    for array, rows in lost_before.items():
        states = found.states[array]
        for row, reason in rows.items():
            in_left = any(piece.array == array and 0 <= row - piece.first < piece.num_rows for piece in left)
            if in_left or states.get(row) is not None:
                states[row] = reason


def keep_waiting(mend: Layout) -> None:
    """Of what a killed repair left in `mend/`, keep the embeddings that it computed and nothing else."""
    if not mend.root.exists():
        return
    lines = b"".join(to_json_line(asdict(record)) for record in _waiting(mend).values())
    for path in mend.root.iterdir():
        if path.is_dir() and path != mend.teacher_zarr:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    write_bytes(mend.journal, lines)


def _waiting(mend: Layout) -> dict[tuple[str, int], ShardRecord]:
    """Shards that an earlier repair computed and did not put into force."""
    records = {}
    for record in read_records(mend):
        below = mend.teacher_zarr.joinpath(record.array, "c", str(record.shard)).rglob("0")
        path = next(filter(Path.is_file, below), None)
        given_up = any(reason.startswith(LOST) for _, reason in record.failures)
        if path is not None and not given_up and digest(path.read_bytes()) == record.digest:
            records[record.array, record.shard] = record
    return records


def _task(hands: Hands, piece: Piece, states: Mapping[str, Mapping[int, str | None]]) -> "ShardTask | None":
    """How to compute a shard again; None where something is missing for it."""
    from ....stages.embed.shard import ShardTask

    config, store = hands.config, hands.mend.teacher_zarr
    if config is None or hands.teacher is None:
        return None
    spec = hands.specs[piece.array]
    if piece.content == "head":
        name = piece.array.split("/")[1]
        settings = config.evaluate.get(name)
        if settings is None or not settings.classes.is_file():
            return None
        if classes_document(settings)["prompts"] != hands.plan["inputs"]["evaluate"][name]["prompts"]:
            return None
        prompts = tuple(tuple(of_class) for of_class in evaluate_prompts(settings))
        return ShardTask("head", store, piece.array, spec, piece.chunk, prompts=prompts)
    source = image_source(config, piece.array)
    if piece.array != SENTENCES and source is None:
        return None
    table = table_of(hands.mend, piece.array)
    again = dict(states.get(piece.array, {}))  # rows that were given up are tried again
    if hands.layout.shares_rows:  # what the tables' owner has lost is none of this cache's losses
        reasons = RowTable(table).column("reason").to_pylist()
        again = dict.fromkeys(row for row, reason in enumerate(reasons) if reason and reason.startswith(LOST))
    if again and not table.is_relative_to(hands.mend.root):
        target = hands.mend.root / hands.layout.name_of(table)
        restate_rows(table, target, again, int(hands.plan["shard_rows"]))
        table = target
    kind: Literal["images", "sentences"] = "sentences" if piece.array == SENTENCES else "images"
    crops = Crops.read(hands.plan.get("views")) if piece.array == IMAGES else None
    return ShardTask(kind, store, piece.array, spec, piece.chunk, table=table, source=source, crops=crops)


def _settle(
    hands: Hands,
    found: Shards,
    piece: Piece,
    record: ShardRecord,
    probes: dict[str, dict[str, Any]],
    bad: list[Piece],
) -> None:
    """Other bytes than the manifest's: another machine, or sources that are gone or have changed."""
    if piece.content == "head":
        _take(hands, found, piece, record, _origin(hands, None))
        return
    probe = _probe(hands, piece.array, probes, bad)
    if 2 * len(probe["differ"]) > probe["rows"]:
        found.left[piece.name] = (
            f"computed again, sound rows of {piece.array} have a cosine of {probe['cosine']['mean']:.4f} with what is "
            f"there, wanted {SAME_ROW}: these are not the sources or not the teacher that made it"
        )
        return
    lost = {row: f"{LOST}{reason}" for row, reason in record.failures} | _changed_sources(hands, piece)
    if lost:
        _keep_in_log(hands.layout, piece.name)
    spec = hands.specs[piece.array]
    block = np.array(read_chunk(hands.mend.teacher_zarr, piece.array, spec, piece.chunk)[: piece.num_rows])
    block[sorted(lost)] = np.nan
    written = write_chunk(hands.mend.teacher_zarr, piece.array, spec, piece.chunk, block)
    again = ShardRecord(piece.array, piece.chunk, piece.num_rows, written, tuple(sorted(lost.items())))
    _take(hands, found, piece, again, _origin(hands, probe))


def _probe(hands: Hands, array: str, probes: dict[str, dict[str, Any]], bad: Iterable[Piece]) -> dict[str, Any]:
    """How near the teacher comes to the sound rows of an array; computed once."""
    assert hands.config is not None and hands.teacher is not None
    if array not in probes:
        chunks = np.array([piece.chunk for piece in bad if piece.array == array])
        num_rows, chunk_rows = hands.specs[array].shape[0], int(hands.plan["shard_rows"])
        probes[array] = compare_live(
            hands.config, hands.mend, hands.plan, hands.teacher, array, num_rows, chunks, chunk_rows
        )
    return probes[array]


def _changed_sources(hands: Hands, piece: Piece) -> dict[int, str]:
    """Rows of a shard whose image is another one by now, by size or checksum."""
    if piece.array == SENTENCES:
        return {}
    assert hands.config is not None
    source = image_source(hands.config, piece.array)
    assert source is not None
    table = RowTable(table_of(hands.mend, piece.array))
    columns = [name for name in (*source.columns, "bytes", "status", "digest") if table.has(name)]
    rows = table.shard(piece.chunk, columns)
    changed = {}
    keys = keys_of(source, rows)
    for row, (key, num_bytes, status) in enumerate(zip(keys, rows["bytes"], rows["status"], strict=True)):
        if status != OK or row >= piece.num_rows:
            continue
        try:
            data = source.read(key)
        except ImageError:  # it has its own reason
            continue
        wanted = rows["digest"][row] if "digest" in rows else None
        if len(data) != num_bytes or (wanted is not None and digest(data) != wanted):
            changed[row] = f"{LOST}its image has changed since"
    return changed


def _origin(hands: Hands, probe: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where a shard came from that stage one did not make on its machine."""
    assert hands.teacher is not None
    origin: dict[str, Any] = {"by": "repair", "libraries": hands.teacher.identity()["libraries"]}
    if probe:
        origin |= {"cosine": probe["cosine"], "compared": probe["rows"]}
    return origin


def _give_up(hands: Hands, found: Shards, piece: Piece, rows: Runs | None) -> None:
    """Mark the rows of a shard as lost: NaN, whatever of it is still there; the damaged file is kept in the log."""
    if piece.content == "head":
        found.left[piece.name] = f"class vectors need the teacher and the class names: {hands.without}"
        return
    already = {row for row, reason in found.states.get(piece.array, {}).items() if reason is None}
    spec = hands.specs[piece.array]
    block = np.full((piece.num_rows, *spec.shape[1:]), np.nan, dtype=spec.disk_dtype)
    gone = set(range(piece.first, piece.first + piece.num_rows))
    if rows is not None:  # its bytes are right, and only these rows make no sense
        gone = {row for first, last in rows for row in range(first, last + 1)}
        block[:] = read_chunk(hands.layout.teacher_zarr, piece.array, spec, piece.chunk)[: piece.num_rows]
        block[[row - piece.first for row in gone]] = np.nan
    good = good_rows(
        RowTable(table_of(hands.layout, piece.array)).columns("status", "reason"), hands.layout.shares_rows
    )
    gone = {row for row in gone if good[row]} | (already & gone)
    if rows is None:
        _keep_in_log(hands.layout, piece.name)
    written = write_chunk(hands.mend.teacher_zarr, piece.array, spec, piece.chunk, block)
    reason = f"{LOST}damaged, and {hands.without or 'its source is not at hand'}"
    failures = tuple((row - piece.first, reason) for row in sorted(gone))
    record = ShardRecord(piece.array, piece.chunk, piece.num_rows, written, failures)
    _take(hands, found, piece, record, {"by": "repair"})


def _take(hands: Hands, found: Shards, piece: Piece, record: ShardRecord, origin: dict[str, Any]) -> None:
    """Count a shard that waits in `mend/`."""
    if record.digest == piece.digest:  # rows that were lost are lost still
        (hands.mend.root / piece.name).unlink(missing_ok=True)
    else:
        Journal(hands.mend).add(record, {})
        found.changed.append((piece, record, origin))
    states = found.states.setdefault(piece.array, {})
    states |= {piece.first + row: reason for row, reason in record.failures}


def _keep_in_log(layout: Layout, name: str) -> None:
    """Keep a damaged file that nothing can replace: some of its rows may be right, and somebody may know which."""
    source, target = layout.root / name, layout.root / "log" / "removed" / name
    if source.is_file() and not target.exists():
        make_folder(target.parent)
        os.link(source, target)
