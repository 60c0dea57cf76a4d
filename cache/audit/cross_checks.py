"""What the files of a cache say about each other: tables and arrays, pairs and embeddings, indexes and rows.

Each check looks at files whose bytes are right; what is damaged is reported as such, once.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..disk.cosine import cosines, unit_rows
from ..disk.index import Index
from ..disk.layout import DIRECTIONS, IMAGES, SENTENCES, SIDES, Layout, table_of
from ..disk.mapped import MappedArray
from ..disk.row_tables import FAILED, RowTable, good_rows, read_own_failures
from ..errors import CacheError
from ..reader.feature_cache import EmbeddingSet
from ..reader.pixel_packs import pack_contents
from ..version.schema import ArrayCounts, IndexInfo, Manifest
from .findings import Finding, runs_of
from .inventory import num_targets
from .scan import Scanned

SAMPLE_ROWS = 1024
"""Rows of each direction whose pairs are computed again."""

SEARCHES = 256
"""Rows of each side that are looked for in its index."""

SAME_COSINE = 1e-5
"""Cosines of the same pair on two machines differ by less: float32, summed in another order."""

SELF_COSINE = {"IDMap2,Flat": 1 - 1e-5, "IVF": 1 - 2e-3}
"""A row finds itself, or its equal, in its index with at least this; lists hold float16, and their nearest row may be
another one that is as near."""


States = Callable[[], pa.Table]
"""Reads, or waits for, what `read_states` returns."""


def read_states(layout: Layout, manifest: Manifest, array: str) -> pa.Table:
    """Columns `row`, `status` and `reason` of an array's table."""
    return RowTable(table_of(layout, array), manifest.arrays[array].rows).columns("row", "status", "reason")


def check_content(
    layout: Layout, manifest: Manifest, scanned: Mapping[str, Scanned], states: Mapping[str, States]
) -> Iterator[Finding]:
    """Hold tables, arrays, pairs and indexes against each other.

    Args:
        layout: of the cache, or of a version of it that was decided.
        scanned: every file of the manifest, by name.
        states: arrays whose tables are being read already.
    """
    damaged = {name for name, found in scanned.items() if not found.sound}
    shared = layout.shares_rows
    try:
        own = {} if "failed.parquet" in damaged else read_own_failures(layout.find(layout.own_failures))
    except (pa.ArrowInvalid, OSError):
        own = {}
    usable: dict[str, NDArray[np.bool_]] = {}
    unexplained: set[str] = set()
    for array, entry in manifest.arrays.items():
        path = table_of(layout, array)
        if layout.name_of(path) in damaged:
            continue
        try:
            table = states[array]() if array in states else read_states(layout, manifest, array)
        except (CacheError, pa.ArrowException, OSError) as error:
            message = str(error).removeprefix(f"{path}: ").split(";")[0]
            yield Finding("table", layout.name_of(path), message, array=array, rows=((0, entry.rows - 1),))
            continue
        usable[array] = good_rows(table, shared)
        yield from _check_table(layout.name_of(path), table, usable[array], array, entry, own.get(array, {}))
        in_table = usable[array].copy()
        usable[array][list(own.get(array, {}))] = False
        # What failed for the cache that owns a shared table may be sound in this one.
        for finding in _check_rows(array, usable[array], in_table if shared else usable[array], shared, scanned):
            unexplained.add(array)
            yield finding
    for found in scanned.values():
        if found.sound and found.piece.content == "head" and (found.not_finite.size or found.zero.size):
            yield Finding("rows", found.piece.name, "class vectors that are not finite", array=found.piece.array)
    if IMAGES in usable:
        yield from _check_packs(layout, usable[IMAGES], scanned)
    if {IMAGES, SENTENCES} <= set(usable) - unexplained:
        yield from _check_retrieval(layout, manifest, usable, scanned, damaged)


