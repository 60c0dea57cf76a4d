"""Indexes over both sides of a cache, and the pseudo-pairs between them, shard by shard."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from ...cache.disk.durable import digest, to_json, write_json
from ...cache.disk.index import Index, index_bytes
from ...cache.disk.layout import DIRECTIONS, SIDES, Layout, table_of
from ...cache.reader.feature_cache import EmbeddingSet
from ...cache.version.journal import Journal, ShardRecord
from ...stages.retrieve.pairs import build_side, retrieve
from ...stages.settings.cache import PairsSettings
from ..progress import bar, say

NEIGHBOUR_BYTES = 8 + 4
"""An int64 id and a float32 score."""


def retrieval_bytes(sides: Sequence[tuple[int, ...]], settings: PairsSettings) -> int:
    """About what indexes and pairs take on disk; `sides` are the (rows, width) of images and sentences."""
    if not settings.k:
        return 0
    return sum(index_bytes(rows, width, settings.index) + rows * settings.k * NEIGHBOUR_BYTES for rows, width in sides)


def write_pairs(layout: Layout, settings: PairsSettings, journal: Journal, version: int) -> dict[str, Any]:
    """Build what is missing of the indexes and pairs of one version of the cache.

    Args:
        layout: the cache, or a version of it in the making.

    Returns:
        `index` and `pairs` of the manifest.
    """
    sides = {side: EmbeddingSet.open(layout, array, table_of(layout, array)) for side, array in SIDES.items()}
    store = layout.pairs_zarr(version)
    indexes = {
        name: _build_or_load(layout.index(name, version), name, sides[name], sides[other], settings)
        for name, other in DIRECTIONS.values()
    }
    specs = {}
    for direction, (name, _) in DIRECTIONS.items():
        rows, chunk = sides[name].embeddings.spec.shape[0], sides[name].embeddings.spec.chunk_rows
        specs[f"{direction}/ids"] = ArraySpec((rows, settings.k), "int64", chunk)
        specs[f"{direction}/scores"] = ArraySpec((rows, settings.k), "float32", chunk)
    declare_arrays(store, specs)
    # Chunks of other settings may lie there under the same names: the settings are part of what the journal counts.
    counted = f"{store.name}[{digest(to_json(settings.model_dump(mode='json')))[:8]}]/"
    for direction, (name, other) in DIRECTIONS.items():
        _retrieve_all(store, journal, counted, direction, specs, sides[name], sides[other], indexes[other][0])
    return {
        "index": {name: {"file": f"index/{layout.index(name, version).name}", **indexes[name][1]} for name in indexes},
        "pairs": {"store": store.name, "k": settings.k, "counted": counted},
    }


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


def _retrieve_all(
    store: Path,
    journal: Journal,
    counted: str,
    direction: str,
    specs: dict[str, ArraySpec],
    queries: EmbeddingSet,
    targets: EmbeddingSet,
    index: Index,
) -> None:
    ids_name, scores_name = f"{direction}/ids", f"{direction}/scores"
    spec = specs[ids_name]
    shards = range(spec.num_chunks)
    missing = [shard for shard in shards if not journal.has(counted + scores_name, shard, spec.rows_of(shard))]
    done = spec.shape[0] - sum(spec.rows_of(shard) for shard in missing)
    if not missing:
        return
    with bar(direction.replace("_", " "), spec.shape[0], "rows", done) as shown:
        for shard in missing:
            start = shard * spec.chunk_rows
            stop = start + spec.rows_of(shard)
            ids, scores = retrieve(queries.embeddings, targets.embeddings, index, spec.shape[1], start, stop)
            for name, block in ((ids_name, ids), (scores_name, scores)):  # scores last: they count the shard
                written = write_chunk(store, name, specs[name], shard, block)
                journal.add(ShardRecord(counted + name, shard, len(block), written), {})
            done += stop - start
            shown.update(done)


def pairs_document(settings: PairsSettings) -> dict[str, Any] | None:
    """The settings that decide what the pairs are; None when retrieval is off."""
    return settings.model_dump(mode="json") if settings.k else None
