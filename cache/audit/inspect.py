"""What is in a cache, in numbers: sizes, failures, versions, similarities, and how evenly retrieval spreads."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..disk.cosine import unit_rows
from ..disk.layout import DIRECTIONS, IMAGES, SIDES
from ..reader.feature_cache import EmbeddingSet, FeatureCache, Pairs
from ..reader.masks import mask_names, read_mask
from ..version.schema import Manifest

SAMPLE_ROWS = 1024
"""Rows of each side whose cosines are looked at; a quantile of a million of them is good to about 0.01."""

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)

KINDS = {"teacher.zarr": "embeddings"} | {kind: kind for kind in ("rows", "index", "text_tower", "masks", "pixels")}
"""First folder of a file's name in the manifest -> what it belongs to."""

_TEACHER_KEYS = ("model", "pretrained", "precision", "batch_size", "embed_dim", "logit_scale", "libraries")


def inspect_cache(cache: FeatureCache, seed: int = 0) -> dict[str, Any]:
    """Everything that `dimefm cache inspect` shows; equal caches give equal documents.

    Args:
        seed: of the rows that similarities are sampled from.

    Returns:
        `cache`, `state` (finished), `format`, `version`, `identity`, `shard_rows`, `teacher`, `arrays` (rows, failed,
        reasons),
        `evaluate` (images, classes), `bytes` (for each kind of file, and `superseded`), `masks`, `index`, `pairs`,
        `pixels` (None, or setting, number of packs and mean bytes of a picture), `views` (None, or count and settings
        of the crops of each image), `transductive`, `similarity`
        (quantiles of cosines) and `hubs` (how evenly each side is retrieved).

    Raises:
        CacheError: if a mask's or an array's file is missing or damaged.
    """
    manifest, plan = cache.manifest, cache.plan
    pairs = {name: found for name in DIRECTIONS if (found := cache.pairs(name))}
    return {
        "cache": str(cache.layout.root),
        "state": "finished",
        "format": manifest.format,
        "version": manifest.version,
        "identity": cache.identity,
        "shard_rows": plan.shard_rows,
        "teacher": {key: cache.teacher.get(key) for key in _TEACHER_KEYS},
        "arrays": {name: counts.to_dict() for name, counts in manifest.arrays.items()},
        "evaluate": {
            name: {"images": len(item.images), "classes": len(item.class_ids)} for name, item in cache.evaluate.items()
        },
        "bytes": _bytes(cache, manifest),
        "masks": _masks(cache, manifest),
        "index": {side: info.to_dict() for side, info in manifest.index.items()},
        "pairs": manifest.pairs and manifest.pairs.to_dict(),
        "pixels": _pixels(cache, manifest),
        "views": cache.crops and cache.crops.to_dict(),
        "transductive": cache.transductive,
        "similarity": similarity(cache, pairs, np.random.default_rng(seed)),
        "hubs": {
            name: hubs(found, *(getattr(cache, side) for side in DIRECTIONS[name])) for name, found in pairs.items()
        },
    }


