"""Indexes over both sides of a cache, and the pseudo-pairs between them, shard by shard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.arrays import ArraySpec, chunk_data, chunk_path, declare_arrays, first_rows, read_spec
from ...cache.disk.cosine import nearest_rows, unit_rows
from ...cache.disk.durable import digest, file_digest, share_file, to_json, write_bytes
from ...cache.disk.index import MOST_PROBED
from ...cache.disk.index_size import build_bytes, index_bytes
from ...cache.disk.layout import DIRECTIONS, SIDES, Layout, table_of
from ...cache.errors import CacheError
from ...cache.reader.feature_cache import EmbeddingSet
from ...cache.version.journal import Journal, ShardRecord
from ...cache.version.schema import FileEntry, IndexInfo, Manifest, PairStore
from ...stages.retrieve.pairs import nearest_targets
from ...stages.settings.cache import PairsSettings
from ..progress import bar
from .side_indexes import Earlier, SideIndex, side_index

NEIGHBOUR_BYTES = 8 + 4
"""An int64 id and a float32 score."""


PROCESS_BYTES = 195_000_000
"""The interpreter and its libraries, without torch."""
BYTES_PER_ROW = 25
"""Of row tables, while indexes are made."""


@dataclass(frozen=True)
class Retrieval:
    """Indexes and pairs, as the manifest has them; nothing where retrieval is off."""

    index: dict[str, IndexInfo] = field(default_factory=dict)
    pairs: PairStore | None = None


def retrieval_bytes(sides: Sequence[tuple[int, ...]], settings: PairsSettings) -> int:
    """About what indexes and pairs take on disk; `sides` are the (rows, width) of images and sentences."""
    if not settings.k:
        return 0
    return sum(index_bytes(rows, width, settings.index) + rows * settings.k * NEIGHBOUR_BYTES for rows, width in sides)


def retrieval_memory(sides: Sequence[tuple[int, ...]], settings: PairsSettings) -> int:
    """About the most anonymous memory (RssAnon) of the process while it makes indexes and pairs, its own included.

    One index at a time is in memory; both are read through memory maps afterwards, whose pages the system may drop.
    """
    if not settings.k or not sides:
        return 0
    tables = BYTES_PER_ROW * sum(rows for rows, _ in sides)
    return PROCESS_BYTES + tables + max(build_bytes(rows, width, settings.index) for rows, width in sides)


def pairs_document(settings: PairsSettings) -> dict[str, Any] | None:
    """The settings that decide what the pairs are; None when retrieval is off."""
    return settings.model_dump(mode="json") if settings.k else None


def write_pairs(
    layout: Layout, settings: PairsSettings, journal: Journal, version: int, before: Manifest | None = None
) -> Retrieval:
    """Build what is missing of the indexes and pairs of one version of the cache.

    Args:
        layout: the cache, or a version of it in the making.
        before: the version in force, of the same settings, where its indexes and pairs can be gone on from: rows that
            are new are searched for both ways and merged, whatever their place, and files that come out the same are
            shared. Where rows are gone or have other embeddings, everything is made anew.
    """
    sides = {name: EmbeddingSet.open(layout, array, table_of(layout, array)) for name, array in SIDES.items()}
    earlier = Earlier.find(layout, before, sides) if before and before.pairs else None
    indexes, infos = {}, {}
    for name in sides:
        indexes[name] = side_index(layout, name, sides, settings, version, earlier)
        infos[name] = IndexInfo(file=f"index/{indexes[name].path.name}", **indexes[name].info)
    store, specs = layout.pairs_zarr(version), {}
    for direction, (name, _) in DIRECTIONS.items():
        rows, chunk = sides[name].embeddings.spec.shape[0], sides[name].embeddings.spec.chunk_rows
        specs[f"{direction}/ids"] = ArraySpec((rows, settings.k), "int64", chunk)
        specs[f"{direction}/scores"] = ArraySpec((rows, settings.k), "float32", chunk)
    declare_arrays(store, specs)
    # Chunks of other settings may lie there under the same names: the settings are part of what the journal counts.
    counted = f"{store.name}[{digest(to_json(settings.model_dump(mode='json')))[:8]}]/"
    for direction, (name, other) in DIRECTIONS.items():
        pairs = EarlierPairs.of(earlier, direction, indexes[other], specs) if earlier else None
        writer = _PairsWriter(store, journal, counted, direction, specs, pairs)
        writer.write_missing(sides[name], indexes[other])
    return Retrieval(infos, PairStore(store=store.name, k=settings.k, counted=counted))


@dataclass(frozen=True)
class EarlierPairs:
    """The pairs of one direction in the version in force.

    Attributes:
        store, files: their group, and the checksums of its files by name.
        num_rows: rows that they have.
        new_queries: (rows,) bool, rows of the version in the making that are to be searched for.
        new_targets: rows that may be nearer than those that were found.
    """

    store: Path
    files: Mapping[str, FileEntry]
    num_rows: int
    new_queries: NDArray[np.bool_]
    new_targets: NDArray[np.int64]

    @classmethod
    def of(
        cls, earlier: Earlier, direction: str, answering: SideIndex, specs: Mapping[str, ArraySpec]
    ) -> "EarlierPairs | None":
        """What can be gone on from; None where all rows are to be searched for."""
        pairs, spec = earlier.manifest.pairs, specs[f"{direction}/ids"]
        assert pairs is not None
        info, store = answering.info, earlier.layout.root / pairs.store
        try:
            there = read_spec(store, f"{direction}/ids")
        except CacheError:  # damaged: all pairs are found anew
            return None
        if not answering.goes_on or (there.chunk_rows, there.shape[1]) != (spec.chunk_rows, spec.shape[1]):
            return None
        probed = info["rows"] * info["nprobe"] / info["nlist"] if info.get("nlist") else np.inf
        if len(answering.new_rows) > MOST_PROBED * probed:  # to search for all rows is less work
            return None
        asking = DIRECTIONS[direction][0]
        is_new = np.ones(spec.shape[0], dtype=np.bool_)
        is_new[: there.shape[0]] = False
        is_new[earlier.new_rows[asking]] = True
        return cls(store, earlier.manifest.files, there.shape[0], is_new, answering.new_rows)

    def block(self, name: str, spec: ArraySpec, shard: int) -> NDArray[Any]:
        """The rows of a shard, as many as there are.

        Raises:
            CacheError: if the file is damaged.
        """
        num_rows = min(spec.chunk_rows, self.num_rows - shard * spec.chunk_rows)
        if num_rows <= 0:
            return np.empty((0, *spec.shape[1:]), dtype=spec.disk_dtype)
        return first_rows(self.store, name, spec, shard, num_rows, self.files[self._file(name, shard)].digest)

    def same_file(self, name: str, shard: int, wanted: str) -> Path | None:
        """The file of a shard where it has these bytes."""
        entry = self.files.get(self._file(name, shard))
        return chunk_path(self.store, name, shard) if entry and entry.digest == wanted else None

    def _file(self, name: str, shard: int) -> str:
        return chunk_path(Path(self.store.name), name, shard).as_posix()


@dataclass(frozen=True)
class _PairsWriter:
    """The pairs of one direction, on disk.

    Attributes:
        counted: what the journal calls the store.
        specs: of all arrays of the store.
        earlier: pairs to go on from.
    """

    store: Path
    journal: Journal
    counted: str
    direction: str
    specs: dict[str, ArraySpec]
    earlier: EarlierPairs | None = None

    def write_missing(self, queries: EmbeddingSet, index: SideIndex) -> None:
        """Retrieve for every shard of queries that the journal does not count."""
        ids_name, scores_name = f"{self.direction}/ids", f"{self.direction}/scores"
        spec, counted = self.specs[ids_name], self.counted + scores_name
        missing = [
            shard for shard in range(spec.num_chunks) if not self.journal.has(counted, shard, spec.rows_of(shard))
        ]
        if not missing:
            return
        done = spec.shape[0] - sum(map(spec.rows_of, missing))
        with bar(self.direction.replace("_", " "), spec.shape[0], "rows", done) as shown:
            for shard in missing:
                ids, scores = self._pairs_of(shard, queries, index)
                for name, block in ((ids_name, ids), (scores_name, scores)):  # scores last: they count the shard
                    written = self._write(name, shard, block)
                    self.journal.add(ShardRecord(self.counted + name, shard, len(block), written), {})
                done += len(ids)
                shown.update(done)

    def _pairs_of(
        self, shard: int, queries: EmbeddingSet, index: SideIndex
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ids_name, scores_name = f"{self.direction}/ids", f"{self.direction}/scores"
        spec, earlier, targets = self.specs[ids_name], self.earlier, index.targets.embeddings
        k, start = spec.shape[1], shard * spec.chunk_rows
        block = queries.embeddings[start : start + spec.rows_of(shard)]
        if earlier is None:
            return nearest_targets(block, targets, index.loaded, k)
        try:
            old_ids, old_scores = (earlier.block(name, self.specs[name], shard) for name in (ids_name, scores_name))
        except CacheError:  # damaged: found anew
            return nearest_targets(block, targets, index.loaded, k)
        ids = np.full((len(block), k), -1, dtype=np.int64)
        scores = np.full((len(block), k), np.nan, dtype=np.float32)
        ids[: len(old_ids)], scores[: len(old_scores)] = old_ids, old_scores
        is_new = earlier.new_queries[start : start + len(block)]
        new = np.flatnonzero(is_new)
        if len(new):
            ids[new], scores[new] = nearest_targets(block[new], targets, index.loaded, k)
        if len(earlier.new_targets):
            unit, good = unit_rows(block)
            old = np.flatnonzero(good & ~is_new)
            best = ids[old], scores[old]
            ids[old], scores[old] = nearest_rows(unit[old], targets, earlier.new_targets, k, best)
        return ids, scores

    def _write(self, name: str, shard: int, block: NDArray[Any]) -> str:
        """Write a chunk, or share that of the version in force where it is the same; returns its digest."""
        data, path = chunk_data(name, self.specs[name], block), chunk_path(self.store, name, shard)
        written = digest(data)
        same = self.earlier.same_file(name, shard, written) if self.earlier else None
        if same and _holds(same, written):
            share_file(same, path)
        else:
            write_bytes(path, data)
        return written


def _holds(path: Path, wanted: str) -> bool:
    """Whether a file has the bytes that the manifest says: it may have been damaged since, or be gone."""
    try:
        return file_digest(path) == wanted
    except OSError:
        return False
