"""The next version of a finished cache in which rows that had failed have an embedding.

It is made in `next/` (cache/version/versions.py): only these rows change, every other row keeps its bytes, and the
version in force stays whole for its readers.
"""

from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.audit.failures import arrays_of, set_of
from ...cache.disk.arrays import ArraySpec, chunk_path, declare_arrays, first_rows, write_chunk
from ...cache.disk.durable import file_digest
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, table_of
from ...cache.disk.row_tables import RowTable, read_own_failures, revise_rows, write_own_failures
from ...cache.errors import CacheError, InputError
from ...cache.reader.pixel_packs import PixelPacks, pack_path, read_offsets, writing_pack
from ...cache.version.journal import Journal, ShardRecord
from ...cache.version.manifest import file_entry
from ...cache.version.plan_file import require_same
from ...cache.version.schema import FileEntry, Manifest, Origin, Plan
from ...cache.version.versions import discard_change, put_in_force
from ...stages.images.crops import Crops
from ...stages.images.decode import ImageError, decode_image
from ...stages.inputs.image_source import row_keys
from ...stages.settings.cache import PairsSettings
from ...stages.settings.models import TeacherSettings
from ..progress import say, show_counts
from .embed_shards import teacher_at_hand
from .finish import count_failures, files_of
from .kept_packs import pack_task
from .planned import planned_specs
from .pseudo_pairs import write_pairs
from .sources import Sources

if TYPE_CHECKING:
    from ...stages.models.teacher import Teacher

Again = Mapping[int, Mapping[str, Any]]
"""Rows of an array to embed again, and what their row table is to say of them then."""


