"""The long part of stage one and of an append: which shards are missing, and embedding them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from ...cache.audit.failures import failed_rows
from ...cache.disk.arrays import chunk_path
from ...cache.disk.durable import sweep_partials
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images, table_of
from ...cache.disk.row_tables import RowTable
from ...cache.errors import InputError
from ...cache.version.journal import Journal, ShardRecord
from ...cache.version.manifest import read_manifest
from ...cache.version.schema import Plan
from ...stages.embed.tasks import ExistingRows, ShardDone, ShardTask
from ...stages.images.crops import Crops
from ...stages.inputs.prompts import class_prompts
from ...stages.settings.cluster import ClusterSettings
from ...stages.settings.models import TeacherSettings
from ..progress import NAMES_SHOWN, bar, say, show_counts
from .absent_files import require_absent, require_few_absent
from .kept_packs import pack_task
from .planned import planned_specs, views_of
from .sources import Sources

if TYPE_CHECKING:
    from ...stages.models.teacher import Teacher

_SPENT = ("read", "decode", "keep", "infer", "wait", "write")


@contextmanager
def teacher_at_hand(settings: TeacherSettings) -> Iterator[Teacher]:
    """Load the teacher, for the caller and for the shards that are embedded meanwhile."""
    from ...stages.devices import resolve_device
    from ...stages.models.load_teacher import load_teacher
    from .cluster.worker_side import TEACHERS

    say(f"loading the teacher {settings.model} / {settings.pretrained}")
    teacher = load_teacher(settings, resolve_device(settings.device))
    TEACHERS.put(settings, teacher)
    try:
        yield teacher
    finally:
        TEACHERS.clear()


def missing_shards(layout: Layout, plan: Plan, sources: Sources) -> list[ShardTask]:
    """Shards that the journal does not count yet, in the order to embed them.

    Args:
        layout: the cache, or a version of it in the making: then a shard that has grown keeps the rows that it had.
    """
    journal, specs, store = Journal(layout), planned_specs(plan), layout.teacher_zarr
    before = read_manifest(layout.base) if layout.under else None
    crops = Crops.read(plan.views)

    def existing_rows(array: str, shard: int) -> ExistingRows | None:
        rows = before.arrays[array].rows if before and array in before.arrays else 0
        num_rows = rows - shard * specs[array].chunk_rows
        if not before or num_rows <= 0:
            return None
        old_store = layout.base.teacher_zarr
        name = layout.base.name_of(chunk_path(old_store, array, shard, len(specs[array].shape)))
        return ExistingRows(old_store, num_rows, before.files[name].digest)

    def shards_of(array: str) -> Iterator[ShardTask]:
        spec, source = specs[array], sources.images_of(array)
        for shard in range(spec.num_chunks):
            is_packed = array == IMAGES and plan.pixels
            pack = pack_task(layout, plan.pixels, shard, plan, before) if is_packed and plan.pixels else None
            counted = [array, pack.array] if pack else [array]
            if not all(journal.has(name, shard, spec.rows_of(shard)) for name in counted):
                yield ShardTask(
                    "images" if source else "sentences",
                    store,
                    array,
                    spec,
                    shard,
                    table=table_of(layout, array),
                    source=source,
                    existing=existing_rows(array, shard),
                    pack=pack,
                    crops=crops if array == IMAGES else None,
                    is_shared=plan.rows_of is not None,
                )

    tasks = [*shards_of(IMAGES), *shards_of(SENTENCES)]
    for name, labelled in sources.evaluate.items():
        if name in plan.inputs.evaluate:
            tasks += shards_of(evaluate_images(name))
            head = evaluate_head(name)
            if not journal.has(head, 0, specs[head].rows_of(0)):  # its prompts are files that may be gone by now
                prompts = tuple(map(tuple, class_prompts(labelled.settings)))
                tasks.append(ShardTask("head", store, head, specs[head], 0, prompts=prompts))
    return tasks


def embed_shards(
    layout: Layout,
    plan: Plan,
    tasks: Sequence[ShardTask],
    sources: Sources,
    settings: TeacherSettings,
    scheduler: str | None,
    limits: ClusterSettings | None = None,
    *,
    profile: bool = False,
) -> None:
    """Embed shards, commit each and count it in the journal, once; say how it goes and where the time went.

    Args:
        limits: how long is waited for a scheduler and its workers.
        profile: whether to profile it, into `log/profile/` of the cache.

    Raises:
        InputError: if more images are unreadable than `images.max_failed` allows.
    """
    from ...stages.profiling import profiled
    from .cluster.dispatch import run_shards

    journal, of_shard = Journal(layout), {(task.array, task.shard): task for task in tasks}
    failed = dict(failed_rows(layout, plan, IMAGES))
    _require_few_failures(layout, plan, sources, failed)
    # The unit is an embedding: a row of an image with K crops takes as long as 1 + K rows of other arrays.
    left = sum(task.num_rows * views_of(task.spec) for task in tasks)
    total = sum(spec.shape[0] * views_of(spec) for spec in planned_specs(plan).values())
    done = total - left
    spent: Counter[str] = Counter()
    aside: list[ShardTask] = []
    start = time.perf_counter()
    folder = layout.base.root / "log" / "profile" if profile else None
    if folder and scheduler:
        say("cache.profile: looks at this process alone, and with --scheduler others embed; run without it to see more")

    def embed(wanted: Sequence[ShardTask], *, again: bool = False) -> Generator[tuple[ShardTask, ShardDone]]:
        for shard in run_shards(wanted, settings, plan.teacher.weights, scheduler, limits):
            task = of_shard[shard.record.array, shard.record.shard]
            require_few_absent(task, shard, sources.max_failed)
            if again:
                require_absent(task, shard)
            yield task, shard

    def count(task: ShardTask, shard: ShardDone) -> None:
        nonlocal done
        record = shard.settled()
        failures = failures_of(record, plan.shard_rows) if record.array == IMAGES else {}
        if shard.absent:  # refused before it counts: what is put back later must not be a failure
            _require_few_failures(layout, plan, sources, failed | failures)
        shard.commit()
        if shard.pack:  # a shard without its pack, or a pack without its shard, is made again with it
            journal.add(shard.pack, {})
        journal.add(record, shard.seconds)
        spent.update(shard.seconds)
        done += record.num_rows * views_of(task.spec)
        shown.update(done)
        failed.update(failures)
        _require_few_failures(layout, plan, sources, failed)

    try:
        with profiled(folder, say), bar("stage one", total, "embeddings", done) as shown:
            with closing(embed(tasks)) as embedded:
                for task, shard in embedded:
                    if shard.absent:
                        shard.discard()
                        aside.append(task)
                    else:
                        count(task, shard)
            if aside:
                say(f"some images of {len(aside):,} shards could not be reached: these shards are tried once more")
                with closing(embed(aside, again=True)) as embedded:
                    for task, shard in embedded:
                        count(task, shard)
    finally:
        sweep_partials(layout.root)  # what was finished beside a failure, or by workers that were given up
    seconds, num_rows = time.perf_counter() - start, sum(task.num_rows for task in tasks)
    say(f"embedded {num_rows:,} rows in {seconds:,.1f} s, {num_rows / seconds:,.0f} rows/s")
    shares = ", ".join(f"{name} {spent[name]:,.1f} s" for name in _SPENT if name in spent)
    say(f"where the time went: {shares} (read, decode and keep are summed over threads; wait: the device had no data)")


def failures_of(record: ShardRecord, shard_rows: int) -> dict[int, str]:
    """Rows of an array that failed in a shard, and why."""
    return {record.shard * shard_rows + row: reason for row, reason in record.failures}


def _require_few_failures(layout: Layout, plan: Plan, sources: Sources, failed: Mapping[int, str]) -> None:
    if len(failed) > sources.max_failed * plan.inputs.images.rows:
        names = RowTable(table_of(layout, IMAGES), plan.inputs.images.rows).take(sorted(failed)[:NAMES_SHOWN], "source")
        more = f" and {len(failed) - len(names):,} more" if len(failed) > len(names) else ""
        raise InputError(
            f"images.source: {sources.images.location}: {len(failed):,} images have no embedding "
            f"({show_counts(Counter(failed.values()))}): {', '.join(map(repr, names))}{more}; more than "
            f"images.max_failed = {sources.max_failed:g} allows; `dimefm cache inspect {layout.base.root} --failed` "
            "lists them. Mend them and run `dimefm cache-teacher --retry-failed` with this config, or raise "
            "images.max_failed"
        )
