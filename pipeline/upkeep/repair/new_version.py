"""The end of a repair: the version of the cache that comes of it, with the indexes and pairs that depend on it.

What has other bytes than before becomes a new version, made in `mend/` and put into force in one step. Where only
indexes or pairs were damaged, they are made again in place, under the names that they have.
"""

from pathlib import Path

from ....cache.audit.verify import journal_key
from ....cache.disk.arrays import declare_arrays
from ....cache.disk.layout import IMAGES, SENTENCES, table_of
from ....cache.disk.row_tables import LOST, RowTable, read_own_failures, restate_rows, write_own_failures
from ....cache.version.journal import Journal
from ....cache.version.manifest import file_entry
from ....cache.version.schema import FileEntry, Manifest
from ....cache.version.versions import put_in_force
from ....stages.settings.cache import PairsSettings
from ...stage_one.finish import count_failures, files_of
from ...stage_one.pseudo_pairs import write_pairs
from .context import Damage, NewBytes, Outcome, RepairContext

PAIRED = ("teacher.zarr/zarr.json", "teacher.zarr/images/", "teacher.zarr/sentences/", "rows/images", "rows/sentences")
"""What indexes and pairs are made from."""


def make_version(context: RepairContext, new: NewBytes, damage: Damage, outcome: Outcome) -> None:
    """Put what has other bytes than before into force, with indexes and pairs that agree with it."""
    manifest, staged = context.manifest, context.staged
    changed = {piece.name for piece, _, _ in new.shards}
    is_unsound = bool(damage.below(*PAIRED, "failed.parquet") - changed)
    needs_pairs = bool(manifest.pairs) and any(piece.array in (IMAGES, SENTENCES) for piece, _, _ in new.shards)
    if needs_pairs and is_unsound:
        # Indexes and pairs of what is half repaired would be wrong, and the old ones are wrong already.
        outcome.leave(changed, "the rest of its side has to be mended first")
        return
    rewritten = {name for name in outcome.mended if name.startswith(("text_tower/", "teacher.zarr/"))}
    files = {name: file_entry(context.layout.root / name) for name in rewritten & manifest.files.keys()}
    tables = _write_states(context, new)
    following = manifest.replace(files={**manifest.files, **files, **tables})
    if new.shards:
        following = _record_origins(following, new, outcome)
    if needs_pairs:
        following = _pair_again(context, following, damage, outcome)
    elif manifest.pairs:
        following = _restore_pairs(context, following, damage, is_unsound, outcome)
    is_new = bool(new.shards or tables)
    if is_new:
        own = read_own_failures(staged.find(staged.own_failures))
        rows = {array: RowTable(table_of(staged, array), context.specs[array].shape[0]) for array in manifest.arrays}
        counts = {array: count_failures(rows[array], own.get(array, {}), context.shares_rows) for array in rows}
        following = following.replace(arrays=counts)
        if context.layout.next.root.exists():
            outcome.notes.append("next/: an append under way stood on the damaged version; it begins anew")
    if is_new or following != manifest:
        put_in_force(staged if is_new else context.layout, following.replace(version=manifest.version + 1))


def _record_origins(following: Manifest, new: NewBytes, outcome: Outcome) -> Manifest:
    """Note in the manifest where shards with other bytes come from."""
    files, origins = dict(following.files), {array: dict(chunks) for array, chunks in following.origins.items()}
    for piece, record, origin in new.shards:
        files[piece.name] = FileEntry(bytes=piece.num_bytes, digest=record.digest)
        origins.setdefault(piece.array, {})[str(piece.chunk)] = origin
        if lost := sum(reason.startswith(LOST) for _, reason in record.failures):
            how = f"{lost} rows marked as lost"
        elif origin.cosine:
            least = f"cosine at least {origin.cosine['least']:.6f} on {origin.compared} sound rows"
            how = f"computed again: other bytes, {least}"
        else:
            how = "computed again: other bytes"
        outcome.mended[piece.name] = how
    return following.replace(files=files, origins=origins)


