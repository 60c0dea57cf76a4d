"""The end of a repair: the version of the cache that comes of it, with the indexes and pairs that depend on it.

What has other bytes than before becomes a new version, made in `mend/` and put into force in one step. Where only
indexes or pairs were damaged, they are made again in place, under the names that they have.
"""

from pathlib import Path
from typing import Any

from ....cache.audit.verify import journal_key
from ....cache.disk.arrays import declare_arrays
from ....cache.disk.layout import IMAGES, SENTENCES, table_of
from ....cache.disk.row_tables import LOST, RowTable, read_own_failures, restate_rows, write_own_failures
from ....cache.version.journal import Journal
from ....cache.version.manifest import file_entry
from ....cache.version.schema import FileEntry
from ....cache.version.versions import put_in_force
from ....stages.settings.cache import PairsSettings
from ...stage_one.finish import count_failures, files_of
from ...stage_one.pseudo_pairs import write_pairs
from .context import Damage, Outcome, RepairContext, ShardResults

PAIRED = ("teacher.zarr/zarr.json", "teacher.zarr/images/", "teacher.zarr/sentences/", "rows/images", "rows/sentences")
"""What indexes and pairs are made from."""

Document = dict[str, Any]


def make_version(context: RepairContext, results: ShardResults, damage: Damage, outcome: Outcome) -> None:
    """Put what has other bytes than before into force, and indexes and pairs that agree with it."""
    manifest, staged = context.manifest, context.staged
    changed = {piece.name for piece, _, _ in results.changed}
    is_unsound = bool(damage.below(*PAIRED, "failed.parquet") - changed)
    needs_pairs = manifest.pairs is not None and any(
        piece.array in (IMAGES, SENTENCES) for piece, _, _ in results.changed
    )
    if needs_pairs and is_unsound:
        # Indexes and pairs of what is half repaired would be wrong, and the old ones are wrong already.
        outcome.leave(damage, changed, "the rest of its side has to be mended first")
        return
    document: Document = {**manifest.to_dict(), "version": manifest.version + 1, "files": dict(manifest.files)}
    for name in outcome.mended:
        if name in manifest.files and name.startswith(("text_tower/", "teacher.zarr/")):
            document["files"][name] = file_entry(context.layout.root / name)
    tables = _write_states(context, results)
    document["files"] |= tables
    if results.changed:
        _record_origins(document, results, outcome)
    if needs_pairs:
        _pair_again(context, document, damage, outcome)
    elif manifest.pairs is not None:
        _restore_pairs(context, document, damage, is_unsound, outcome)
    if results.changed or tables:
        own = read_own_failures(staged.find(staged.own_failures))
        document["arrays"] = {
            array: count_failures(
                RowTable(table_of(staged, array), context.specs[array].shape[0]),
                own.get(array, {}),
                context.shares_rows,
            )
            for array in manifest.arrays
        }
        if context.layout.next.root.exists():
            outcome.notes.append("next/: an append under way stood on the damaged version; it begins anew")
        put_in_force(staged, document)
    elif {**document, "version": 0} != {**manifest, "version": 0}:
        put_in_force(context.layout, document)


def _record_origins(document: Document, results: ShardResults, outcome: Outcome) -> None:
    """Note in the manifest where shards with other bytes come from."""
    origins = {array: dict(of_array) for array, of_array in document.get("origins", {}).items()}
    for piece, record, origin in results.changed:
        document["files"][piece.name] = {"bytes": piece.num_bytes, "digest": record.digest}
        origins.setdefault(piece.array, {})[str(piece.chunk)] = origin
        lost = sum(reason.startswith(LOST) for _, reason in record.failures)
        cosine = origin.get("cosine")
        how = f", cosine at least {cosine['least']:.6f} on {origin['compared']} sound rows" if cosine else ""
        outcome.mended[piece.name] = f"{lost} rows marked as lost" if lost else f"computed again: other bytes{how}"
    document["origins"] = origins


def _write_states(context: RepairContext, results: ShardResults) -> dict[str, FileEntry]:
    """Write the rows that failed or are good again into the tables; returns the entries of tables that wait."""
    layout, staged = context.layout, context.staged
    states = {array: of_array for array, of_array in results.states.items() if of_array}
    waiting = [staged.own_failures]
    if not context.shares_rows:
        for array, of_array in states.items():
            name = layout.name_of(table_of(layout, array))
            restate_rows(table_of(staged, array), staged.root / name, of_array, context.shard_rows)
        waiting += sorted((staged.root / "rows").rglob("*.parquet"))
    elif states:
        own = read_own_failures(layout.own_failures)
        for array, of_array in states.items():
            marked: dict[int, str | None] = {**own.get(array, {}), **of_array}
            own[array] = {row: reason for row, reason in marked.items() if reason is not None}
        write_own_failures(staged.own_failures, own)
    entries = {staged.name_of(path): file_entry(path) for path in waiting if path.exists()}
    return {name: entry for name, entry in entries.items() if entry != context.manifest.files.get(name)}


def _pair_again(context: RepairContext, document: Document, damage: Damage, outcome: Outcome) -> None:
    """Make indexes and pairs of embeddings that have changed, under the names of the new version."""
    staged, journal = context.staged, Journal(context.staged)
    declare_arrays(staged.teacher_zarr, context.specs)
    settings = PairsSettings.model_validate(context.manifest.pairs_settings)
    retrieved = write_pairs(staged, settings, journal, document["version"])
    assert context.manifest.pairs is not None
    old = (f"{context.manifest.pairs.store}/", "index/")
    kept = {name: entry for name, entry in document["files"].items() if not name.startswith(old)}
    document |= {**retrieved, "files": kept | dict(files_of(staged, journal, [], [], retrieved))}
    outcome.mended |= dict.fromkeys(damage.below(*old), "made again for the new version")


def _restore_pairs(
    context: RepairContext, document: Document, damage: Damage, is_unsound: bool, outcome: Outcome
) -> None:
    """Make damaged indexes and pairs of unchanged embeddings again, in place."""
    layout, manifest, pairs = context.layout, context.manifest, context.manifest.pairs
    assert pairs is not None
    bad = {finding.where for finding in damage.findings if finding.kind in ("pairs", "index")}
    bad |= damage.below(f"{pairs.store}/", "index/")
    if not bad:
        return
    if is_unsound:
        outcome.leave(damage, bad, "the embeddings have to be mended first")
        return
    journal = Journal(layout)
    for info in manifest.index.values():
        beside = Path(info.file).with_suffix(".json").as_posix()
        if info.file in bad or beside in bad:
            (layout.root / beside).unlink(missing_ok=True)  # an index without it is built again
    for piece in context.pieces:
        store = f"{pairs.store}/{piece.array.split('/')[0]}"  # findings on pairs as a whole name this
        if piece.content in ("ids", "scores") and (piece.name in bad or store in bad):
            array, chunk = journal_key(piece, manifest)
            journal.forget(f"{array.removesuffix(piece.content)}scores", chunk)
    settings = PairsSettings.model_validate(manifest.pairs_settings)
    version = int(str(pairs.store).removesuffix(".zarr").partition("-")[2] or 1)
    retrieved = write_pairs(layout, settings, journal, version)
    document |= retrieved
    document["files"] |= dict(files_of(layout, journal, [], [], retrieved))
    for name in sorted(bad):
        same = document["files"].get(name) == manifest.files.get(name)
        outcome.mended[name] = f"made again: {'the same' if same else 'other'} bytes"
