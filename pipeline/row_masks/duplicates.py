"""`dimefm cache duplicates` and `leakage`: rows to leave out of training, found among the cached embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...cache.disk.index import Index
from ...cache.errors import InputError
from ...cache.reader.feature_cache import EmbeddingSet, FeatureCache
from ...cache.reader.masks import Side, add_mask, check_mask_name
from ...stages.retrieve.near_duplicates import find_duplicates, nearest_leak, own_index
from ..progress import bar, say, short
from .mask import side_of

LINES_SHOWN = 20

TITLES = {"images": "source", "sentences": "text"}
"""Side -> column that a person knows a row by."""


def duplicates(
    folder: Path, threshold: float, side: str = "images", mask: str | None = None, within: str | None = None
) -> dict[str, Any]:
    """Find rows of one side that nearly repeat an earlier one.

    Args:
        threshold: least cosine, above 0 and at most 1.
        side: `images` or `sentences`.
        mask: name to save the rows that stay under; None saves nothing.
        within: a mask whose rows alone are compared.

    Returns:
        `cache`, `side`, `threshold`, `compared`, `dropped`, `identical`, `groups`, `cut`, `mask`, and `rows`: for each
        dropped row its number and name, those of the row that stays, and their cosine; the surest first.

    Raises:
        CacheError: if the cache is unfinished or damaged.
        InputError: if the threshold, the side or a mask's name is none.
    """
    _check(threshold, mask)
    named = side_of(side)
    cache = FeatureCache.open(folder)
    rows: EmbeddingSet = getattr(cache, named)
    compared = _compared(cache, named, within)
    index = _index(cache, named, rows)
    with bar(f"near-duplicate {side}", len(compared), "rows") as shown:
        found = find_duplicates(rows.embeddings, compared, index, threshold, shown.update)
    if mask is not None:
        add_mask(cache.layout, named, mask, _keep(len(rows), compared, found.rows), rows_since=True)
    order = np.lexsort((found.rows, -found.scores))
    listed = pa.table(
        {
            "row": found.rows[order],
            "name": rows.rows.take(found.rows[order].tolist(), TITLES[side]),
            "kept_row": found.kept[order],
            "kept_name": rows.rows.take(found.kept[order].tolist(), TITLES[side]),
            "cosine": found.scores[order],
        }
    )
    return {
        "cache": str(cache.layout.root),
        "side": side,
        "threshold": threshold,
        "compared": len(compared),
        "dropped": len(found.rows),
        "identical": found.num_identical,
        "groups": len(np.unique(found.kept)),
        "cut": found.num_cut,
        "mask": mask,
        "rows": listed.to_pylist(),
    }


def leakage(folder: Path, threshold: float, mask: str | None = None, within: str | None = None) -> dict[str, Any]:
    """Find training images that are too close to an image of an `[evaluate.*]` set.

    Args:
        threshold: least cosine, above 0 and at most 1.
        mask: name to save the images that stay under; None saves nothing.
        within: a mask whose images alone are looked at.

    Returns:
        `cache`, `threshold`, `compared`, `dropped`, `cut`, `mask`, `sets` (name -> evaluation images, leaks) and
        `rows`: for each leak the training image's row and name, the set, the row and name of the evaluation image that
        it is nearest to, and their cosine; the surest first. An image near to two sets is listed for both.

    Raises:
        CacheError: if the cache is unfinished or damaged.
        InputError: if it has no evaluation set, or the threshold or a mask's name is none.
    """
    _check(threshold, mask)
    cache = FeatureCache.open(folder)
    if not cache.evaluate:
        raise InputError(
            f"{cache.layout.root}: has no evaluation set to leak into; add [evaluate.NAME] and `append` it"
        )
    compared = _compared(cache, "images", within)
    index = _index(cache, "images", cache.images)
    leaking = np.zeros(len(cache.images), dtype=bool)
    listed: list[dict[str, Any]] = []
    sets, num_cut = {}, 0
    for name, item in cache.evaluate.items():
        labelled, usable = item.images.embeddings, item.images.usable
        with bar(f"leaks into {name}", len(usable), "rows") as shown:
            found = nearest_leak(labelled, usable, cache.images.embeddings, compared, index, threshold, shown.update)
        leaking[found.targets] = True
        num_cut += found.num_cut
        sets[name] = {"images": len(labelled), "leaks": len(found.targets)}
        leaks = {
            "row": found.targets,
            "name": cache.images.rows.take(found.targets.tolist(), "source"),
            "set": [name] * len(found.targets),
            "evaluate_row": found.queries,
            "evaluate_name": item.images.rows.take(found.queries.tolist(), "source"),
            "cosine": found.scores,
        }
        listed += pa.table(leaks).to_pylist()
    if mask is not None:
        keep = _keep(len(cache.images), compared, np.flatnonzero(leaking))
        add_mask(cache.layout, "images", mask, keep, rows_since=True)
    listed.sort(key=lambda item: (-item["cosine"], item["row"]))
    return {
        "cache": str(cache.layout.root),
        "threshold": threshold,
        "compared": len(compared),
        "dropped": int(leaking.sum()),
        "cut": num_cut,
        "mask": mask,
        "sets": sets,
        "rows": listed,
    }


def duplicate_lines(found: dict[str, Any]) -> list[str]:
    """What `duplicates` found, for a person to read."""
    head = (
        f"{found['cache']}: {found['dropped']:,} of {found['compared']:,} {found['side']} repeat an earlier one "
        f"(cosine at least {found['threshold']:g}), in {found['groups']:,} groups; {found['identical']:,} have its "
        "very embedding"
    )
    kept = [f"{row['kept_row']:,} {short(row['kept_name'])}" for row in found["rows"][:LINES_SHOWN]]
    return _lines(head, found, kept, f"{found['side']}.mask")


def leakage_lines(found: dict[str, Any]) -> list[str]:
    """What `leakage` found, for a person to read."""
    sets = ", ".join(
        f"{item['leaks']:,} into {name} ({item['images']:,} images)" for name, item in found["sets"].items()
    )
    head = (
        f"{found['cache']}: {found['dropped']:,} of {found['compared']:,} training images leak "
        f"(cosine at least {found['threshold']:g}): {sets}"
    )
    nearest = [
        f"{row['set']} {row['evaluate_row']:,} {short(row['evaluate_name'])}" for row in found["rows"][:LINES_SHOWN]
    ]
    return _lines(head, found, nearest, "images.mask")


def _lines(head: str, found: dict[str, Any], others: list[str], key: str) -> list[str]:
    """The head, the surest pairs of a row and what it is near to, and what became of it all."""
    lines = [head] + [
        f"  {row['cosine']:.4f}  {row['row']:,} {short(row['name'])} = {other}"
        for row, other in zip(found["rows"], others)
    ]
    if len(found["rows"]) > LINES_SHOWN:
        lines.append(f"  and {len(found['rows']) - LINES_SHOWN:,} more; --json lists all")
    if found["cut"]:
        lines.append(f"{found['cut']:,} rows have more near ones than were looked at; raise --threshold")
    if found["mask"]:
        lines.append(f'saved as a mask; {key} = "{found["mask"]}" leaves these rows out of a run')
    elif found["dropped"]:
        lines.append("nothing saved; --mask NAME saves the rows that stay")
    return lines


def _check(threshold: float, mask: str | None) -> None:
    if not 0 < threshold <= 1:
        raise InputError(f"--threshold {threshold:g}: a cosine; wanted above 0 and at most 1, such as 0.95")
    if mask is not None:
        check_mask_name(mask)


def _compared(cache: FeatureCache, side: Side, within: str | None) -> NDArray[np.int64]:
    """Rows to compare: those with an embedding, of a mask's rows where one is named."""
    chosen: EmbeddingSet = getattr(cache.masked(**{side: within}), side)
    return chosen.usable


def _keep(num_rows: int, compared: NDArray[np.int64], dropped: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Only what was compared is kept: a row that failed, and is mended one day, has not been looked at."""
    keep = np.zeros(num_rows, dtype=bool)
    keep[compared] = True
    keep[dropped] = False
    return keep


def _index(cache: FeatureCache, side: str, rows: EmbeddingSet) -> Index:
    """The cache's own index of a side; built for the moment where retrieval was off."""
    num_rows, width = rows.embeddings.shape
    info = cache.manifest.index.get(side)
    if info:
        return Index.load(cache.layout.root / info.file, width, num_rows)
    say(f"building an index over {len(rows.usable):,} {side}: this cache has none")
    return own_index(rows.embeddings, rows.usable)