def _write_states(context: RepairContext, new: NewBytes) -> dict[str, FileEntry]:
    """Write the rows that failed or are good again into the tables; returns the entries of tables that wait."""
    layout, staged = context.layout, context.staged
    states = {array: of_array for array, of_array in new.states.items() if of_array}
    waiting = [staged.own_failures]
    if not context.shares_rows:
        for array, of_array in states.items():
            name = layout.name_of(table_of(layout, array))
            restate_rows(table_of(staged, array), staged.root / name, of_array, context.plan.shard_rows)
        waiting += sorted((staged.root / "rows").rglob("*.parquet"))
    elif states:
        own = read_own_failures(layout.own_failures)
        for array, of_array in states.items():
            marked: dict[int, str | None] = {**own.get(array, {}), **of_array}
            own[array] = {row: reason for row, reason in marked.items() if reason is not None}
        write_own_failures(staged.own_failures, own)
    entries = {staged.name_of(path): file_entry(path) for path in waiting if path.exists()}
    return {name: entry for name, entry in entries.items() if entry != context.manifest.files.get(name)}


def _pair_again(context: RepairContext, following: Manifest, damage: Damage, outcome: Outcome) -> Manifest:
    """Make indexes and pairs of embeddings that have changed, under the names of the new version."""
    staged, pairs, journal = context.staged, context.manifest.pairs, Journal(context.staged)
    assert pairs is not None
    declare_arrays(staged.teacher_zarr, context.specs)
    retrieved = write_pairs(staged, _settings(context), journal, context.manifest.version + 1)
    old = (f"{pairs.store}/", "index/")
    outcome.mended |= dict.fromkeys(damage.below(*old), "made again for the new version")
    kept = {name: entry for name, entry in following.files.items() if not name.startswith(old)}
    files = kept | dict(files_of(staged, journal, [], [], retrieved))
    return following.replace(index=retrieved.index, pairs=retrieved.pairs, files=files)


def _restore_pairs(
    context: RepairContext, following: Manifest, damage: Damage, is_unsound: bool, outcome: Outcome
) -> Manifest:
    """Make damaged indexes and pairs of unchanged embeddings again, in place."""
    layout, manifest, pairs = context.layout, context.manifest, context.manifest.pairs
    assert pairs is not None
    bad = {finding.where for finding in damage.findings if finding.kind in ("pairs", "index")}
    bad |= damage.below(f"{pairs.store}/", "index/")
    if is_unsound:
        outcome.leave(bad, "the embeddings have to be mended first")
    if is_unsound or not bad:
        return following
    journal = Journal(layout)
    for info in manifest.index.values():
        beside = Path(info.file).with_suffix(".json").as_posix()
        if info.file in bad or beside in bad:
            (layout.root / beside).unlink(missing_ok=True)  # an index without it is built again
    for piece in context.pieces:
        direction = f"{pairs.store}/{piece.array.split('/')[0]}"  # where a finding on wrong pairs points
        if piece.content in ("ids", "scores") and (piece.name in bad or direction in bad):
            array, chunk = journal_key(piece, manifest)
            journal.forget(f"{array.removesuffix(piece.content)}scores", chunk)
    version = int(pairs.store.removesuffix(".zarr").partition("-")[2] or 1)
    retrieved = write_pairs(layout, _settings(context), journal, version)
    files = following.files | dict(files_of(layout, journal, [], [], retrieved))
    for name in sorted(bad):
        same = files.get(name) == manifest.files.get(name)
        outcome.mended[name] = f"made again: {'the same' if same else 'other'} bytes"
    return following.replace(index=retrieved.index, pairs=retrieved.pairs, files=files)


def _settings(context: RepairContext) -> PairsSettings:
    return PairsSettings.model_validate(context.manifest.pairs_settings)
