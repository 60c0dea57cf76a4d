"""Repairing single files: strays, the manifest, row tables, chunks whose content is known, the journal."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from ....cache.audit.inventory import Piece
from ....cache.audit.verify import journal_key
from ....cache.disk.arrays import ArraySpec
from ....cache.disk.durable import PARTIAL, digest, write_bytes
from ....cache.disk.layout import IMAGES, SENTENCES, Layout, evaluate_images, table_of
from ....cache.disk.row_tables import FAILED, LOST, RowTable, good_rows, mark_failures, read_own_failures
from ....cache.errors import CacheError, InputError
from ....cache.version.journal import Journal, ShardRecord
from ....cache.version.manifest import (
    digest_lines,
    file_entry,
    trusted_copy,
    vouched_digests,
)
from ....cache.version.schema import Manifest, Plan, refuse_newer
from ....cache.version.spares import put_back, spare_manifests
from ....cache.version.versions import move_file
from ...config.remembered import ConfigChoice, config_of
from ...stage_one.finish import finish_cache
from ...stage_one.inputs import list_inputs, transductive_sets_or_recorded
from ...stage_one.sources import Sources
from .context import RepairContext

REMOVED = Path("log", "removed")
"""Where damaged files and files that do not belong are kept."""


def move_away(layout: Layout, name: str) -> str:
    """Move a file that does not belong to the cache, or cannot be repaired, into the log; returns what was done."""
    target = layout.root / REMOVED / name
    number = 1
    while target.exists():
        number += 1
        target = layout.root / REMOVED / f"{name}.{number}"
    source = layout.root / name
    if name.endswith(PARTIAL):  # half a file is of no use
        source.unlink(missing_ok=True)
        return "removed"
    move_file(source, target)
    for folder in source.parents:
        if folder == layout.root or any(folder.iterdir()):
            break
        folder.rmdir()
    return f"moved to {target.relative_to(layout.root).as_posix()}"


def restore_manifest(layout: Layout, config_path: ConfigChoice | Path | None) -> dict[str, str]:
    """Restore a damaged manifest, or the file with its checksum.

    Returns:
        The files that were repaired, and how.

    Raises:
        CacheError: if neither the manifest nor its spare copy is whole and it cannot be made again.
    """
    vouched, whole = vouched_digests(layout)
    data = layout.manifest.read_bytes() if layout.manifest.exists() else b""
    if whole and digest(data) in vouched:
        return {}
    if not whole:
        refuse_newer(layout.manifest, data)
    copies = spare_manifests(layout)
    if digest(data) in copies or (digest(data) in vouched and not whole):
        present, how = digest(data), {layout.manifest_digest.name: "written again"}
    else:
        present = trusted_copy(layout) or ""
        if not present:
            return _remake_manifest(layout, config_path)
        assert put_back(layout, layout.manifest.name, present)
        how = {layout.manifest.name: "put back from its spare copy"}
    if not whole:
        write_bytes(layout.manifest_digest, digest_lines([*(line for line in copies if line != present), present]))
        how[layout.manifest_digest.name] = "written again"
    return how


def _remake_manifest(layout: Layout, config_path: ConfigChoice | Path | None) -> dict[str, str]:
    """Repeat the end of stage one, over the files that are there."""
    if list(layout.root.glob("plan-*.json")):
        raise CacheError(
            f"{layout.manifest}: damaged, and so is its spare copy; a cache that has grown cannot be described from "
            "its files alone: restore manifest.json from a backup"
        )
    if not layout.plan.exists():
        raise CacheError(f"{layout.plan}: missing, and so is the manifest; restore one of them from a backup")
    config = config_of(layout, config_path)
    plan = Plan.read(layout.plan)
    for path in (layout.manifest, layout.manifest_digest):
        if path.exists():
            move_away(layout, path.name)
    transductive = transductive_sets_or_recorded(Sources.of(config), layout)
    finish_cache(layout, plan, config.pairs, config.cache.pixels, transductive)
    return {layout.manifest.name: "made again from the plan, the journal and the files; earlier masks are not in it"}


def list_tables_again(context: RepairContext, names: Collection[str]) -> dict[str, str]:
    """List the sources again for row tables that are damaged, spare copy and all.

    Returns:
        The tables that were repaired, and how. One that has the same rows in other bytes (files were copied and have
        other times, say) waits in `mend/`.
    """
    layout, plan = context.layout, context.plan
    if context.sources is None or not names or plan.grown or context.shares_rows:
        return {}
    scratch, done = Layout(context.staged.root / "sources"), {}
    try:
        found = list_inputs(context.sources, scratch, plan.shard_rows)
    except (InputError, CacheError):
        return {}
    inputs, journal = plan.inputs, Journal(layout)
    same = {IMAGES: found.images == inputs.images, SENTENCES: found.sentences == inputs.sentences}
    for name, item in inputs.evaluate.items():
        same[evaluate_images(name)] = found.evaluate.get(name) == item
    for array in (array for array, is_same in same.items() if is_same):
        name = layout.name_of(table_of(layout, array))
        if name not in names:
            continue
        made = scratch.root / name
        failures = {
            record.shard * context.plan.shard_rows + row: reason
            for record in journal.of(array)
            for row, reason in record.failures
        }
        mark_failures(made, failures, context.plan.shard_rows)
        is_equal = file_entry(made) == context.manifest.files.get(name)
        move_file(made, (layout if is_equal else context.staged).root / name)
        what = "the same bytes" if is_equal else "the same rows, other sizes or times"
        done[name] = f"listed again from the sources: {what}"
    return done


def restore_known_bytes(layout: Layout, piece: Piece, spec: ArraySpec) -> bool:
    """Restore a chunk file whose damage is only in what is known anyway: its length, its padding, rows that failed.

    Returns:
        Whether the file has the bytes of the manifest again.
    """
    path = layout.root / piece.name
    num_rows = spec.shape[0] if piece.content == "head" else piece.num_rows
    data = path.read_bytes() if path.is_file() else b""
    rows = np.frombuffer(data, dtype=np.uint8)[: num_rows * piece.num_bytes // spec.chunk_rows]
    whole = np.full((spec.chunk_rows, *spec.shape[1:]), spec.fill, dtype=spec.disk_dtype)
    if rows.nbytes < num_rows * piece.num_bytes // spec.chunk_rows:
        return False
    whole[:num_rows] = rows.view(spec.disk_dtype).reshape(num_rows, *spec.shape[1:])
    if piece.content == "embeddings":
        with suppress(CacheError, pa.ArrowException, OSError):  # a damaged table does not say which rows failed
            table = RowTable(table_of(layout, piece.array)).columns("status", "reason")
            failed = ~good_rows(table, layout.shares_rows)[piece.first : piece.first + num_rows]
            whole[np.flatnonzero(failed)] = spec.fill
    if digest(whole.tobytes()) != piece.digest:
        return False
    write_bytes(path, whole.tobytes())
    return True


def settle_journal(layout: Layout, manifest: Manifest, pieces: list[Piece], specs: Mapping[str, ArraySpec]) -> bool:
    """Make the journal agree with the manifest: the next version takes its checksums from there.

    Returns:
        Whether it did not.
    """
    journal = Journal(layout)
    digests = {(record.array, record.shard): record.digest for record in journal}
    chunks = {journal_key(piece, manifest): piece for piece in pieces if piece.chunk >= 0}
    wrong = {key: piece for key, piece in chunks.items() if digests.get(key) != piece.digest}
    for key, piece in wrong.items():
        num_rows = piece.num_rows
        failures: tuple[tuple[int, str], ...] = ()
        if piece.content == "head":
            num_rows = specs[piece.array].shape[0]
        elif piece.content == "embeddings" and piece.array in manifest.arrays:
            rows = RowTable(table_of(layout, piece.array)).shard(piece.chunk, ["status", "reason"])
            states = list(zip(rows["status"], rows["reason"], strict=True))[:num_rows]
            failures = tuple((row, str(reason)) for row, (status, reason) in enumerate(states) if status == FAILED)
        journal.add(ShardRecord(*key, num_rows, piece.digest, failures), {})
    return bool(wrong)


def lost_rows(layout: Layout, manifest: Manifest) -> dict[str, dict[int, str]]:
    """For each array, rows that a repair of this cache gave up, and why; none of a table that cannot be read."""
    failed: dict[str, dict[int, str]] = {}
    with suppress(OSError, ValueError):
        failed = {array: dict(rows) for array, rows in read_own_failures(layout.own_failures).items()}
    for array, entry in manifest.arrays.items() if not layout.shares_rows else ():
        with suppress(CacheError, OSError, ValueError):
            columns = RowTable(table_of(layout, array), entry.rows).columns("status", "reason")
            bad = np.flatnonzero(~good_rows(columns, shared=False))
            reasons = columns["reason"].take(pa.array(bad)).to_pylist()
            failed[array] = dict(zip(bad.tolist(), map(str, reasons), strict=True))
    return {array: {row: why for row, why in rows.items() if why.startswith(LOST)} for array, rows in failed.items()}
