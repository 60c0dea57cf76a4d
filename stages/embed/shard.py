"""Stage one's unit of work: the embeddings of one shard, read, computed and written durably."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np

from ...cache.disk.arrays import ArraySpec, first_rows, write_chunk
from ...cache.disk.row_tables import OK, RowTable
from ...cache.version.journal import ShardRecord
from ..images.crops import Crops
from ..models.open_clip_teacher import Teacher
from ..profiling import phase
from ..settings.models import TeacherSettings
from .image_rows import RowCrops, embed_image_shard
from .pack_pixels import PackTask, keeping
from .sentence_rows import class_head, embed_sentence_shard


@dataclass(frozen=True)
class Kept:
    """The rows that a growing shard begins with: copied from the chunk file that it replaces, never embedded again.

    Attributes:
        store: the Zarr group with that chunk file.
        digest: of the file, which must be sound: copying damage would seal it.
    """

    store: Path
    num_rows: int
    digest: str


@dataclass(frozen=True)
class ShardTask:
    """One shard to embed; small and picklable, so that it can travel to another machine.

    Attributes:
        store: the Zarr group that the array is in.
        table: row table of the array; None for a head.
        root: folder that the image rows are relative to.
        prompts: prompts of each class, for a head.
        kept: rows of a growing shard that were embedded before.
        pack: of images, where their pixels are kept meanwhile; None keeps none.
        crops: of images, what is embedded beside the centre; None embeds that alone.
    """

    kind: Literal["images", "sentences", "head"]
    store: Path
    array: str
    spec: ArraySpec
    shard: int
    table: Path | None = None
    root: Path | None = None
    prompts: tuple[tuple[str, ...], ...] = ()
    kept: Kept | None = None
    pack: PackTask | None = None
    crops: Crops | None = None


@dataclass(frozen=True)
class ShardDone:
    """A shard whose files are durable.

    Attributes:
        pack: of the pack that was written with it.
        num_rows: rows embedded, failed ones included.
        seconds: of `read`, `decode`, `keep` (summed over threads), `infer`, `wait` and `write`.
    """

    record: ShardRecord
    num_rows: int
    seconds: dict[str, float] = field(default_factory=dict)
    pack: ShardRecord | None = None


def embed_shard(task: ShardTask, teacher: Teacher, settings: TeacherSettings, lock: Lock) -> ShardDone:
    """Embed one shard and write its chunk file, and before it its pack.

    Args:
        lock: held while the model runs, so that one shard at a time is on the device; the next shard's images are
            decoded, and the last shard's file written, meanwhile.
    """
    pack: ShardRecord | None = None
    if task.kind == "head":
        start = time.perf_counter()
        block = class_head(teacher, [list(prompts) for prompts in task.prompts], settings.batch_size, lock)
        failures: list[tuple[int, str]] = []
        seconds = {"infer": time.perf_counter() - start}
    else:
        assert task.table is not None
        column = "source" if task.kind == "images" else "text"
        rows = RowTable(task.table, task.spec.shape[0]).shard(task.shard, [column, "status"])
        given = [value if status == OK else None for value, status in zip(rows[column], rows["status"], strict=True)]
        num_kept = task.kept.num_rows if task.kept else 0
        # Batches stay on the grid that the whole shard would have; in the first one, kept rows are blank.
        first = num_kept // settings.batch_size * settings.batch_size
        given = [None] * (num_kept - first) + given[num_kept:]
        if task.kind == "images":
            assert task.root is not None
            files = [None if source is None else task.root / source for source in given]
            start = task.shard * task.spec.chunk_rows + first
            crops = RowCrops(task.crops, np.arange(start, start + len(files))) if task.crops else None
            with keeping(task.pack, skip=num_kept - first) as keeper:
                result = embed_image_shard(teacher, files, settings.batch_size, settings.workers, lock, keeper, crops)
            pack = keeper.record if keeper else None
        else:
            result = embed_sentence_shard(teacher, given, settings.batch_size, lock)
        # A row that was listed as failed has its reason in the table already.
        failures = [(first + row, reason) for row, reason in result.failures if given[row] is not None]
        block, seconds = result.embeddings[num_kept - first :], dict(result.seconds)
        if task.kept:
            old = first_rows(task.kept.store, task.array, task.spec, task.shard, num_kept, task.kept.digest)
            block = np.concatenate([old, block])
    start = time.perf_counter()
    with phase("write"):
        written = write_chunk(task.store, task.array, task.spec, task.shard, block)
    seconds["write"] = time.perf_counter() - start
    record = ShardRecord(task.array, task.shard, len(block), written, tuple(failures))
    return ShardDone(record, len(block), seconds, pack)
