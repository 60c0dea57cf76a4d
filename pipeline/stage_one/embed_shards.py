"""The long part of stage one and of growth: which shards are missing, and embedding them."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...cache.disk.arrays import ArraySpec, chunk_path
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from ...cache.disk.row_tables import FAILED, RowTable
from ...cache.errors import InputError
from ...cache.version.journal import Journal, ShardRecord
from ...cache.version.manifest import read_manifest
from ...stages.embed.tasks import ExistingRows, PackTask, ShardTask
from ...stages.images.crops import Crops
from ...stages.inputs.image_source import ImageSource
from ...stages.inputs.open_source import open_source
from ..config.load import Config
from ..progress import bar, say
from .cached_views import num_crops
from .inputs import evaluate_prompts
from .kept_packs import image_sizes, pack_bytes, pack_task
from .pseudo_pairs import retrieval_bytes

if TYPE_CHECKING:
    from ...stages.models.teacher import Teacher

_SPENT = ("read", "decode", "keep", "infer", "wait", "write")


@contextmanager
def teacher_at_hand(config: Config) -> Iterator["Teacher"]:
    """Load the config's teacher, for the caller and for the shards that are embedded meanwhile."""
    from ...stages.devices import resolve_device
    from ...stages.models.load_teacher import load_teacher
    from .cluster import TEACHERS

    say(f"loading the teacher {config.teacher.model} / {config.teacher.pretrained}")
    teacher = load_teacher(config.teacher, resolve_device(config.teacher.device))
    TEACHERS.put(config.teacher, teacher)
    try:
        yield teacher
    finally:
        TEACHERS.clear()


def array_specs(inputs: dict[str, Any], width: int, chunk: int, num_crops: int = 0) -> dict[str, ArraySpec]:
    """The arrays of `teacher.zarr`.

    Args:
        inputs: as plan.json has them.
        width: of an embedding.
        chunk: rows of a file.
        num_crops: crops of each training image beside its centre.
    """
    views = (1 + num_crops,) if num_crops else ()
    specs = {
        IMAGES: ArraySpec((inputs["images"]["rows"], *views, width), "float16", chunk),
        SENTENCES: ArraySpec((inputs["sentences"]["rows"], width), "float16", chunk),
    }
    for name, item in inputs["evaluate"].items():
        specs[evaluate_images(name)] = ArraySpec((item["rows"], width), "float16", chunk)
        num_classes = len(item["class_ids"])
        specs[evaluate_head(name)] = ArraySpec((num_classes, width), "float32", num_classes)
    return specs


def planned_specs(plan: dict[str, Any]) -> dict[str, ArraySpec]:
    """The arrays of a plan."""
    return array_specs(plan["inputs"], plan["teacher"]["embed_dim"], plan["shard_rows"], num_crops(plan))


def missing_shards(config: Config, layout: Layout, plan: dict[str, Any]) -> list[ShardTask]:
    """Shards that no journal line counts yet, in the order to embed them.

    Args:
        layout: the cache, or a version of it in the making: then a shard that has grown keeps the rows that it had.
    """
    journal, tasks, crops = Journal(layout), [], Crops.read(plan.views)
    specs = planned_specs(plan)
    before = read_manifest(layout.base) if layout.under else None

    def existing_rows(array: str, shard: int) -> ExistingRows | None:
        rows = before["arrays"].get(array, {"rows": 0})["rows"] if before else 0
        num_rows = rows - shard * specs[array].chunk_rows
        if not before or num_rows <= 0:
            return None
        store = layout.base.teacher_zarr
        name = layout.base.name_of(chunk_path(store, array, shard, len(specs[array].shape)))
        return ExistingRows(store, num_rows, before["files"][name]["digest"])

    def pack_of(array: str, shard: int) -> PackTask | None:
        if array != IMAGES or not plan.get("pixels"):
            return None
        return pack_task(layout, plan["pixels"], shard, plan, before)

    def add(kind: Literal["images", "sentences"], array: str, table: Path, source: ImageSource | None = None) -> None:
        for shard in range(specs[array].num_chunks):
            num_rows, pack = specs[array].rows_of(shard), pack_of(array, shard)
            counted = [array, pack.array] if pack else [array]
            if not all(journal.has(name, shard, num_rows) for name in counted):
                existing, found = existing_rows(array, shard), layout.find(table)
                task = ShardTask(
                    kind, layout.teacher_zarr, array, specs[array], shard, found, source, (), existing, pack
                )
                tasks.append(replace(task, crops=crops) if array == IMAGES else task)

    add("images", IMAGES, layout.image_rows, open_source(config.images.source))
    add("sentences", SENTENCES, layout.sentence_rows)
    for name, settings in config.evaluate.items():
        if name in plan["inputs"]["evaluate"]:
            add("images", evaluate_images(name), layout.evaluate_rows(name), open_source(settings.images))
            head = evaluate_head(name)
            if not journal.has(head, 0, specs[head].rows_of(0)):  # its prompts are files that may be gone by now
                prompts = tuple(tuple(of_class) for of_class in evaluate_prompts(settings))
                tasks.append(ShardTask("head", layout.teacher_zarr, head, specs[head], 0, prompts=prompts))
    return tasks