def _check_table(
    name: str, table: pa.Table, good: NDArray[np.bool_], array: str, entry: ArrayCounts, own: Mapping[int, str]
) -> Iterator[Finding]:
    wrong = np.flatnonzero(np.asarray(table["row"]) != np.arange(len(good)))
    if wrong.size:
        yield Finding("table", name, "rows that are not numbered by their place", array=array, rows=runs_of(wrong))
    bad = np.flatnonzero(~good)
    unknown = bad[~np.asarray(pc.equal(table["status"].take(pa.array(bad)), FAILED))] if bad.size else bad
    if unknown.size:
        yield Finding("table", name, "rows with an unknown status", array=array, rows=runs_of(unknown))
    failed = np.union1d(bad, np.array(sorted(own), dtype=np.int64))
    if len(failed) != entry.failed:
        message = f"{len(failed):,} rows failed, the manifest counts {entry.failed:,}"
        yield Finding("table", name, message, array=array, rows=runs_of(failed))


def _check_rows(
    array: str,
    usable: NDArray[np.bool_],
    in_table: NDArray[np.bool_],
    shared: bool,
    scanned: Mapping[str, Scanned],
) -> Iterator[Finding]:
    """Rows without an embedding that the table calls good, and the other way round."""
    for found in scanned.values():
        piece = found.piece
        if not found.sound or piece.content != "embeddings" or piece.array != array:
            continue
        for rows, what in ((found.not_finite, "NaN or infinity in rows"), (found.zero, "zero in rows")):
            wrong = rows[usable[rows]]
            if wrong.size:
                yield Finding("rows", piece.name, f"{what} that are not failed", array=array, rows=runs_of(wrong))
        failed = piece.first + np.flatnonzero(~usable[piece.first : piece.first + piece.num_rows])
        if shared:
            failed = failed[in_table[failed]]
        wrong = np.setdiff1d(failed, found.not_finite)
        if wrong.size:
            message = "numbers in rows that the table calls failed; wanted NaN"
            yield Finding("rows", piece.name, message, array=array, rows=runs_of(wrong))


def _check_packs(layout: Layout, usable: NDArray[np.bool_], scanned: Mapping[str, Scanned]) -> Iterator[Finding]:
    """Tables of packs against their JPEGs and the rows; what is left over of a row that failed later is no harm."""
    for found in scanned.values():
        piece = found.piece
        if piece.content != "pixels" or not found.sound:
            continue
        try:
            offsets, begins = pack_contents(layout.find(layout.root / piece.name), piece.shard_rows)
        except CacheError as error:
            message = str(error).split(": ")[-1].split(";")[0]
            yield Finding("pixels", piece.name, message, array=piece.array, rows=piece.runs)
            continue
        there, good = np.diff(offsets)[: piece.num_rows] > 0, usable[piece.first : piece.first + piece.num_rows]
        for wrong, what in ((good & ~there, "rows without pixels that are not failed"), (~begins, "rows of no JPEG")):
            rows = piece.first + np.flatnonzero(wrong[: piece.num_rows])
            if rows.size:
                yield Finding("pixels", piece.name, what, array=piece.array, rows=runs_of(rows))


def _check_retrieval(
    layout: Layout,
    manifest: Manifest,
    usable: Mapping[str, NDArray[np.bool_]],
    scanned: Mapping[str, Scanned],
    damaged: set[str],
) -> Iterator[Finding]:
    """Indexes and pairs against the embeddings, where those are whole."""
    for found in scanned.values():
        if found.sound and found.piece.content == "ids":
            low, high = found.ids
            limit = num_targets(found.piece.array, manifest)
            if low < -1 or high >= limit:
                message = f"ids from {low} to {high}; wanted -1 to {limit - 1}"
                yield Finding("pairs", found.piece.name, message, array=found.piece.array, rows=found.piece.runs)
    if not manifest.pairs or any(name.startswith("teacher.zarr/") for name in damaged):
        return
    sides = {
        side: EmbeddingSet.open(layout, array, table_of(layout, array), manifest.arrays[array].rows)
        for side, array in SIDES.items()
    }
    for side, info in manifest.index.items():
        if info.file not in damaged:
            yield from _check_index(layout, info, side, sides[side], scanned)
    store, under = (where.root / manifest.pairs.store for where in (layout, layout.base))
    if any(name.startswith(f"{store.name}/") for name in damaged):
        return
    for direction, (asking, answering) in DIRECTIONS.items():
        try:
            ids, scores = (MappedArray.open(store, f"{direction}/{part}", under=under) for part in ("ids", "scores"))
        except CacheError as error:
            yield Finding("pairs", f"{store.name}/{direction}", str(error))
            continue
        wrong = _wrong_pairs(ids, scores, sides[asking], sides[answering])
        if wrong is None:
            message = f"{len(ids)} rows, wanted {len(sides[asking])}"
            yield Finding("pairs", f"{store.name}/{direction}", message, array=direction)
        elif wrong.size:
            message = "pairs that are not those of the embeddings (of the rows that were sampled)"
            yield Finding("pairs", f"{store.name}/{direction}", message, array=direction, rows=runs_of(wrong))


