"""Pairs for the cache of `small_cache`: found by brute force, or any that a test wants to see there."""

import numpy as np

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.cache.version.manifest import read_manifest, write_manifest
from dimefm.cache.version.schema import PairStore

CHUNK_ROWS = 16


def unit(embeddings):
    """(n, D) float64 rows of length one; NaN where there is none."""
    rows = embeddings.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def nearest(queries, targets, k):
    """(n, k) ids and cosines, best first, -1 and NaN last, of two sets of float64 unit rows."""
    cosine = queries @ targets.T
    order = np.argsort(np.where(np.isnan(cosine), np.inf, -cosine), axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(cosine, order, axis=1).astype(np.float32)
    ids = np.where(np.isnan(scores), -1, order)
    missing = k - ids.shape[1]
    return np.pad(ids, ((0, 0), (0, missing)), constant_values=-1), np.pad(
        scores, ((0, 0), (0, missing)), constant_values=np.nan
    )


def add_pairs(cache, k=4, **given):
    """The cache with pairs both ways, found by brute force where they are not `given` as (ids, scores)."""
    sides = {"image": unit(cache.images.embeddings[:]), "sentence": unit(cache.sentences.embeddings[:])}
    for direction in ("image_to_sentence", "sentence_to_image"):
        one, other = direction.split("_to_")
        ids, scores = given.get(direction) or nearest(sides[one], sides[other], k)
        specs = {
            f"{direction}/ids": ArraySpec(ids.shape, "int64", CHUNK_ROWS),
            f"{direction}/scores": ArraySpec(scores.shape, "float32", CHUNK_ROWS),
        }
        declare_arrays(cache.layout.root / "pairs.zarr", specs)
        for (name, spec), array in zip(specs.items(), (ids, scores), strict=True):
            for chunk in range(spec.num_chunks):
                write_chunk(
                    cache.layout.root / "pairs.zarr", name, spec, chunk, array[chunk * CHUNK_ROWS :][:CHUNK_ROWS]
                )
    manifest = read_manifest(cache.layout).replace(pairs=PairStore(store="pairs.zarr", k=k, counted="pairs.zarr/"))
    write_manifest(cache.layout, manifest)
    return FeatureCache.open(cache.layout.root)