def embed_shards(
    config: Config, layout: Layout, plan: dict[str, Any], tasks: list[ShardTask], scheduler: str | None
) -> None:
    """Embed shards and count each in the journal; say how it goes and where the time went.

    Raises:
        InputError: if more images are unreadable than `images.max_failed` allows.
    """
    from ...stages.profiling import profiled
    from .cluster import run_shards

    journal = Journal(layout)
    limit = config.images.max_failed * plan["inputs"]["images"]["rows"]
    failed = _known_failures(layout, journal, plan)
    _require_few_failures(config, layout, failed, limit)
    num_rows = sum(task.num_rows for task in tasks)
    total = sum(spec.shape[0] for spec in planned_specs(plan).values())
    embedded = total - num_rows
    spent: Counter[str] = Counter()
    start = time.perf_counter()
    profile = layout.base.root / "log" / "profile" if config.cache.profile else None
    if profile and scheduler:
        say("cache.profile: looks at this process alone, and with --scheduler others embed; run without it to see more")
    with profiled(profile, say), bar("stage one", total, "rows", embedded) as shown:
        for done in run_shards(tasks, config.teacher, plan["teacher"]["weights"], scheduler):
            if done.pack:  # a shard without its pack, or a pack without its shard, is made again with it
                journal.add(done.pack, {})
            journal.add(done.record, done.seconds)
            spent.update(done.seconds)
            embedded += done.record.num_rows
            shown.update(embedded)
            if done.record.array == IMAGES:
                failed |= _failures(done.record, plan["shard_rows"])
                _require_few_failures(config, layout, failed, limit)
    seconds = time.perf_counter() - start
    say(f"embedded {num_rows:,} rows in {seconds:,.1f} s, {num_rows / seconds:,.0f} rows/s")
    shares = ", ".join(f"{name} {spent[name]:,.1f} s" for name in _SPENT if name in spent)
    say(f"where the time went: {shares} (read, decode and keep are summed over threads; wait: the device had no data)")


def require_disk(config: Config, layout: Layout, plan: dict[str, Any], also: int = 0) -> None:
    """Refuse to begin what the disk cannot hold: shards and packs that are missing, indexes, pairs, copies of tables.

    Args:
        also: bytes of what else is to be written.

    Raises:
        InputError: with what it takes and what is free.
    """
    specs = planned_specs(plan)
    tasks = missing_shards(config, layout, plan)
    wanted = also + sum(task.spec.chunk_bytes for task in tasks)
    wanted += sum(path.stat().st_size for path in layout.root.glob("rows/**/*.parquet"))
    wanted += retrieval_bytes(
        [(spec.shape[0], spec.shape[-1]) for spec in (specs[IMAGES], specs[SENTENCES])], config.pairs
    )
    if plan.get("pixels"):
        sizes = image_sizes(layout, specs[IMAGES].shape[0])
        shards = [task.shard for task in tasks if task.pack]
        parts = (sizes[shard * plan["shard_rows"] : (shard + 1) * plan["shard_rows"]] for shard in shards)
        wanted += sum(pack_bytes(plan["pixels"], part) for part in parts)
    require_free(layout, wanted, estimated=bool(plan.get("pixels")))


def require_free(layout: Layout, num_bytes: int, *, estimated: bool) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        InputError: with what it takes and what is free.
    """
    free = shutil.disk_usage(existing_parent(layout.root)).free
    if num_bytes > free:
        about = "about " if estimated else ""
        raise InputError(
            f"{layout.root}: what is missing takes {about}{num_bytes / 1e9:,.2f} GB and the disk has "
            f"{free / 1e9:,.2f} GB free; free some or choose another cache.dir"
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there, or the path itself."""
    return path if path.exists() else existing_parent(path.parent)


def counted_reasons(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts in one line, the most frequent first."""
    return ", ".join(f"{count:,} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def _known_failures(layout: Layout, journal: Journal, plan: dict[str, Any]) -> dict[int, str]:
    """Images that were refused when they were listed, or could not be embedded so far: row and reason."""
    table = RowTable(layout.find(layout.image_rows), plan["inputs"]["images"]["rows"])
    status, reason = (table.column(name).to_pylist() for name in ("status", "reason"))
    failed = {row: why for row, (what, why) in enumerate(zip(status, reason, strict=True)) if what == FAILED}
    for record in journal.of(IMAGES):
        failed |= _failures(record, plan["shard_rows"])
    return failed


def _failures(record: ShardRecord, shard_rows: int) -> dict[int, str]:
    return {record.shard * shard_rows + row: reason for row, reason in record.failures}


def _require_few_failures(config: Config, layout: Layout, failed: dict[int, str], limit: float) -> None:
    if len(failed) > limit:
        raise InputError(
            f"images.source: {config.images.source}: {len(failed):,} images have no embedding "
            f"({counted_reasons(Counter(failed.values()))}), more than images.max_failed = "
            f"{config.images.max_failed:g} allows; mend them and delete {layout.root}, or raise images.max_failed"
        )
