"""Indexes over both sides of a cache, and the pseudo-pairs between them, shard by shard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from ...cache.disk.durable import digest, to_json, write_json
from ...cache.disk.index import Index, index_bytes
from ...cache.disk.layout import DIRECTIONS, SIDES, Layout, table_of
from ...cache.reader.feature_cache import EmbeddingSet
from ...cache.version.journal import Journal, ShardRecord
from ...cache.version.schema import IndexInfo, PairStore
from ...stages.retrieve.pairs import build_side, retrieve
from ...stages.settings.cache import PairsSettings
from ..progress import bar, say

NEIGHBOUR_BYTES = 8 + 4
"""An int64 id and a float32 score."""


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


def pairs_document(settings: PairsSettings) -> dict[str, Any] | None:
    """The settings that decide what the pairs are; None when retrieval is off."""
    return settings.model_dump(mode="json") if settings.k else None


def write_pairs(layout: Layout, settings: PairsSettings, journal: Journal, version: int) -> Retrieval:
    """Build what is missing of the indexes and pairs of one version of the cache.

    Args:
        layout: the cache, or a version of it in the making.
    """
    sides = {name: EmbeddingSet.open(layout, array, table_of(layout, array)) for name, array in SIDES.items()}
    images, sentences = sides["images"], sides["sentences"]
    queries = {"images": sentences, "sentences": images}
    indexes, infos = {}, {}
    for name, targets in sides.items():
        path = layout.index(name, version)
        indexes[name], info = _build_or_load(path, name, targets, queries[name], settings)
        infos[name] = IndexInfo(file=f"index/{path.name}", **info)
    store, specs = layout.pairs_zarr(version), {}
    for direction, (name, _) in DIRECTIONS.items():
        rows, chunk = sides[name].embeddings.spec.shape[0], sides[name].embeddings.spec.chunk_rows
        specs[f"{direction}/ids"] = ArraySpec((rows, settings.k), "int64", chunk)
        specs[f"{direction}/scores"] = ArraySpec((rows, settings.k), "float32", chunk)
    declare_arrays(store, specs)
    # Chunks of other settings may lie there under the same names: the settings are part of what the journal counts.
    counted = f"{store.name}[{digest(to_json(settings.model_dump(mode='json')))[:8]}]/"
    for direction, (name, other) in DIRECTIONS.items():
        writer = _PairsWriter(store, journal, counted, direction, specs)
        writer.write_missing(sides[name], sides[other], indexes[other])
    return Retrieval(infos, PairStore(store=store.name, k=settings.k, counted=counted))


def _build_or_load(
    path: Path, name: str, targets: EmbeddingSet, queries: EmbeddingSet, settings: PairsSettings
) -> tuple[Index, dict[str, Any]]:
    """One side's index; the document beside it is written after it, so an index without one is built again."""
    beside = path.with_suffix(".json")
    asked = settings.model_dump(mode="json")
    if beside.exists():
        document = json.loads(beside.read_bytes())
        if document["settings"] == asked:
            return Index.load(path, targets.embeddings.shape[1], len(targets)), document["info"]
        beside.unlink()
    say(f"building the index over {len(targets.usable):,} {name}")
    index, info = build_side(targets, queries, settings)
    index.save(path)
    write_json(beside, {"settings": asked, "info": info})
    if info["recall"] is not None:
        measured = f"recall@{info['recall_k']} {info['recall']:.3f} on {info['recall_queries']} queries"
        say(f"{name}: {info['type']}, {measured}")
    return index, info


@dataclass(frozen=True)
class _PairsWriter:
    """The pairs of one direction, on disk.

    Attributes:
        counted: what the journal calls the store.
        specs: of all arrays of the store.
    """

    store: Path
    journal: Journal
    counted: str
    direction: str
    specs: dict[str, ArraySpec]

    def write_missing(self, queries: EmbeddingSet, targets: EmbeddingSet, index: Index) -> None:
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
                start = shard * spec.chunk_rows
                stop = start + spec.rows_of(shard)
                ids, scores = retrieve(queries.embeddings, targets.embeddings, index, spec.shape[1], start, stop)
                for name, block in ((ids_name, ids), (scores_name, scores)):  # scores last: they count the shard
                    written = write_chunk(self.store, name, self.specs[name], shard, block)
                    self.journal.add(ShardRecord(self.counted + name, shard, len(block), written), {})
                done += stop - start
                shown.update(done)
