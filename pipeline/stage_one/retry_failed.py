"""`dimefm cache-teacher --retry-failed`: rows that failed are embedded again, now that their files may be mended.

Of a cache that is not finished, the shards with failures leave the journal, and stage one embeds them as any other. A
finished one gets a new version (retried_version.py).
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ...cache.audit.failures import arrays_of, failed_rows
from ...cache.disk.layout import IMAGES, SENTENCES, SIDES, Layout, table_of
from ...cache.disk.row_tables import LOST, OK, RowTable, read_own_failures, revise_rows, write_own_failures
from ...cache.errors import InputError
from ...cache.version.journal import Journal, read_records
from ...cache.version.manifest import read_manifest
from ...cache.version.plan_file import read_plan
from ...cache.version.schema import Plan
from ...cache.version.versions import discard_change
from ...stages.inputs.image_source import image_digests, row_keys
from ..config.load import Config
from ..progress import say
from .guards import check_run
from .retried_version import Again, make_retried_version
from .sources import Sources


def retry_failed(config: Config, layout: Layout, sources: Sources) -> None:
    """Look at failed rows again; for the one writer that has the lock of the cache.

    Raises:
        CacheError: if the cache is of another teacher or other inputs, or damaged where a row is to be embedded.
        InputError: if the teacher is unusable.
    """
    plan, manifest = read_plan(layout), read_manifest(layout)
    if plan is None:
        return
    check_run(layout, config.teacher, config.cache, sources)
    following = layout.next
    if manifest is None:
        _forget_failures(layout, plan, sources)
    elif following.plan.exists():
        _forget_failures(following, Plan.read(following.plan), sources)
        say(f"{layout.root}: an append is under way; `dimefm cache append` goes on with it")
    else:
        discard_change(layout)
        again = _rows_to_retry(layout, plan, sources)
        num_rows = sum(map(len, again.values()))
        if not num_rows:
            say(f"{layout.root}: no failed row can be tried again: there is none, or their files are not there")
            return
        say(f"{layout.root}: {num_rows:,} failed rows are tried again")
        make_retried_version(config.teacher, layout, plan, manifest, sources, again)


def _forget_failures(layout: Layout, plan: Plan, sources: Sources) -> None:
    """Let every shard with a failed row count as missing, and bring the row table up to date with files as they are."""
    before, journal = read_manifest(layout.base), Journal(layout)
    first_new = {array: before.arrays[array].rows for array in before.arrays} if before else {}
    again: dict[str, Again] = {}
    for array, num_rows in arrays_of(plan).items():
        failed = {row for row in _retriable(layout, plan, array) if row >= first_new.get(array, 0)}
        records = {record.shard: record for record in journal.of(array)}
        of_row = np.arange(num_rows) // plan.shard_rows
        fails = {row // plan.shard_rows for row in failed} | {n for n, record in records.items() if record.failures}
        missing = {shard for shard in set(of_row.tolist()) if shard not in records} | fails
        # Files of shards that are embedded only now may have changed since they were listed.
        unsettled = set(np.flatnonzero(np.isin(of_row, list(missing))).tolist()) | failed
        wanted = sorted(row for row in unsettled if row >= first_new.get(array, 0))
        again[array] = _as_listed(layout, plan, sources, array, wanted, failed)
    shards = {(array, row // plan.shard_rows) for array, rows in again.items() for row in rows}
    shards |= {(record.array, record.shard) for record in read_records(layout) if record.failures}
    num_shards = sum((record.array, record.shard) in shards for record in journal)
    if plan.pixels:
        shards |= {(layout.packs(plan.pixels), shard) for array, shard in shards if array == IMAGES}
    if shards:  # what was found among the embeddings before knows nothing of these rows
        for side in SIDES:
            layout.index(side, before.version + 1 if before else 1).with_suffix(".json").unlink(missing_ok=True)
        shards |= {(record.array, record.shard) for record in read_records(layout) if record.array.startswith("pairs")}
    journal.drop(shards)  # first: a shard that is embedded again in vain does no harm
    if layout.own_failures.exists():
        own = {
            array: {
                row: why
                for row, why in rows.items()
                if row < first_new.get(array, 0) or (array, row // plan.shard_rows) not in shards
            }
            for array, rows in read_own_failures(layout.own_failures).items()
        }
        write_own_failures(layout.own_failures, own)
    for array, rows in again.items():
        table = table_of(layout, array)
        if rows and table.is_relative_to(layout.root) and not plan.rows_of:
            revise_rows(table, table, rows, plan.shard_rows)
    say(f"{layout.base.root}: {num_shards:,} finished shards have failed rows and are embedded again")


def _rows_to_retry(layout: Layout, plan: Plan, sources: Sources) -> dict[str, Again]:
    """Failed rows of a finished cache that may be embedded now, by array."""
    found = {}
    for array in arrays_of(plan):
        failed = _retriable(layout, plan, array)
        if rows := _as_listed(layout, plan, sources, array, sorted(failed), failed):
            found[array] = rows
    return found


def _retriable(layout: Layout, plan: Plan, array: str) -> set[int]:
    """Failed rows that another try may help.

    Not those that a repair gave up, which are the next repair's; not lines that are no sentences; and in a cache that
    shares another one's tables not those that failed there, which are embedded there first.
    """
    from ...stages.embed.image_rows import BEYOND_FLOAT16, NOT_FINITE

    failed = {row: why for row, why in failed_rows(layout, plan, array).items() if not why.startswith(LOST)}
    if array == SENTENCES:
        return {row for row, why in failed.items() if why in (NOT_FINITE, BEYOND_FLOAT16)}
    if plan.rows_of:
        status = RowTable(table_of(layout, array)).take(list(failed), "status")
        return {row for row, found in zip(failed, status, strict=True) if found == OK}
    return set(failed)


def _as_listed(
    layout: Layout, plan: Plan, sources: Sources, array: str, rows: Sequence[int], failed: Collection[int]
) -> Again:
    """What the row table is to say of rows, where their source lists them and it says something else by now.

    Args:
        rows: ascending.
        failed: those of them that are to be embedded again, and are returned wherever they are listed.
    """
    good = {"status": OK, "reason": None}
    if not rows or plan.rows_of or array == SENTENCES:
        return dict.fromkeys(failed, good)
    source = sources.images_of(array)
    if source is None or not source.at_hand():
        return {}
    table = RowTable(table_of(layout, array), arrays_of(plan)[array])
    names, sizes, times = (table.take(rows, column) for column in ("source", "bytes", "modified_ns"))
    places = {name: place for place, name in enumerate(names)}
    found: dict[int, dict[str, Any]] = {}
    with suppress(InputError):  # it cannot be listed, or has no image
        for image in source.list():
            place = places.get(image.source)
            if place is None or image.problem:
                continue
            same = (image.bytes, image.modified_ns) == (sizes[place], times[place])
            if rows[place] in failed or not same:
                found[rows[place]] = {"bytes": image.bytes, "modified_ns": image.modified_ns}
    if sources.hash_images and found:
        keys = row_keys(source, table)(np.array(list(found), dtype=np.int64))
        for change, digest in zip(found.values(), image_digests(source, keys), strict=True):
            change["digest"] = digest
    return {row: change | (good if row in failed else {}) for row, change in found.items()}
