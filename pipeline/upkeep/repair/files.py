"""Mending what is no embedding: strangers, the manifest, tables, metadata, the text tower, indexes and pairs."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ....cache.audit.inventory import Piece
from ....cache.audit.verify import journal_key
from ....cache.disk.durable import PARTIAL, digest, write_bytes
from ....cache.disk.layout import IMAGES, SENTENCES, Layout, table_of
from ....cache.disk.row_tables import FAILED, RowTable, good_rows, mark_failures
from ....cache.errors import CacheError, InputError
from ....cache.version.journal import Journal, ShardRecord
from ....cache.version.manifest import (
    digest_lines,
    file_entry,
    read_document,
    refuse_newer,
    trusted_copy,
    vouched_digests,
)
from ....cache.version.spares import put_back, spare_manifests
from ....cache.version.versions import move_file
from ....stages.settings.cache import PairsSettings
from ...config.remembered import ConfigChoice, config_of
from ...stage_one.finish import files_of, finish_cache
from ...stage_one.inputs import freeze_inputs, transductive_sets_or_recorded
from ...stage_one.pseudo_pairs import write_pairs

if TYPE_CHECKING:
    from ....cache.disk.arrays import ArraySpec
    from ....stages.models.open_clip_teacher import Teacher
    from ...config.load import Config

REMOVED = Path("log", "removed")


def move_away(layout: Layout, name: str) -> str:
    """Move a file that does not belong to the cache, or is beyond mending, into the log; returns where to."""
    target = layout.root / REMOVED / name
    number = 1
    while target.exists():
        number += 1
        target = layout.root / REMOVED / f"{name}.{number}"
    source = layout.root / name
    if name.endswith(PARTIAL):  # half a file is of no use to anybody
        source.unlink(missing_ok=True)
        return "removed"
    move_file(source, target)
    for folder in source.parents:
        if folder == layout.root or any(folder.iterdir()):
            break
        folder.rmdir()
    return f"moved to {target.relative_to(layout.root).as_posix()}"


def restore_manifest(layout: Layout, config_path: ConfigChoice | Path | None) -> dict[str, str]:
    """Put a damaged manifest back, or the file that vouches for it.

    Returns:
        The files that were mended, and how.

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
    """The end of stage one once more, over the files that are there."""
    if list(layout.root.glob("plan-*.json")):
        raise CacheError(
            f"{layout.manifest}: damaged, and so is its spare copy; a cache that has grown cannot be described from "
            "its files alone: restore manifest.json from a backup"
        )
    config = config_of(layout, config_path)
    plan = read_plan_alone(layout)
    for path in (layout.manifest, layout.manifest_digest):
        if path.exists():
            move_away(layout, path.name)
    finish_cache(config, layout, plan, transductive_sets_or_recorded(config, layout))
    return {layout.manifest.name: "made again from the plan, the journal and the files; earlier masks are not in it"}


def read_plan_alone(layout: Layout) -> dict[str, Any]:
    """plan.json where no manifest says which plan is in force.

    Raises:
        CacheError: if it is missing or damaged too.
    """
    if not layout.plan.exists():
        raise CacheError(f"{layout.plan}: missing, and so is the manifest; restore one of them from a backup")
    return read_document(layout.plan)


def remake_tables(
    config: "Config",
    layout: Layout,
    mend: Layout,
    plan: Mapping[str, Any],
    manifest: Mapping[str, Any],
    names: set[str],
) -> dict[str, str]:
    """List the sources again, where a row table and its spare copy are both damaged.

    Returns:
        The tables that were mended, and how. One whose bytes differ (files were copied and have other times, say) but
        whose rows are the same waits in `mend/`.
    """
    if "grown" in plan or "rows_of" in plan:
        return {}
    scratch = Layout(mend.root / "sources")
    try:
        inputs = freeze_inputs(config, scratch)
    except (InputError, CacheError):
        return {}
    done = {}
    sides = {IMAGES: (layout.image_rows, "images"), SENTENCES: (layout.sentence_rows, "sentences")}
    wanted = {array: (path, plan["inputs"][key], inputs[key]) for array, (path, key) in sides.items()}
    for name, item in plan["inputs"]["evaluate"].items():
        array = f"evaluate/{name}/images/embedding"
        wanted[array] = (layout.evaluate_rows(name), item, inputs["evaluate"].get(name))
    journal = Journal(layout)
    for array, (path, there, found) in wanted.items():
        name = layout.name_of(path)
        if name not in names or there != found:
            continue
        made = scratch.root / name
        shard_rows = int(plan["shard_rows"])
        failures = {
            record.shard * shard_rows + row: reason for record in journal.of(array) for row, reason in record.failures
        }
        mark_failures(made, failures, shard_rows)
        if file_entry(made) == manifest["files"].get(name):
            move_file(made, layout.root / name)
            done[name] = "listed again from the sources: the same bytes"
        else:
            move_file(made, mend.root / name)
            done[name] = "listed again from the sources: the same rows, other sizes or times"
    return done


