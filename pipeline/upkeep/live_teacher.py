"""The live teacher against what a cache holds: the same rows embedded again, and the cosine of old and new."""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.arrays import read_chunk, read_spec
from ...cache.disk.cosine import cosines, unit_rows
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, table_of
from ...cache.disk.row_tables import OK, RowTable
from ...cache.disk.side_by_side import advise
from ...cache.errors import InputError
from ...cache.version.plan_file import first_difference
from ...cache.version.schema import Plan
from ...stages.images.crops import Crops
from ...stages.inputs.image_source import ImageSource, row_keys
from ...stages.settings.models import TeacherSettings
from ..stage_one.sources import Sources

if TYPE_CHECKING:
    from ...stages.models.teacher import Teacher

SAMPLE_ROWS = 256
SAME_ROW = 0.999
"""Least cosine of a row and the same row computed elsewhere: other libraries and hardware, the same teacher."""


def image_source(sources: Sources, array: str) -> ImageSource | None:
    """The source of an array's images; None if it is not at hand or not in the config, or the array holds sentences."""
    source = sources.images_of(array)
    return source if source and source.at_hand() else None


def crops_of(plan: Plan, array: str) -> Crops | None:
    """The crops of an array's images; None where it holds the centre alone."""
    return Crops.read(plan.views) if array == IMAGES else None


def require_loaded_teacher(root: Path, plan: Plan, teacher: "Teacher") -> None:
    """Refuse a loaded teacher that did not make the cache; library versions may differ.

    Raises:
        InputError: naming what differs.
    """
    live = {key: value for key, value in teacher.identity().items() if key != "libraries"}
    made_with = plan.teacher.to_dict()
    difference = first_difference({key: made_with.get(key) for key in live}, live, "teacher")
    if difference:
        key, there, here = difference
        raise InputError(f"{root}: made with {key} = {there}, the config's teacher has {here}; wanted the same teacher")


@dataclass(frozen=True)
class LiveTeacher:
    """The teacher of a cache, loaded, and the sources of its rows.

    Attributes:
        settings: the config's `[teacher]`.
        layout: the cache, or a version of it in the making.
        plan: of the cache.
    """

    sources: Sources
    settings: TeacherSettings
    layout: Layout
    plan: Plan
    teacher: "Teacher"

    def embed(self, array: str, rows: NDArray[np.int64]) -> tuple[NDArray[np.float16], list[str | None]]:
        """Embed rows of an array again, all views of them.

        Returns:
            (n, D) or (n, views, D) float16, and for each row why it could not be embedded.
        """
        from ...stages.embed.image_rows import RowCrops, embed_image_shard
        from ...stages.embed.sentence_rows import embed_sentence_shard

        table, settings = RowTable(table_of(self.layout, array)), self.settings
        if array == SENTENCES:
            done = embed_sentence_shard(self.teacher, table.take(rows.tolist(), "text"), settings.batch_size, Lock())
        else:
            source = image_source(self.sources, array)
            assert source is not None
            keys = row_keys(source, table)(rows)
            crops = crops_of(self.plan, array)
            row_crops = RowCrops(crops, rows) if crops else None
            done = embed_image_shard(
                self.teacher, source, keys, settings.batch_size, settings.workers, Lock(), None, row_crops
            )
        reasons = dict(done.failures + done.absent)
        return done.embeddings, [reasons.get(i) for i in range(len(rows))]

    def compare(self, array: str, num_rows: int, damaged: Iterable[int] = (), seed: int = 0) -> dict[str, Any]:
        """Embed a random sample of an array's rows again; a row with several views counts by its least cosine.

        Args:
            damaged: numbers of damaged chunks; their rows are not sampled.

        Returns:
            `rows` compared, `cosine` (least, mean; None where there was nothing to compare), `unreadable` rows, and
            `differ`: rows whose cosine is below `SAME_ROW`.
        """
        status = RowTable(table_of(self.layout, array), num_rows).column("status").to_pylist()
        good = np.array([row for row, value in enumerate(status) if value == OK], dtype=np.int64)
        good = good[~np.isin(good // self.plan.shard_rows, list(damaged))]
        if not good.size or (array != SENTENCES and image_source(self.sources, array) is None):
            return {"rows": 0, "cosine": None, "unreadable": [], "differ": []}
        rows = np.sort(np.random.default_rng(seed).choice(good, min(SAMPLE_ROWS, len(good)), replace=False))
        live, reasons = self.embed(array, rows)
        read = np.array([reason is None for reason in reasons])
        width = live.shape[-1]
        num_read, num_views = int(read.sum()), live[0].size // width
        now = live[read].reshape(-1, width)
        stored = self._stored(array, rows)[read].reshape(-1, width)
        each = cosines(unit_rows(now)[0], np.arange(len(now))[:, None], stored)[:, 0].reshape(num_read, num_views)
        least = each.min(axis=1)
        return {
            "rows": num_read,
            "cosine": {"least": float(each.min()), "mean": float(each.mean())} if each.size else None,
            "unreadable": rows[~read].tolist(),
            "differ": rows[read][~(least >= SAME_ROW)].tolist(),  # NaN differs too
        }

    def _stored(self, array: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Cached embeddings of ascending rows, from the chunks that have them: others may be missing."""
        store, chunk_rows = self.layout.base.teacher_zarr, self.plan.shard_rows
        spec = read_spec(store, array)
        parts = []
        for chunk in np.unique(rows // chunk_rows):
            mapped = read_chunk(store, array, spec, int(chunk))
            advise(mapped, mmap.MADV_RANDOM)  # a few rows of each, and not the chunk around them
            parts.append(mapped[rows[rows // chunk_rows == chunk] % chunk_rows])
        return np.concatenate(parts)
