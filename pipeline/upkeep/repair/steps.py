"""A repair from top to bottom.

First the cache restores what it can from its own copies. For the rest, the actions are computed (actions.py), then
applied; what then has other bytes than before becomes a new version (new_version.py).
"""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ....cache.audit.findings import Report, runs_of
from ....cache.audit.inventory import pieces, unlisted_packs
from ....cache.disk.arrays import declare_arrays
from ....cache.disk.layout import IMAGES, Layout
from ....cache.errors import DimefmError
from ....cache.version.manifest import file_entry, read_manifest
from ....cache.version.plan_file import read_plan
from ....cache.version.spares import has_spare, put_back
from ...config.remembered import ConfigChoice, config_of
from ...progress import say
from ...stage_one.embed_shards import teacher_at_hand
from ...stage_one.planned import planned_specs
from ...stage_one.sources import Sources
from ..live_teacher import LiveTeacher, image_source, require_loaded_teacher
from .actions import Actions, AtHand, LostRows, plan_actions
from .context import Damage, NewBytes, Outcome, RepairContext
from .files import list_tables_again, lost_rows, move_away, restore_known_bytes, settle_journal
from .new_version import make_version
from .packs import repair_packs
from .shards import is_source_at_hand, keep_waiting, repair_shards


def repair_cache(layout: Layout, report: Report, outcome: Outcome, config_path: ConfigChoice | Path | None) -> None:
    """Repair what can be repaired of a cache whose manifest is in order; for the one writer that has its lock.

    Args:
        report: what `verify` found.
        outcome: takes what was repaired and what was not.
    """
    manifest = read_manifest(layout)
    assert manifest is not None
    damage = Damage.of(report, manifest)
    mended = outcome.mended
    for finding in damage.findings:
        if finding.kind in ("extra", "leftover"):
            mended[finding.where] = move_away(layout, finding.where)
    for name in sorted(filter(has_spare, damage.unreliable)):
        if put_back(layout, name, manifest.files[name].digest):
            mended[name] = "put back from its spare copy"
    damage = damage.but(mended)
    if manifest.plan_file in damage.files:
        outcome.leave(damage.files, "the plan and its spare copy are lost; restore it from a backup")
        return
    plan = read_plan(layout)
    assert plan is not None
    specs, shard_rows = planned_specs(plan), plan.shard_rows
    wanted = [*pieces(manifest, shard_rows), *unlisted_packs(manifest, shard_rows)]
    for piece in wanted:
        is_candidate = piece.is_teachers and piece.name in damage.unreliable
        if is_candidate and restore_known_bytes(layout, piece, specs[piece.array]):
            mended[piece.name] = "only its padding, length or failed rows were damaged: the same bytes"
    waiting = keep_waiting(layout.mend)
    with ExitStack() as stack:
        context = RepairContext(layout, layout.mend, manifest, plan, specs, wanted)
        context = _load_what_is_needed(context, damage.but(mended), config_path, stack)
        mended |= list_tables_again(context, damage.but(mended).below("rows/"))
        damage = damage.but(mended)
        lost = lost_rows(layout, manifest)
        at_hand = replace(_find_at_hand(context, damage, lost), waiting=waiting)
        new = _apply(context, plan_actions(layout, damage, wanted, lost, at_hand), damage, outcome)
        make_version(context, new, damage.but(mended), outcome)
    shutil.rmtree(layout.mend.root, ignore_errors=True)
    after = read_manifest(layout)
    assert after is not None
    if settle_journal(layout, after, pieces(after, shard_rows), specs):
        mended["log/shards.jsonl"] = "agrees with the manifest again"
    outcome.leave(damage.but(mended).files, context.without or "could not be made again")
    outcome.lost = {array: runs_of(sorted(rows)) for array, rows in lost_rows(layout, after).items() if rows}


def _load_what_is_needed(
    context: RepairContext, damage: Damage, config_path: ConfigChoice | Path | None, stack: ExitStack
) -> RepairContext:
    """Load the config and the teacher as far as the damage asks for them; the stack ends with the teacher."""
    chunks = {name for name in damage.below("teacher.zarr/") if not name.endswith("zarr.json")}
    needs_teacher = bool(chunks or damage.below("text_tower/")) or any(
        lost_rows(context.layout, context.manifest).values()
    )
    if not needs_teacher and not damage.below("rows/", "pixels/"):
        return context
    try:
        config = config_of(context.layout, config_path)
        sources = Sources.of(config)
        context = replace(context, sources=sources, workers=config.teacher.workers)
        if needs_teacher:
            teacher = stack.enter_context(teacher_at_hand(config.teacher))
            require_loaded_teacher(context.layout.root, context.plan, teacher)
            live = LiveTeacher(sources, config.teacher, context.staged, context.plan, teacher)
            context = replace(context, live=live)
    except DimefmError as error:
        context = replace(context, without=" ".join(str(error).split()))
        say(f"without the teacher: {context.without}")
    return context


def _find_at_hand(context: RepairContext, damage: Damage, lost: LostRows) -> AtHand:
    sources, arrays = context.sources, {array for array, rows in lost.items() if rows}
    arrays |= {piece.array for piece in context.pieces if piece.is_teachers and piece.name in damage.files}
    return AtHand(
        teacher=context.live is not None,
        arrays={
            array for array in arrays if sources and context.live and is_source_at_hand(sources, context.plan, array)
        },
        pictures=sources is not None and image_source(sources, IMAGES) is not None,
        without=context.without,
    )


def _apply(context: RepairContext, actions: Actions, damage: Damage, outcome: Outcome) -> NewBytes:
    """Take the actions, in their order."""
    layout = context.layout
    if actions.metadata:
        declare_arrays(layout.teacher_zarr, context.specs)
        outcome.mended |= _written(context, actions.metadata, "written again")
    if actions.text_tower:
        from ....stages.models.frozen_text_tower import save_text_tower

        assert context.live is not None
        save_text_tower(context.live.teacher, layout.text_tower)
        outcome.mended |= _written(context, actions.text_tower, "saved again from the teacher")
    outcome.left |= actions.left
    new = repair_shards(context, actions, damage, outcome)
    repair_packs(context, actions.packs, new, outcome)
    return new


def _written(context: RepairContext, names: list[str], how: str) -> dict[str, str]:
    """Files that were written again, and whether they have the manifest's bytes."""
    root, files = context.layout.root, context.manifest.files
    there = [name for name in names if (root / name).exists()]
    return {name: f"{how}: {'the same' if file_entry(root / name) == files[name] else 'other'} bytes" for name in there}
