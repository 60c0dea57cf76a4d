"""The live teacher against what a cache holds: the same rows embedded again, and the cosine of old and new."""

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.arrays import read_chunk, read_spec
from ...cache.disk.cosine import cosines, unit_rows
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, table_of
from ...cache.disk.row_tables import OK, RowTable
from ...cache.errors import InputError
from ...cache.version.plan_file import first_difference
from ...stages.inputs.image_source import ImageSource, row_keys
from ...stages.inputs.open_source import open_source
from ..config.load import Config

if TYPE_CHECKING:
    from ...stages.models.open_clip_teacher import Teacher

SAMPLE_ROWS = 256
SAME_ROW = 0.999
"""Least cosine of a row and the same row computed elsewhere: other libraries and hardware, the same teacher."""


def image_source(config: Config, array: str) -> ImageSource | None:
    """The source that an array's images come from; None where it is not at hand, or the array holds sentences."""
    if array == IMAGES:
        source = open_source(config.images.source)
    elif array == SENTENCES or array.split("/")[1] not in config.evaluate:
        return None
    else:
        source = open_source(config.evaluate[array.split("/")[1]].images)
    return source if source.at_hand() else None


def require_same_teacher(root: Path, plan: Mapping[str, Any], teacher: "Teacher") -> None:
    """Refuse a teacher that is not the cache's; other versions of libraries are no other teacher.

    Raises:
        InputError: naming what differs.
    """
    live = {key: value for key, value in teacher.identity().items() if key != "libraries"}
    difference = first_difference({key: plan["teacher"].get(key) for key in live}, live, "teacher")
    if difference:
        key, there, here = difference
        raise InputError(f"{root}: made with {key} = {there}, the config's teacher has {here}; wanted the same teacher")


def live_rows(
    config: Config,
    layout: Layout,
    plan: Mapping[str, Any],
    teacher: "Teacher",
    array: str,
    rows: NDArray[np.int64],
) -> tuple[NDArray[np.float16], list[str | None]]:
    """Embed rows of an array again, all views of them.

    Returns:
        (n, D) or (n, views, D) float16, and for each row why it could not be embedded.
    """
    from ...stages.embed.image_rows import RowCrops, embed_image_shard
    from ...stages.embed.sentence_rows import embed_sentence_shard
    from ...stages.images.crops import Crops

    table = RowTable(table_of(layout, array))
    source = image_source(config, array)
    if array == SENTENCES:
        done = embed_sentence_shard(teacher, table.take(rows.tolist(), "text"), config.teacher.batch_size, Lock())
    else:
        assert source is not None
        keys = row_keys(source, table)(rows)
        crops = Crops.read(plan.get("views")) if array == IMAGES else None
        beside = RowCrops(crops, rows) if crops else None
        settings = config.teacher
        done = embed_image_shard(teacher, source, keys, settings.batch_size, settings.workers, Lock(), None, beside)
    reasons = dict(done.failures)
    return done.embeddings, [reasons.get(i) for i in range(len(rows))]


def compare_live(
    config: Config,
    layout: Layout,
    plan: Mapping[str, Any],
    teacher: "Teacher",
    array: str,
    num_rows: int,
    bad: NDArray[np.int64],
    chunk_rows: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Embed a random sample of an array's rows again and compare; a row is as near as its farthest view.

    Args:
        plan: of the cache.
        bad: chunks that are damaged; none of their rows are looked at.

    Returns:
        `rows` compared, `cosine` (least, mean; None where there was nothing to compare), `unreadable` rows, and
        `differ`: rows whose cosine is below `SAME_ROW`.
    """
    status = RowTable(table_of(layout, array), num_rows).column("status").to_pylist()
    good = np.array([row for row, value in enumerate(status) if value == OK], dtype=np.int64)
    good = good[~np.isin(good // chunk_rows, bad)]
    if not good.size or (array != SENTENCES and image_source(config, array) is None):
        return {"rows": 0, "cosine": None, "unreadable": [], "differ": []}
    rows = np.sort(np.random.default_rng(seed).choice(good, min(SAMPLE_ROWS, len(good)), replace=False))
    live, reasons = live_rows(config, layout, plan, teacher, array, rows)
    read = np.array([reason is None for reason in reasons])
    stored = _rows_of(layout, array, rows, chunk_rows)
    views = live.reshape(len(rows), -1, live.shape[-1])[read], stored.reshape(len(rows), -1, live.shape[-1])[read]
    now, then = (of_rows.reshape(-1, live.shape[-1]) for of_rows in views)
    unit, _ = unit_rows(now)
    each = cosines(unit, np.arange(len(now))[:, None], then)[:, 0].reshape(int(read.sum()), -1)
    found = each.min(axis=1)
    return {
        "rows": int(read.sum()),
        "cosine": {"least": float(each.min()), "mean": float(each.mean())} if each.size else None,
        "unreadable": rows[~read].tolist(),
        "differ": rows[read][~(found >= SAME_ROW)].tolist(),
    }


def _rows_of(layout: Layout, array: str, rows: NDArray[np.int64], chunk_rows: int) -> NDArray[Any]:
    """Stored embeddings, chunk by chunk: other chunks may be missing."""
    store = layout.base.teacher_zarr
    spec = read_spec(store, array)
    parts = [
        read_chunk(store, array, spec, int(chunk))[rows[rows // chunk_rows == chunk] % chunk_rows]
        for chunk in np.unique(rows // chunk_rows)
    ]
    return np.concatenate(parts)
