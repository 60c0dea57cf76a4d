"""Repairing embeddings: damaged shards embedded again by the teacher; rows that cannot be are marked as lost.

A shard that comes out with the manifest's bytes goes straight to its place. Any other waits in `mend/`, with its line
in the journal there, until the repair puts a new version into force; a repair that was killed goes on from there.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ....cache.audit.findings import Runs
from ....cache.audit.inventory import Piece
from ....cache.disk.arrays import read_chunk, write_chunk
from ....cache.disk.durable import digest, make_folder, to_json_line, write_bytes
from ....cache.disk.layout import SENTENCES, Layout, table_of
from ....cache.disk.row_tables import LOST, OK, RowTable, good_rows, restate_rows
from ....cache.errors import InputError
from ....cache.version.journal import Journal, ShardRecord, read_records
from ....cache.version.schema import Origin, Plan
from ....cache.version.versions import move_file
from ....stages.images.decode import ImageError
from ....stages.inputs.image_source import keys_of
from ....stages.inputs.prompts import class_prompts
from ...stage_one.absent_files import require_few_absent
from ...stage_one.inputs import classes_document
from ...stage_one.sources import Sources
from ..live_teacher import SAME_ROW, LiveTeacher, crops_of, image_source
from .actions import Actions
from .context import SAME_BYTES, Damage, NewBytes, Outcome, RepairContext

if TYPE_CHECKING:
    from ....stages.embed.shard import ShardTask


Compare = Callable[[str], dict[str, Any]]
"""From an array to the comparison of its sound rows with the live teacher."""


def repair_shards(context: RepairContext, actions: Actions, damage: Damage, outcome: Outcome) -> NewBytes:
    """Bring damaged shards back: reuse what a killed repair has embedded, give up rows, embed the rest again."""
    new = NewBytes(states={array: dict.fromkeys(rows) for array, rows in actions.retry.items()})

    @cache
    def compare(array: str) -> dict[str, Any]:
        """How near the teacher comes to the sound rows of an array."""
        assert context.live is not None
        damaged = (piece.chunk for piece in actions.shards if piece.array == array)
        return context.live.compare(array, context.specs[array].shape[0], damaged)

    for piece, record in actions.reuse.items():
        _keep(context, new, piece, record, _origin(context, piece, compare))
    for piece, rows in actions.give_up.items():
        _give_up(context, new, piece, rows)
    if actions.embed:
        from ...stage_one.cluster.dispatch import run_shards

        assert context.live is not None
        of_piece = {piece: _task(context, context.live, piece, new.states) for piece in actions.embed}
        pieces = {(piece.array, piece.chunk): piece for piece in actions.embed}
        weights = context.plan.teacher.weights
        for done in run_shards([*of_piece.values()], context.live.settings, weights, None):
            record = done.settled()
            piece = pieces[record.array, record.shard]
            try:
                require_few_absent(of_piece[piece], done, 1.0)
            except InputError as error:  # a disk that is not mounted: rows that are sound must not be given up for it
                outcome.leave({piece.name}, f"{error} (if they are gone for good, remove the empty folder)")
                done.discard()
                continue
            done.commit()
            if record.digest == piece.digest:
                move_file(context.staged.root / piece.name, context.layout.root / piece.name)
                if piece.name in damage.files:  # else it was embedded for its lost rows, and they are lost still
                    outcome.mended[piece.name] = SAME_BYTES
                if record.failures:  # a row that the teacher cannot embed and that was not marked
                    new.mark(piece, record)
            else:
                _settle_changed(context, new, outcome, piece, record, compare)
    _keep_old_reasons(new, actions, outcome)
    return new


def keep_waiting(staged: Layout) -> dict[tuple[str, int], ShardRecord]:
    """Of what a killed repair left in `mend/`, keep the shards that it embedded and nothing else.

    Returns:
        Their records, by array and number.
    """
    if not staged.root.exists():
        return {}
    waiting = {}
    for record in read_records(staged):
        below = staged.teacher_zarr.joinpath(record.array, "c", str(record.shard)).rglob("0")
        path = next(filter(Path.is_file, below), None)
        given_up = any(reason.startswith(LOST) for _, reason in record.failures)
        if path is not None and not given_up and digest(path.read_bytes()) == record.digest:
            waiting[record.array, record.shard] = record
    for path in staged.root.iterdir():
        if path.is_dir() and path != staged.teacher_zarr:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    write_bytes(staged.journal, b"".join(to_json_line(asdict(record)) for record in waiting.values()))
    return waiting


def is_source_at_hand(sources: Sources, plan: Plan, array: str) -> bool:
    """Whether the sources of an array are there: images, or the classes and templates of a head."""
    if not array.endswith("/head"):
        return array == SENTENCES or image_source(sources, array) is not None
    name = array.split("/")[1]
    if name not in sources.evaluate or not sources.evaluate[name].settings.classes.is_file():
        return False
    return bool(classes_document(sources.evaluate[name].settings)["prompts"] == plan.inputs.evaluate[name].prompts)


def _origin(context: RepairContext, piece: Piece, compare: Compare) -> Origin:
    """The manifest's note on a shard that was embedded again: by which libraries, and how near sound rows come."""
    assert context.live is not None
    libraries = context.live.teacher.identity()["libraries"]
    if piece.content == "head":
        return Origin(by="repair", libraries=libraries)
    compared = compare(piece.array)
    return Origin(by="repair", libraries=libraries, cosine=compared["cosine"], compared=compared["rows"])


