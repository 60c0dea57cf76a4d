"""Images that could not be reached: are they gone, or is their disk? Asked before a shard with such rows counts.

A disk that is not mounted leaves an empty folder behind, in which every image looks deleted. A shard that was read
then must not count: its rows would be failures for good.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.layout import IMAGES
from ...cache.disk.row_tables import OK, RowTable
from ...cache.errors import InputError
from ...stages.embed.tasks import ShardDone, ShardTask
from ...stages.images.decode import AbsentError, ImageError
from ...stages.inputs.image_source import row_keys
from ..progress import show_counts, some_names

SAMPLE_IMAGES = 16
"""Other images that are looked for when some cannot be reached."""

MOST_ABSENT = 0.01
"""Share of a shard's images that may be absent; `images.max_failed` where that allows more."""


def require_few_absent(task: ShardTask, done: ShardDone, max_failed: float) -> None:
    """Stop a run that does not see its images; a few that are absent from a folder that is there are let pass.

    Args:
        task: of the shard.
        done: what came of it; nothing of it counts yet.
        max_failed: share of images that may fail.

    Raises:
        InputError: if at least half of a sample of other images is absent too, or more than one image and more than
            `MOST_ABSENT` of the shard. A run that is started again once they are there goes on.
    """
    if not done.absent:
        return
    assert task.table is not None and task.source is not None
    absent = absent_rows(task, done)
    table = RowTable(task.table, task.spec.shape[0])
    key = "images.source" if task.array == IMAGES else f"evaluate.{task.array.split('/')[1]}.images"
    names, num = table.take(absent.tolist(), "source"), len(absent)
    what = f"{key}: {task.source.location}: {num:,} images that were listed cannot be reached"
    what += f" ({show_counts(Counter(done.absent_reasons))}): {some_names(names)}"
    others = _sample(table, absent)
    num_others = _count_absent(task, table, others)
    if 2 * num_others >= len(others):  # or all that there are
        looked = f", nor can {num_others} of {len(others)} others that were looked for" if len(others) else ""
        raise InputError(
            f"{what}{looked}; is the disk mounted? Nothing is lost: run the same command again once they are there"
        )
    if num > 1 and num > max(MOST_ABSENT, max_failed) * done.record.num_rows:
        raise InputError(
            f"{what}, of {done.record.num_rows:,} of their shard; is a disk not mounted? Nothing is lost: put them "
            "back and run the same command again, or raise images.max_failed to go on without them"
        )


def require_absent(task: ShardTask, done: ShardDone) -> None:
    """Stop a run if images that were absent twice where they were embedded can be reached here: they are no failures.

    Raises:
        InputError: naming the first ones.
    """
    if not done.absent:
        return
    assert task.table is not None and task.source is not None
    absent, table = absent_rows(task, done), RowTable(task.table, task.spec.shape[0])
    here = [row for row in absent.tolist() if not _count_absent(task, table, np.array([row]))]
    if here:
        raise InputError(
            f"{task.source.location}: {len(here):,} images that could not be reached twice are there now: "
            f"{some_names(table.take(here, 'source'))}; do all workers see the same folder, is its disk sound? Nothing "
            "is lost: run the same command again"
        )


def absent_rows(task: ShardTask, done: ShardDone) -> NDArray[np.int64]:
    """Row numbers, in their table, of a shard's images that could not be reached."""
    return task.shard * task.spec.chunk_rows + np.array(done.absent, dtype=np.int64)


def _sample(table: RowTable, absent: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of other images that could be looked at when they were listed, ascending."""
    status = table.column("status").to_numpy(zero_copy_only=False)
    good = np.setdiff1d(np.flatnonzero(status == OK), absent)
    chosen = np.random.default_rng(len(absent)).choice(good, min(SAMPLE_IMAGES, len(good)), replace=False)
    return np.sort(chosen).astype(np.int64)


def _count_absent(task: ShardTask, table: RowTable, rows: NDArray[np.int64]) -> int:
    assert task.source is not None
    num_absent = 0
    for key in row_keys(task.source, table)(rows):
        try:
            task.source.read(key)
        except AbsentError:
            num_absent += 1
        except ImageError:  # there, and of no use
            continue
    return num_absent