def similarity(
    cache: FeatureCache, pairs: Mapping[str, Pairs], rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Quantiles of the teacher's cosine between rows drawn at random, rows and their neighbours, crop and centre."""
    images, sentences = (unit_rows(rows.embeddings[_sample(rows, rng)])[0] for rows in (cache.images, cache.sentences))
    found = {"image_sentence": quantiles((images @ sentences.T).ravel())}
    for name, unit in (("image_image", images), ("sentence_sentence", sentences)):
        one, other = np.triu_indices(len(unit), k=1)
        found[name] = quantiles((unit @ unit.T)[one, other])
    for name, neighbours in pairs.items():
        rows = _sample(getattr(cache, DIRECTIONS[name][0]), rng)
        found[f"{name}_nearest"] = quantiles(neighbours.scores[rows][:, 0])
    if cache.images.views is not None:
        views = cache.images.views[_sample(cache.images, rng)]
        centre = unit_rows(views[:, 0])[0]
        crops = [(unit_rows(views[:, view])[0] * centre).sum(axis=1) for view in range(1, views.shape[1])]
        found["crop_centre"] = quantiles(np.concatenate(crops))
    return found


def quantiles(values: NDArray[np.float32]) -> dict[str, float]:
    """Quantiles by their name ("0.5"); empty where there is no finite value."""
    values = values[np.isfinite(values)]
    return {str(q): float(np.quantile(values, q)) for q in QUANTILES} if len(values) else {}


def hubs(pairs: Pairs, queries: EmbeddingSet, targets: EmbeddingSet) -> dict[str, Any]:
    """How evenly the rows of one side are retrieved. A few that are near to everything crowd the others out.

    Args:
        pairs: neighbours of each query.

    Returns:
        `max` (times that the most retrieved row was), `max_row`, `max_name`, `mean`, `never` (share of the usable rows
        that no query has among its neighbours) and `skewness` of the counts (0 where they are even; above about 1
        there are hubs).
    """
    counts = np.zeros(len(targets), dtype=np.int64)
    for _, block in pairs.ids.blocks():
        counts += np.bincount(block[block >= 0], minlength=len(targets))
    usable = targets.usable
    degrees = counts[usable]
    if not len(degrees) or not len(queries.usable):
        return {"max": 0, "max_row": None, "max_name": None, "mean": 0.0, "never": 1.0, "skewness": 0.0}
    row = int(usable[degrees.argmax()])
    column = "source" if targets.rows.has("source") else "text"
    return {
        "max": int(counts[row]),
        "max_row": row,
        "max_name": targets.rows.take([row], column)[0],
        "mean": float(degrees.mean()),
        "never": float(np.mean(degrees == 0)),
        "skewness": skewness(degrees),
    }


def skewness(values: NDArray[Any]) -> float:
    """Third moment about the mean over the cube of the standard deviation; 0 where all are equal.

    >>> round(skewness(np.array([0, 0, 0, 4])), 4)  # mean 1, deviations -1 -1 -1 3: 6 / 3 ** 1.5
    1.1547
    """
    away = values - values.mean()
    deviation = np.sqrt(np.mean(away**2))
    return float(np.mean(away**3) / deviation**3) if deviation else 0.0


def _sample(rows: EmbeddingSet, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.sort(rng.choice(rows.usable, size=min(SAMPLE_ROWS, len(rows.usable)), replace=False))


def _bytes(cache: FeatureCache, manifest: Manifest) -> dict[str, int]:
    """Bytes of the files in force by kind, of all of them, and of those that wait for their last readers."""
    sizes: Counter[str] = Counter()
    for name, entry in manifest.files.items():
        folder = name.split("/", 1)[0]
        kind = "pairs" if folder.startswith("pairs") else KINDS.get(folder, "other")
        sizes[kind] += entry.bytes
    superseded = (cache.layout.root / name for name in manifest.superseded)
    states = (path.stat() for path in superseded if path.is_file())
    found = dict(sorted(sizes.items())) | {"total": sum(sizes.values())}
    # What the version in force has under another name takes no room of its own.
    return found | {"superseded": sum(state.st_size for state in states if state.st_nlink == 1)}


def _pixels(cache: FeatureCache, manifest: Manifest) -> dict[str, Any] | None:
    """What pictures there are for stage two; of a cache that shares rows, perhaps the other one's."""
    if cache.pixels is None:
        return None
    own = manifest.pixels is not None
    sizes = [entry.bytes for name, entry in manifest.files.items() if name.startswith("pixels/")]
    num_pictures = max(1, len(cache.images) - manifest.arrays[IMAGES].failed)
    mean = sum(sizes) / num_pictures if own else None
    return {"setting": cache.pixels.setting, "own": own, "packs": len(sizes), "mean_bytes": mean}


def _masks(cache: FeatureCache, manifest: Manifest) -> list[dict[str, Any]]:
    found = []
    for side in SIDES:
        rows: EmbeddingSet = getattr(cache, side)
        for name in mask_names(manifest, side):
            keep = read_mask(cache.layout, manifest, side, name, len(rows))
            usable = int(np.count_nonzero(keep[rows.usable]))
            found.append({"side": side, "name": name, "kept": usable, "of": len(rows.usable)})
    return found