def _task(
    context: RepairContext, live: LiveTeacher, piece: Piece, states: Mapping[str, Mapping[int, str | None]]
) -> "ShardTask":
    """How to embed a shard again."""
    from ....stages.embed.shard import ShardTask

    store, spec = context.staged.teacher_zarr, context.specs[piece.array]
    if piece.content == "head":
        settings = live.sources.evaluate[piece.array.split("/")[1]].settings
        prompts = tuple(map(tuple, class_prompts(settings)))
        return ShardTask("head", store, piece.array, spec, piece.chunk, prompts=prompts)
    table = table_of(context.staged, piece.array)
    again = dict(states.get(piece.array, {}))  # rows that were given up are tried again
    if context.layout.shares_rows:  # rows that the owner of the tables lost are good in this cache
        reasons = RowTable(table).column("reason").to_pylist()
        again = dict.fromkeys(row for row, reason in enumerate(reasons) if reason and reason.startswith(LOST))
    if again and not table.is_relative_to(context.staged.root):
        target = context.staged.root / context.layout.name_of(table)
        restate_rows(table, target, again, context.plan.shard_rows)
        table = target
    kind: Literal["images", "sentences"] = "sentences" if piece.array == SENTENCES else "images"
    crops = crops_of(context.plan, piece.array)
    source = image_source(live.sources, piece.array)
    return ShardTask(kind, store, piece.array, spec, piece.chunk, table=table, source=source, crops=crops)


def _settle_changed(
    context: RepairContext, new: NewBytes, outcome: Outcome, piece: Piece, record: ShardRecord, compare: Compare
) -> None:
    """Keep or leave a shard with other bytes: made on another machine, or from sources that have changed."""
    if piece.content == "head":
        _keep(context, new, piece, record, _origin(context, piece, compare))
        return
    compared = compare(piece.array)
    if 2 * len(compared["differ"]) > compared["rows"]:
        why = (
            f"computed again, sound rows of {piece.array} have a cosine of {compared['cosine']['mean']:.4f} with what "
            f"is there, wanted {SAME_ROW}: these are not the sources or not the teacher that made it"
        )
        outcome.leave({piece.name}, why)
        return
    lost = {row: f"{LOST}{reason}" for row, reason in record.failures} | _changed_sources(context, piece)
    if lost:
        _keep_in_log(context.layout, piece.name)
    store, spec = context.staged.teacher_zarr, context.specs[piece.array]
    block = np.array(read_chunk(store, piece.array, spec, piece.chunk)[: piece.num_rows])
    block[sorted(lost)] = np.nan
    written = write_chunk(store, piece.array, spec, piece.chunk, block)
    record = ShardRecord(piece.array, piece.chunk, piece.num_rows, written, tuple(sorted(lost.items())))
    _keep(context, new, piece, record, _origin(context, piece, compare))


