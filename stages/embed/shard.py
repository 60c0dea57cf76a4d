"""One shard of stage one: its rows read, embedded and written durably, beside the place of its file."""

import time
from threading import Lock
from typing import Any

import numpy as np

from ...cache.disk.arrays import attempt_chunk, first_rows
from ...cache.disk.row_tables import OK, RowTable
from ...cache.version.journal import ShardRecord
from ..inputs.image_source import keys_of
from ..models.teacher import Teacher
from ..profiling import phase
from ..settings.models import TeacherSettings
from .image_rows import RowCrops, ShardResult, embed_image_shard
from .pack_pixels import ShardPack, open_pack
from .sentence_rows import class_head, embed_sentence_shard
from .tasks import ShardDone, ShardTask


def embed_shard(task: ShardTask, teacher: Teacher, settings: TeacherSettings, lock: Lock) -> ShardDone:
    """Embed one shard and write its chunk file, and before it its pack, each under a name of this attempt.

    The names are made here, as it runs: whoever runs it again, for whatever reason, writes other files. The caller
    commits.

    Args:
        lock: held while the model runs, so that one shard at a time is on the device; the next shard's images are
            decoded, and the last shard's file written, meanwhile.
    """
    pack: ShardPack | None = None
    failures: tuple[tuple[int, str], ...] = ()
    absent: tuple[tuple[int, str], ...] = ()
    if task.kind == "head":
        start = time.perf_counter()
        block = class_head(teacher, task.prompts, settings.batch_size, lock)
        seconds = {"infer": time.perf_counter() - start}
    else:
        num_existing = task.existing.num_rows if task.existing else 0
        # Batches stay on the grid that the whole shard would have; in the first one, existing rows are blank.
        first = num_existing // settings.batch_size * settings.batch_size
        given = [None] * (num_existing - first) + readable(task)[num_existing:]
        if task.kind == "images":
            result, pack = _embed_images(task, given, first, teacher, settings, lock)
        else:
            result = embed_sentence_shard(teacher, given, settings.batch_size, lock)
        # A row that was listed as failed has its reason in the table already.
        failures, absent = (
            tuple((first + row, reason) for row, reason in rows if given[row] is not None)
            for rows in (result.failures, result.absent)
        )
        if task.is_shared:  # the table is another cache's, and what failed there now may be mended before this one ends
            failures = tuple(sorted({**dict(failures), **_listed_failures(task, num_existing)}.items()))
        block, seconds = result.embeddings[num_existing - first :], dict(result.seconds)
        if task.existing:
            old = first_rows(task.existing.path, task.array, task.spec, task.shard, num_existing, task.existing.digest)
            block = np.concatenate([old, block])
    start = time.perf_counter()
    with phase("write"):
        chunk = attempt_chunk(task.store, task.array, task.spec, task.shard, block)
    seconds["write"] = time.perf_counter() - start
    record = ShardRecord(task.array, task.shard, len(block), chunk.digest, failures)
    attempts = (pack.attempt, chunk) if pack else (chunk,)
    rows, reasons = tuple(row for row, _ in absent), tuple(reason for _, reason in absent)
    return ShardDone(record, seconds, attempts, pack.record if pack else None, rows, reasons)


def _listed_failures(task: ShardTask, first: int) -> dict[int, str]:
    """Rows of the shard, from `first` on, that had failed when they were listed, and why."""
    assert task.table is not None
    rows = RowTable(task.table, task.spec.shape[0]).shard(task.shard, ["status", "reason"])
    listed = enumerate(zip(rows["status"], rows["reason"], strict=True))
    return {row: str(reason) for row, (status, reason) in listed if row >= first and status != OK}


def readable(task: ShardTask) -> list[Any]:
    """What each row of the shard is made from: the key of an image, or a sentence; None where it has failed."""
    assert task.table is not None
    columns = task.source.columns if task.source else ("text",)
    rows = RowTable(task.table, task.spec.shape[0]).shard(task.shard, [*columns, "status"])
    given = keys_of(task.source, rows) if task.source else rows["text"]
    return [value if status == OK else None for value, status in zip(given, rows["status"], strict=True)]


def _embed_images(
    task: ShardTask, keys: list[Any], first: int, teacher: Teacher, settings: TeacherSettings, lock: Lock
) -> tuple[ShardResult, ShardPack | None]:
    """Embed the images of a shard from row `first` on; `keys` begins there too."""
    assert task.source is not None
    start = task.shard * task.spec.chunk_rows + first
    crops = RowCrops(task.crops, np.arange(start, start + len(keys))) if task.crops else None
    skip = task.existing.num_rows - first if task.existing else 0
    with open_pack(task.pack, skip) as pack:
        result = embed_image_shard(teacher, task.source, keys, settings.batch_size, settings.workers, lock, pack, crops)
    return result, pack