def _wrong_pairs(
    ids: MappedArray, scores: MappedArray, asking: EmbeddingSet, answering: EmbeddingSet
) -> NDArray[np.int64] | None:
    """Sampled rows whose pairs name rows that cannot be paired, or have scores that are not their cosines."""
    num_rows, num_targets = len(asking), len(answering)
    if len(ids) != num_rows or ids.shape != scores.shape:
        return None
    rows = np.sort(np.random.default_rng(0).choice(num_rows, min(num_rows, SAMPLE_ROWS), replace=False))
    found, given = ids[rows], scores[rows]
    wrong = np.asarray(((found < -1) | (found >= num_targets)).any(axis=1))
    found = np.where(wrong[:, None], -1, found)
    pairable: NDArray[np.bool_] = np.zeros(num_targets + 1, dtype=np.bool_)  # the last one is what -1 looks up
    pairable[answering.usable] = True
    unit, _ = unit_rows(asking.embeddings[rows])
    exact = cosines(unit, found, answering.embeddings)
    none = found == -1
    wrong |= (~none & ~pairable[found]).any(axis=1) | (none != np.isnan(given)).any(axis=1)
    wrong |= (np.abs(exact - given) > SAME_COSINE).any(axis=1)  # False where there is none
    can_ask = np.zeros(num_rows, dtype=np.bool_)
    can_ask[asking.usable] = True
    wrong |= can_ask[rows] == none.all(axis=1) if pairable.any() else ~none.all(axis=1)
    return rows[wrong]


def _check_index(
    layout: Layout, info: IndexInfo, side: str, rows: EmbeddingSet, scanned: Mapping[str, Scanned]
) -> Iterator[Finding]:
    """An index is over the usable rows, and these rows find themselves in it."""
    name = info.file
    try:
        index = Index.load(layout.find(layout.root / name), rows.embeddings.shape[1], len(rows))
        there = index.rows()
        zero = [found.zero for found in scanned.values() if found.piece.array == SIDES[side] and found.zero.size]
        wanted = np.setdiff1d(rows.usable, np.concatenate(zero)) if zero else rows.usable
        if not np.array_equal(there, wanted):
            odd = np.setxor1d(there, wanted)
            message = f"over {len(there):,} rows, wanted the {len(wanted):,} usable ones"
            yield Finding("index", name, message, array=SIDES[side], rows=runs_of(odd))
            return
        sample = np.sort(np.random.default_rng(0).choice(wanted, min(len(wanted), SEARCHES), replace=False))
        queries = rows.embeddings[sample]
        ids, scores = index.search(queries, 1)
        exact = cosines(unit_rows(queries)[0], ids, rows.embeddings)
    except CacheError as error:
        yield Finding("index", name, str(error).split("; ")[0], array=SIDES[side])
        return
    least = SELF_COSINE.get(info.type, SELF_COSINE["IVF"])
    lost = sample[~(np.minimum(scores, exact)[:, 0] >= least)]
    if lost.size:
        message = f"{len(lost)} of {len(sample)} sampled rows do not find themselves: an index of other embeddings"
        yield Finding("index", name, message, array=SIDES[side], rows=runs_of(lost))