def _changed_sources(context: RepairContext, piece: Piece) -> dict[int, str]:
    """Rows of a shard whose image has changed since, by size or checksum."""
    if piece.array == SENTENCES:
        return {}
    assert context.live is not None
    source = image_source(context.live.sources, piece.array)
    assert source is not None
    table = RowTable(table_of(context.staged, piece.array))
    columns = [name for name in (*source.columns, "bytes", "status", "digest") if table.has(name)]
    rows = table.shard(piece.chunk, columns)
    changed = {}
    for row, key in enumerate(keys_of(source, rows)[: piece.num_rows]):
        if rows["status"][row] != OK:
            continue
        try:
            data = source.read(key)
        except ImageError:  # the row failed, with a reason of its own
            continue
        wanted = rows["digest"][row] if "digest" in rows else None
        if len(data) != rows["bytes"][row] or (wanted is not None and digest(data) != wanted):
            changed[row] = f"{LOST}its image has changed since"
    return changed


def _give_up(context: RepairContext, new: NewBytes, piece: Piece, rows: Runs | None) -> None:
    """Mark rows of a shard as lost: NaN, even where the damaged file, which the log keeps, still holds numbers.

    Args:
        rows: those that are wrong in a file whose bytes are right; None gives up all of them.
    """
    layout, spec = context.layout, context.specs[piece.array]
    block = np.full((piece.num_rows, *spec.shape[1:]), np.nan, dtype=spec.disk_dtype)
    if rows is None:
        rows = piece.runs
        _keep_in_log(layout, piece.name)
    else:
        block[:] = read_chunk(layout.teacher_zarr, piece.array, spec, piece.chunk)[: piece.num_rows]
    gone = [row for first, last in rows for row in range(first, last + 1)]
    block[[row - piece.first for row in gone]] = np.nan
    good = good_rows(RowTable(table_of(layout, piece.array)).columns("status", "reason"), layout.shares_rows)
    written = write_chunk(context.staged.teacher_zarr, piece.array, spec, piece.chunk, block)
    reason = f"{LOST}damaged, and {context.without or 'its source is not at hand'}"
    failures = tuple((row - piece.first, reason) for row in gone if good[row])
    record = ShardRecord(piece.array, piece.chunk, piece.num_rows, written, failures)
    _keep(context, new, piece, record, Origin(by="repair"))


def _keep(context: RepairContext, new: NewBytes, piece: Piece, record: ShardRecord, origin: Origin) -> None:
    """Count a shard that waits in `mend/`."""
    if record.digest == piece.digest:  # rows that were lost are lost still
        (context.staged.root / piece.name).unlink(missing_ok=True)
    else:
        Journal(context.staged).add(record, {})
        new.shards.append((piece, record, origin))
    new.mark(piece, record)


def _keep_old_reasons(new: NewBytes, actions: Actions, outcome: Outcome) -> None:
    """A row that was lost and is lost still keeps its reason: its table stays as it is."""
    left = {(piece.array, row) for piece in actions.shards if piece.name in outcome.left for row in _rows(piece)}
    for array, rows in actions.retry.items():
        states = new.states[array]
        for row, reason in rows.items():
            if (array, row) in left or states.get(row) is not None:
                states[row] = reason


def _rows(piece: Piece) -> range:
    return range(piece.first, piece.first + piece.num_rows)


def _keep_in_log(layout: Layout, name: str) -> None:
    """Keep a damaged file that nothing can replace: some of its rows may still be right."""
    source, target = layout.root / name, layout.root / "log" / "removed" / name
    if source.is_file() and not target.exists():
        make_folder(target.parent)
        os.link(source, target)
