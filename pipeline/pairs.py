"""Indexes over both sides of a cache, and the pseudo-pairs between them, shard by shard."""

import json
from typing import Any

from ..cache.arrays import ArraySpec, MappedArray, declare_arrays, write_chunk
from ..cache.durable import digest, to_json, write_json
from ..cache.feature_cache import EmbeddingSet
from ..cache.index import Index
from ..cache.journal import Journal, ShardRecord
from ..cache.layout import IMAGES, SENTENCES, Layout
from ..cache.rows import RowTable
from ..cache.settings import PairsSettings
from ..stages.retrieve import build_side, retrieve
from .progress import bar, say


def write_pairs(layout: Layout, settings: PairsSettings, journal: Journal) -> dict[str, Any]:
    """Build what is missing of the indexes and pairs.

    Returns:
        `index` and `pairs` of the manifest.
    """
    sides = {
        "images": _open(layout, IMAGES, layout.image_rows),
        "sentences": _open(layout, SENTENCES, layout.sentence_rows),
    }
    asked = settings.model_dump(mode="json")
    indexes = {
        name: _build_or_load(layout, name, sides[name], sides[other], settings)
        for name, other in (("images", "sentences"), ("sentences", "images"))
    }
    directions = {"image_to_sentence": ("images", "sentences"), "sentence_to_image": ("sentences", "images")}
    specs = {}
    for direction, (name, _) in directions.items():
        rows, chunk = sides[name].embeddings.spec.shape[0], sides[name].embeddings.spec.chunk_rows
        specs[f"{direction}/ids"] = ArraySpec((rows, settings.k), "int64", chunk)
        specs[f"{direction}/scores"] = ArraySpec((rows, settings.k), "float32", chunk)
    declare_arrays(layout.pairs_zarr, specs)
    # Chunks of other settings may lie there under the same names: the settings are part of what the journal counts.
    version = digest(to_json(asked))[:8]
    for direction, (name, other) in directions.items():
        _retrieve_all(layout, journal, direction, version, specs, sides[name], sides[other], indexes[other][0])
    chunks = {array: [record.digest for record in journal.of(f"pairs-{version}/{array}")] for array in sorted(specs)}
    return {
        "index": {name: {"file": f"index/{name}.faiss", **info} for name, (_, info) in indexes.items()},
        "pairs": {"store": layout.pairs_zarr.name, "k": settings.k, "chunks": chunks},
    }


def _open(layout: Layout, array: str, table: Any) -> EmbeddingSet:
    return EmbeddingSet(MappedArray.open(layout.teacher_zarr, array), RowTable(table))


def _build_or_load(
    layout: Layout, name: str, targets: EmbeddingSet, queries: EmbeddingSet, settings: PairsSettings
) -> tuple[Index, dict[str, Any]]:
    """One side's index; the document beside it is written after it, so an index without one is built again."""
    path, beside = layout.index_dir / f"{name}.faiss", layout.index_dir / f"{name}.json"
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
        say(
            f"{name}: {info['type']}, recall@{info['recall_k']} {info['recall']:.3f} on {info['recall_queries']} queries"
        )
    return index, info


def _retrieve_all(
    layout: Layout,
    journal: Journal,
    direction: str,
    version: str,
    specs: dict[str, ArraySpec],
    queries: EmbeddingSet,
    targets: EmbeddingSet,
    index: Index,
) -> None:
    ids_name, scores_name = f"{direction}/ids", f"{direction}/scores"
    spec = specs[ids_name]
    counted = f"pairs-{version}/"
    missing = [shard for shard in range(spec.num_chunks) if not journal.has(counted + scores_name, shard)]
    done = spec.shape[0] - sum(min(spec.chunk_rows, spec.shape[0] - shard * spec.chunk_rows) for shard in missing)
    if not missing:
        return
    with bar(direction.replace("_", " "), spec.shape[0], "rows", done) as shown:
        for shard in missing:
            start = shard * spec.chunk_rows
            stop = min(start + spec.chunk_rows, spec.shape[0])
            ids, scores = retrieve(queries.embeddings, targets.embeddings, index, spec.shape[1], start, stop)
            for name, block in ((ids_name, ids), (scores_name, scores)):  # scores last: they count the shard
                written = write_chunk(layout.pairs_zarr, name, specs[name], shard, block)
                journal.add(ShardRecord(counted + name, shard, written), {})
            done += stop - start
            shown.update(done)