def make_retried_version(
    settings: TeacherSettings,
    layout: Layout,
    plan: Plan,
    manifest: Manifest,
    sources: Sources,
    again: Mapping[str, Again],
) -> None:
    """Embed failed rows of a finished cache again, and put the version that has them into force.

    Args:
        again: for each array the rows to try.

    Raises:
        CacheError: if the teacher is another one, or a file that is to be continued is damaged.
    """
    num_rows = sum(map(len, again.values()))
    staged = layout.next
    mended: dict[str, Again] = {}
    files: dict[str, FileEntry] = {}
    origins = {array: dict(chunks) for array, chunks in manifest.origins.items()}
    with teacher_at_hand(settings) as teacher:
        found = teacher.identity()
        libraries = found.pop("libraries")
        made_with = plan.teacher.to_dict()
        require_same(layout.root, {"teacher": {key: made_with.get(key) for key in found}}, {"teacher": found})
        for array, rows in again.items():
            spec = planned_specs(plan)[array]
            good: dict[int, Mapping[str, Any]] = {}
            for shard in sorted({row // plan.shard_rows for row in rows}):
                of_shard = [row for row in sorted(rows) if row // plan.shard_rows == shard]
                embedded = _embed(teacher, settings, layout, plan, sources, array, spec, of_shard)
                if not embedded:
                    continue
                good |= {row: rows[row] for row in embedded}
                name = layout.name_of(chunk_path(layout.teacher_zarr, array, shard, len(spec.shape)))
                files[name] = _write_shard(layout, plan, manifest, array, spec, shard, embedded)
                origins.setdefault(array, {})[str(shard)] = Origin(by="retry-failed", libraries=libraries)
                if array == IMAGES and manifest.pixels:
                    files |= _write_pack(layout, plan, manifest, sources, shard, list(embedded))
            if good:
                mended[array] = good
    say(f"{sum(map(len, mended.values())):,} of {num_rows:,} have an embedding now")
    if not mended:
        discard_change(layout)
        return
    files |= _write_states(layout, plan, mended)
    changes = _paired(layout, plan, manifest, files) if {IMAGES, SENTENCES} & mended.keys() else {}
    own = read_own_failures(staged.find(staged.own_failures))
    counts = {
        array: count_failures(RowTable(table_of(staged, array), rows), own.get(array, {}), layout.shares_rows)
        for array, rows in arrays_of(plan).items()
    }
    for array, entry in counts.items():
        if entry.failed:
            say(f"{set_of(array)}: {entry.failed:,} rows have no embedding: {show_counts(entry.reasons)}")
    changes = {"files": manifest.files | files, **changes, "arrays": counts, "origins": origins}
    put_in_force(staged, manifest.replace(**changes, version=manifest.version + 1))


def _embed(
    teacher: "Teacher",
    settings: TeacherSettings,
    layout: Layout,
    plan: Plan,
    sources: Sources,
    array: str,
    spec: ArraySpec,
    rows: list[int],
) -> dict[int, np.ndarray]:
    """Embed some rows of one shard, each in the batch and the place that it has in a whole run.

    Returns:
        The rows that have an embedding now, ascending: (D,) or (views, D) float16.
    """
    from ...stages.embed.image_rows import RowCrops, embed_image_shard
    from ...stages.embed.sentence_rows import embed_sentence_shard

    batch, shard_rows = settings.batch_size, plan.shard_rows
    first = rows[0] // shard_rows * shard_rows
    starts = sorted({first + (row - first) // batch * batch for row in rows})
    places = [row for start in starts for row in range(start, start + batch)]
    table = RowTable(table_of(layout, array))
    at = {row: i for i, row in enumerate(rows)}
    if array == SENTENCES:
        texts = table.take(rows, "text")
        given = [texts[at[row]] if row in at else None for row in places]
        result = embed_sentence_shard(teacher, given, batch, Lock())
    else:
        source = sources.images_of(array)
        assert source is not None
        keys = row_keys(source, table)(np.array(rows, dtype=np.int64))
        given = [keys[at[row]] if row in at else None for row in places]
        crops = Crops.read(plan.views) if array == IMAGES else None
        of_rows = RowCrops(crops, np.array(places, dtype=np.int64)) if crops else None
        result = embed_image_shard(teacher, source, given, batch, settings.workers, Lock(), None, of_rows)
    failed = {places[place] for place, _ in result.failures + result.absent}
    return {row: result.embeddings[place] for place, row in enumerate(places) if row in at and row not in failed}


def _write_shard(
    layout: Layout,
    plan: Plan,
    manifest: Manifest,
    array: str,
    spec: ArraySpec,
    shard: int,
    embedded: Mapping[int, np.ndarray],
) -> FileEntry:
    """Write a shard of the next version: as it is, with some more rows."""
    staged, first, num_rows = layout.next, shard * plan.shard_rows, spec.rows_of(shard)
    name = layout.name_of(chunk_path(layout.teacher_zarr, array, shard, len(spec.shape)))
    block = np.array(first_rows(layout.teacher_zarr, array, spec, shard, num_rows, manifest.files[name].digest))
    for row, embedding in embedded.items():
        block[row - first] = embedding
    written = write_chunk(staged.teacher_zarr, array, spec, shard, block)
    before = {record.shard: record.failures for record in Journal(layout).of(array)}.get(shard, ())
    failures = tuple((row, reason) for row, reason in before if first + row not in embedded)
    Journal(staged).add(ShardRecord(array, shard, num_rows, written, failures), {})
    return FileEntry(bytes=spec.chunk_bytes, digest=written)


def _write_pack(
    layout: Layout, plan: Plan, manifest: Manifest, sources: Sources, shard: int, rows: list[int]
) -> dict[str, FileEntry]:
    """Write the pack of a shard of the next version: every picture that it has, and those of more rows."""
    from ...stages.embed.pack_pixels import make_small

    staged, kept = layout.next, manifest.pixels
    assert kept is not None
    first, spec = shard * plan.shard_rows, planned_specs(plan)[IMAGES]
    packs = PixelPacks(layout.root / kept.folder, kept.setting, spec.shape[0], kept.shard_rows)
    name = layout.name_of(packs.path(first))
    if file_digest(packs.path(first)) != manifest.files[name].digest:
        raise CacheError(f"{packs.path(first)}: damaged; run `dimefm cache repair {layout.root}` first")
    sizes = np.diff(read_offsets(packs.path(first), kept.shard_rows))
    task, path = pack_task(layout, kept.setting, shard, plan), pack_path(staged.root / kept.folder, shard)
    keys = dict(zip(rows, row_keys(sources.images, RowTable(layout.image_rows))(np.array(rows)), strict=True))
    with writing_pack(path, kept.shard_rows) as writer:
        for row in range(first, first + spec.rows_of(shard)):
            small = packs.read(row) if sizes[row - first] else b""
            if row in keys:
                try:
                    data = sources.images.read(keys[row])
                    small = make_small(data, decode_image(data), task.side, note_size=task.note_size)
                except ImageError as error:
                    where = sources.images.locate(keys[row])
                    raise InputError(f"{where}: changed while it was embedded ({error}); run this again") from error
            writer.add(small)
    Journal(staged).add(ShardRecord(task.array, shard, spec.rows_of(shard), writer.digest), {})
    return {staged.name_of(path): file_entry(path)}


def _write_states(layout: Layout, plan: Plan, mended: Mapping[str, Again]) -> dict[str, FileEntry]:
    """Write tables in which these rows are good; of shared tables this cache's own list of failures."""
    staged, paths = layout.next, []
    if plan.rows_of:
        own = read_own_failures(layout.own_failures)
        left = {
            array: {row: why for row, why in rows.items() if row not in mended.get(array, {})}
            for array, rows in own.items()
        }
        write_own_failures(staged.own_failures, left)
        paths = [staged.own_failures]
    else:
        for array, rows in mended.items():
            table = table_of(layout, array)
            paths.append(staged.root / layout.name_of(table))
            revise_rows(table, paths[-1], rows, plan.shard_rows)
    return {staged.name_of(path): file_entry(path) for path in paths}


def _paired(layout: Layout, plan: Plan, manifest: Manifest, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """Indexes and pairs of the next version, and its files with those instead of the old ones."""
    pairs, staged = manifest.pairs, layout.next
    if pairs is None or manifest.pairs_settings is None:
        return {}
    declare_arrays(staged.teacher_zarr, planned_specs(plan))
    journal = Journal(staged)
    settings = PairsSettings.model_validate(manifest.pairs_settings)
    retrieved = write_pairs(staged, settings, journal, manifest.version + 1)
    old = (f"{pairs.store}/", "index/")
    kept = {name: entry for name, entry in {**manifest.files, **files}.items() if not name.startswith(old)}
    made = dict(files_of(staged, journal, [], [], retrieved))
    return {"index": retrieved.index, "pairs": retrieved.pairs, "files": kept | made}