def refill(layout: Layout, piece: Piece, spec: "ArraySpec") -> bool:
    """Put a chunk file back whose damage is in nothing but what is known anyway, so that no row of it is given up.

    Known are its length, its padding, and the NaN of rows that failed.

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
        with suppress(CacheError, pa.ArrowException, OSError):  # a damaged table knows nothing
            table = RowTable(table_of(layout, piece.array)).columns("status", "reason")
            failed = ~good_rows(table, layout.shares_rows)[piece.first : piece.first + num_rows]
            whole[np.flatnonzero(failed)] = spec.fill
    if digest(whole.tobytes()) != piece.digest:
        return False
    write_bytes(path, whole.tobytes())
    return True


def restore_text_tower(layout: Layout, teacher: "Teacher") -> None:
    """Save the teacher's text tower again."""
    from ....stages.models.frozen_text_tower import save_text_tower

    save_text_tower(teacher, layout.text_tower)


def remake_retrieval(layout: Layout, manifest: Mapping[str, Any], bad: set[str], pieces: list[Piece]) -> dict[str, Any]:
    """Build damaged indexes and pairs again, under the names that they have.

    Args:
        bad: files, or arrays of pairs as a whole.

    Returns:
        `index`, `pairs` and `files` of the manifest as they are now.
    """
    pairs, journal = manifest["pairs"], Journal(layout)
    for info in manifest["index"].values():
        beside = Path(info["file"]).with_suffix(".json").as_posix()
        if info["file"] in bad or beside in bad:
            (layout.root / beside).unlink(missing_ok=True)
    for piece in pieces:
        if piece.content not in ("ids", "scores"):
            continue
        direction = piece.array.split("/")[0]
        array, chunk = journal_key(piece, pairs)
        if piece.name in bad or f"{pairs['store']}/{direction}" in bad:
            journal.forget(f"{array.removesuffix(piece.content)}scores", chunk)
    settings = PairsSettings.model_validate(manifest["pairs_settings"])
    version = int(str(pairs["store"]).removesuffix(".zarr").partition("-")[2] or 1)
    retrieved = write_pairs(layout, settings, journal, version)
    return {**retrieved, "files": dict(files_of(layout, journal, [], [], retrieved))}


def settle_journal(
    layout: Layout, manifest: Mapping[str, Any], pieces: list[Piece], specs: "Mapping[str, ArraySpec]"
) -> bool:
    """Make the journal say what the manifest says: the next version takes its checksums from there."""
    journal = Journal(layout)
    records = {(record.array, record.shard): record for record in journal}
    changed = False
    for piece in pieces:
        if piece.chunk < 0:
            continue
        key = journal_key(piece, manifest["pairs"])
        record = records.get(key)
        if record is not None and record.digest == piece.digest:
            continue
        failures: tuple[tuple[int, str], ...] = ()
        if piece.content == "embeddings" and piece.array in manifest["arrays"]:
            failures = _failures(layout, piece)
        num_rows = piece.num_rows if piece.content != "head" else specs[piece.array].shape[0]
        journal.add(ShardRecord(*key, num_rows, piece.digest, failures), {})
        changed = True
    return changed


def _failures(layout: Layout, piece: Piece) -> tuple[tuple[int, str], ...]:
    rows = RowTable(table_of(layout, piece.array)).shard(piece.chunk, ["status", "reason"])
    both = list(zip(rows["status"], rows["reason"], strict=True))[: piece.num_rows]
    return tuple((row, str(reason)) for row, (status, reason) in enumerate(both) if status == FAILED)
