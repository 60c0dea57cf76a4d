"""The end of stage one and of an append: row tables with their failures, indexes, pseudo-pairs, last the manifest."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...cache.disk.arrays import chunk_path, read_spec
from ...cache.disk.durable import digest, write_bytes
from ...cache.disk.layout import DIRECTIONS, IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from ...cache.disk.row_tables import OK, RowTable, good_rows, mark_failures, read_own_failures, write_own_failures
from ...cache.version.journal import Journal
from ...cache.version.manifest import file_entry, read_manifest
from ...cache.version.plan_file import plan_in_force
from ...cache.version.schema import ArrayCounts, FileEntry, Manifest, Plan
from ...cache.version.versions import put_in_force
from ...stages.settings.cache import PairsSettings
from ..progress import say, show_counts
from .embed_shards import failures_of
from .kept_packs import pack_files, pixels_document, setting_in_force
from .planned import planned_specs
from .pseudo_pairs import Retrieval, pairs_document, write_pairs


def finish_cache(layout: Layout, plan: Plan, pairs: PairsSettings, pixels: str | None, transductive: list[str]) -> None:
    """Turn a folder whose shards are all counted into a finished cache, or a version in the making into the cache's.

    Args:
        pixels: what is asked for as `cache.pixels`.
        transductive: labelled sets whose class names are among the training prompts.
    """
    journal, before = Journal(layout), read_manifest(layout.base)
    version = before.version + 1 if before else 1
    plan_file = plan_in_force(layout)
    if layout.under:
        plan_file = layout.plan_of(version)
        write_bytes(plan_file, layout.plan.read_bytes())
    tables = {IMAGES: layout.image_rows, SENTENCES: layout.sentence_rows}
    tables |= {evaluate_images(name): layout.evaluate_rows(name) for name in plan.inputs.evaluate}
    arrays = _settle_failures(layout, plan, journal, tables, before)
    for array, entry in arrays.items():
        if entry.failed:
            say(f"{array}: {entry.failed:,} rows have no embedding: {show_counts(entry.reasons)}")
    if any(entry.failed for entry in arrays.values()):
        say(f"`dimefm cache inspect {layout.base.root} --failed` lists them")
    retrieval = Retrieval()
    goes_on = before if before and before.pairs_settings == pairs_document(pairs) else None
    if goes_on and _counts(goes_on.arrays) == _counts(arrays):
        retrieval = Retrieval(goes_on.index, goes_on.pairs)
    elif pairs.k:
        retrieval = write_pairs(layout, pairs, journal, version, goes_on if layout.under else None)
    documents = [plan_file, *([layout.own_failures] if plan.rows_of else tables.values())]
    heads = [evaluate_head(name) for name in plan.inputs.evaluate]
    files = {
        **_inherited(before),
        **dict(files_of(layout, journal, [*tables, *heads], documents, retrieval)),
    }
    setting, kept = setting_in_force(layout, plan, journal, pixels), None
    if setting:
        num_shards = planned_specs(plan)[IMAGES].num_chunks
        files |= dict(pack_files(layout, journal, setting, num_shards))
        kept = pixels_document(layout, setting, plan.shard_rows)
    changes = {
        "version": version,
        "plan": digest(plan_file.read_bytes()),
        "plan_file": plan_file.name,
        "arrays": arrays,
        "pairs_settings": pairs_document(pairs),
        "pairs": retrieval.pairs,
        "index": retrieval.index,
        "text_tower": layout.text_tower.name if layout.find(layout.text_tower).exists() else None,
        "pixels": kept,
        "transductive": transductive,
        "files": files,
    }
    put_in_force(layout, before.replace(**changes) if before else Manifest.model_validate(changes))


def _settle_failures(
    layout: Layout, plan: Plan, journal: Journal, tables: Mapping[str, Path], before: Manifest | None
) -> dict[str, ArrayCounts]:
    """Write failed rows where they belong; returns for each array its rows, failed ones, and why they failed.

    A cache that shares another one's tables notes for itself what had failed there when it embedded its own rows: the
    other one may get such a row embedded after all.
    """
    specs, is_shared = planned_specs(plan), plan.rows_of is not None
    own = read_own_failures(layout.find(layout.own_failures))
    arrays = {}
    for array, path in tables.items():
        failures: dict[int, str] = {}
        for record in journal.of(array):
            failures |= failures_of(record, plan.shard_rows)
        if is_shared:  # another cache's table: what failed here may be sound there
            first_new = before.arrays[array].rows if before and array in before.arrays else 0
            own[array] = (
                _listed_failures(layout.find(path), first_new, specs[array].shape[0]) | own.get(array, {}) | failures
            )
        elif layout.find(path) == path:  # a table that an append has not touched has its failures in it already
            mark_failures(path, failures, plan.shard_rows)
        table = RowTable(layout.find(path), specs[array].shape[0])
        arrays[array] = count_failures(table, own.get(array, {}), is_shared)
    if is_shared:
        write_own_failures(layout.own_failures, own)
    return arrays


def _listed_failures(table: Path, first: int, stop: int) -> dict[int, str]:
    """Rows of a table, from `first` to before `stop`, that had failed when they were to be embedded."""
    columns = RowTable(table, stop).columns("status", "reason").slice(first)
    rows = enumerate(zip(columns["status"].to_pylist(), columns["reason"].to_pylist(), strict=True), start=first)
    return {row: str(reason) for row, (status, reason) in rows if status != OK}


def count_failures(table: RowTable, own_failures: Mapping[int, str], shared: bool) -> ArrayCounts:
    """What `arrays` of the manifest says of one: rows, failed ones, and how many for which reason.

    Args:
        own_failures: rows that failed for this teacher alone, and why.
        shared: the table is another cache's.
    """
    columns = table.columns("status", "reason")
    bad = np.flatnonzero(~good_rows(columns, shared))
    failed = dict(zip(bad.tolist(), columns["reason"].take(pa.array(bad)).to_pylist(), strict=True))
    reasons = Counter((failed | dict(own_failures)).values())
    return ArrayCounts(rows=table.num_rows, failed=reasons.total(), reasons=dict(sorted(reasons.items())))


def _counts(arrays: Mapping[str, ArrayCounts]) -> list[ArrayCounts]:
    """What indexes and pairs are over: a row that failed and is good now counts as a change."""
    return [arrays[IMAGES], arrays[SENTENCES]]


def _inherited(before: Manifest | None) -> dict[str, FileEntry]:
    """Files that go on from version to version, whatever the change: plans and masks."""
    files = before.files if before else {}
    return {name: entry for name, entry in files.items() if name.startswith(("plan", "masks/"))}


def files_of(
    layout: Layout, journal: Journal, arrays: list[str], documents: Sequence[Path], retrieval: Retrieval
) -> Iterator[tuple[str, FileEntry]]:
    """(name, size and checksum) of every file of the cache; chunks as the journal has them, nothing read twice."""
    tower = layout.find(layout.text_tower)
    others = [*documents, *sorted(path for path in tower.rglob("*") if path.is_file())]
    stores = [(layout.teacher_zarr, "", arrays)]
    if retrieval.pairs:
        names = [f"{direction}/{part}" for direction in DIRECTIONS for part in ("ids", "scores")]
        stores.append((layout.find(layout.root / retrieval.pairs.store), retrieval.pairs.counted, names))
        for info in retrieval.index.values():
            others += [layout.root / info.file, (layout.root / info.file).with_suffix(".json")]
    for store, counted, names in stores:
        others += sorted(store.rglob("zarr.json"))
        for name in names:
            spec = read_spec(store, name)
            known = {record.shard: record.digest for record in journal.of(counted + name)}
            for shard in range(spec.num_chunks):
                path = chunk_path(store, name, shard, len(spec.shape))
                if shard in known:
                    yield layout.name_of(path), FileEntry(bytes=spec.chunk_bytes, digest=known[shard])
                else:
                    yield layout.name_of(path), file_entry(layout.find(path))
    for path in others:
        yield layout.name_of(path), file_entry(layout.find(path))
