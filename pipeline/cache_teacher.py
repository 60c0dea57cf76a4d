"""`dimefm cache-teacher`: stage one, from source files to a finished cache. Safe to kill and to repeat."""

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..cache.arrays import ArraySpec, declare_arrays
from ..cache.durable import PARTIAL, sweep_partials
from ..cache.errors import CacheError, InputError
from ..cache.journal import Journal, ShardRecord
from ..cache.layout import IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from ..cache.lock import writer_lock
from ..cache.manifest import read_manifest
from ..cache.plan import identity, read_plan, require_same, write_plan
from ..cache.rows import FAILED, RowTable
from ..stages.shard import ShardTask
from ..stages.teacher_identity import configured_identity
from .config import Config
from .finish import counted_reasons, finish_cache, pairs_document
from .inputs import compare_inputs, evaluate_prompts, freeze_inputs, transductive_sets
from .pairs import retrieval_bytes
from .progress import bar, say

SAMPLE_ROWS = 256


def cache_teacher(config: Config, scheduler: str | None = None) -> None:
    """Run stage one to its end, or go on from where an earlier run stopped; a finished cache is left untouched.

    Args:
        scheduler: address of a Dask scheduler; None embeds in this process.

    Raises:
        CacheError: if the cache was begun with another teacher, other inputs, or is being written by another process.
        InputError: if a source or the teacher is unusable, the disk too small, or too many images are unreadable.
    """
    layout = Layout(config.cache.dir)
    if is_finished(config, layout):
        plan = read_plan(layout)
        assert plan is not None
        for note in require_same_run(config, layout, plan):
            say(note)
        say(f"{layout.root}: finished; nothing to do")
        return
    require_own_folder(layout)
    with writer_lock(layout):
        if is_finished(config, layout):  # by another process, while this one looked
            return
        sweep_partials(layout.root)
        _run(config, layout, scheduler)


def is_finished(config: Config, layout: Layout) -> bool:
    """Whether the manifest is there and its pairs are those that the config asks for.

    Raises:
        CacheError: if plan.json is not the one that the manifest was written for.
    """
    manifest = read_manifest(layout)
    if manifest is None:
        return False
    if not layout.plan.exists() or manifest.get("plan") != identity(layout):
        raise CacheError(f"{layout.root}: plan.json is not the one that manifest.json was written for; restore it")
    return bool(manifest.get("pairs_settings") == pairs_document(config.pairs))


def _run(config: Config, layout: Layout, scheduler: str | None) -> None:
    start = time.perf_counter()
    plan = read_plan(layout)
    if plan is None:
        say("listing images and sentences")
        for stale in (layout.journal, layout.timings):  # of a cache whose plan is gone: its shards are nobody's
            stale.unlink(missing_ok=True)
        inputs = freeze_inputs(config, layout)
    else:
        for note in require_same_run(config, layout, plan):
            say(note)
        inputs = plan["inputs"]
    embedded = read_manifest(layout) is not None
    if plan is None or not (embedded or (layout.text_tower.exists() and not _missing(config, layout, plan))):
        plan = _embed(config, layout, inputs, plan, scheduler)
    finish_cache(config, layout, plan, transductive_sets_or_recorded(config, layout))
    say(f"{layout.root}: finished in {time.perf_counter() - start:,.0f} s")


def transductive_sets_or_recorded(config: Config, layout: Layout) -> list[str]:
    """Evaluation sets that the prompts touch; as recorded before, where the class files are no longer at hand."""
    try:
        return transductive_sets(config)
    except InputError:
        manifest = read_manifest(layout)
        if manifest is None:
            raise
        return list(manifest["transductive"])


def array_specs(inputs: dict[str, Any], width: int, chunk: int) -> dict[str, ArraySpec]:
    """The arrays of `teacher.zarr`: inputs as plan.json has them, `width` of an embedding, `chunk` rows a file."""
    specs = {
        IMAGES: ArraySpec((inputs["images"]["rows"], width), "float16", chunk),
        SENTENCES: ArraySpec((inputs["sentences"]["rows"], width), "float16", chunk),
    }
    for name, item in inputs["evaluate"].items():
        specs[evaluate_images(name)] = ArraySpec((item["rows"], width), "float16", chunk)
        num_classes = len(item["class_ids"])
        specs[evaluate_head(name)] = ArraySpec((num_classes, width), "float32", num_classes)
    return specs


def _planned_specs(plan: dict[str, Any]) -> dict[str, ArraySpec]:
    return array_specs(plan["inputs"], plan["teacher"]["embed_dim"], plan["shard_rows"])


def _embed(
    config: Config, layout: Layout, inputs: dict[str, Any], plan: dict[str, Any] | None, scheduler: str | None
) -> dict[str, Any]:
    """Load the teacher, check it, freeze the plan, and embed every shard that is missing."""
    from ..stages.devices import resolve_device
    from ..stages.teacher import load_teacher
    from ..stages.text_tower import save_text_tower
    from .cluster import TEACHERS, run_shards

    say(f"loading the teacher {config.teacher.model} / {config.teacher.pretrained}")
    teacher = load_teacher(config.teacher, resolve_device(config.teacher.device))
    wanted = {"shard_rows": config.cache.shard_rows, "teacher": teacher.identity(), "inputs": inputs}
    if plan is None:
        _check_teacher(config, layout, teacher)
        _require_disk(config, layout, wanted)
        write_plan(layout, wanted)
    else:
        require_same(layout.root, {key: plan[key] for key in wanted}, wanted)
        _require_disk(config, layout, wanted)
    TEACHERS.put(config.teacher, teacher)
    try:
        declare_arrays(layout.teacher_zarr, _planned_specs(wanted))
        tasks = _missing(config, layout, wanted)
        if not layout.text_tower.exists():
            save_text_tower(teacher, layout.text_tower)
        _embed_shards(config, layout, wanted, tasks, scheduler, run_shards)
    finally:
        TEACHERS.clear()
    return wanted


def _embed_shards(
    config: Config, layout: Layout, plan: dict[str, Any], tasks: list[ShardTask], scheduler: str | None, run: Any
) -> None:
    journal = Journal(layout)
    limit = config.images.max_failed * plan["inputs"]["images"]["rows"]
    failed = _listed_failures(layout)
    for record in journal.of(IMAGES):
        failed |= _failures(record, plan["shard_rows"])
    _require_few_failures(config, layout, failed, limit)
    total = sum(spec.shape[0] for spec in _planned_specs(plan).values())
    embedded = total - sum(_num_rows(task) for task in tasks)
    spent: Counter[str] = Counter()
    start = time.perf_counter()
    with bar("stage one", total, "rows", embedded) as shown:
        for done in run(tasks, config.teacher, plan["teacher"]["weights"], scheduler):
            journal.add(done.record, done.seconds)
            spent.update(done.seconds)
            embedded += done.num_rows
            shown.update(embedded)
            if done.record.array == IMAGES:
                failed |= _failures(done.record, plan["shard_rows"])
                _require_few_failures(config, layout, failed, limit)
    seconds = time.perf_counter() - start
    num_rows = sum(_num_rows(task) for task in tasks)
    say(f"embedded {num_rows:,} rows in {seconds:,.1f} s, {num_rows / seconds:,.0f} rows/s")
    shares = ", ".join(f"{name} {spent[name]:,.1f} s" for name in ("read", "decode", "infer", "wait", "write"))
    say(f"where the time went: {shares} (read and decode are summed over threads; wait: the device had no data)")


def _missing(config: Config, layout: Layout, plan: dict[str, Any]) -> list[ShardTask]:
    """Shards that no journal line counts yet, in the order to embed them."""
    journal, tasks = Journal(layout), []
    specs = _planned_specs(plan)

    def add(kind: Any, array: str, **keys: Any) -> None:
        for shard in range(specs[array].num_chunks):
            if not journal.has(array, shard, specs[array].rows_of(shard)):
                tasks.append(ShardTask(kind, layout.teacher_zarr, array, specs[array], shard, **keys))

    add("images", IMAGES, table=layout.image_rows, root=config.images.source)
    add("sentences", SENTENCES, table=layout.sentence_rows)
    for name in sorted(set(plan["inputs"]["evaluate"]) - set(config.evaluate)):
        raise CacheError(f"{layout.root}: begun with evaluate.{name}, which the config no longer has; put it back")
    for name, settings in config.evaluate.items():
        add("images", evaluate_images(name), table=layout.evaluate_rows(name), root=settings.images)
        head = evaluate_head(name)
        if not journal.has(head, 0, specs[head].rows_of(0)):  # its prompts are files that may be gone by now
            add("head", head, prompts=tuple(tuple(of_class) for of_class in evaluate_prompts(settings)))
    return tasks


def _num_rows(task: ShardTask) -> int:
    return task.spec.rows_of(task.shard)


def require_same_run(config: Config, layout: Layout, plan: dict[str, Any]) -> list[str]:
    """Refuse another run's cache by what is known without loading the teacher; returns notes on the inputs."""
    wanted = configured_identity(config.teacher)
    found = {key: plan["teacher"].get(key) for key in wanted}
    require_same(layout.root, {"teacher": found}, {"teacher": wanted})
    require_same(layout.root, {"cache.shard_rows": plan["shard_rows"]}, {"cache.shard_rows": config.cache.shard_rows})
    return compare_inputs(config, layout, plan["inputs"])


def require_own_folder(layout: Layout) -> None:
    """Refuse a folder that holds something else than a teacher cache."""
    if not layout.root.exists():
        return
    if not layout.root.is_dir():
        raise CacheError(f"{layout.root}: a file; cache.dir wants a folder")
    names = {path.name for path in layout.root.iterdir() if path.suffix != PARTIAL}
    foreign = sorted(names - layout.first_names)
    if foreign and not layout.plan.exists():
        raise CacheError(
            f"{layout.root}: holds {foreign[0]!r}, which is not a teacher cache's; choose an empty cache.dir"
        )


def _check_teacher(config: Config, layout: Layout, teacher: Any) -> None:
    """Embed a few rows before the long run, show what came out, and stop if that cannot be a working teacher."""
    from ..stages.check import check_teacher
    from ..stages.images import ImageError, read_image

    def sample(table: RowTable, column: str) -> list[str]:
        status = table.column("status").to_pylist()
        good = [row for row, value in enumerate(status) if value != FAILED]
        return table.take(good[:: max(1, len(good) // SAMPLE_ROWS)][:SAMPLE_ROWS], column)

    crops, sampled = [], sample(RowTable(layout.image_rows), "source")
    for source in sampled:
        try:
            crops.append(teacher.crop(read_image(config.images.source / source)))
        except ImageError:
            continue  # it has its row's reason when its shard comes
    if not crops:
        raise InputError(f"images.source: {config.images.source}: none of {len(sampled)} sampled images is readable")
    for line in check_teacher(teacher, crops, sample(RowTable(layout.sentence_rows), "text")).lines():
        say(line)


def _require_disk(config: Config, layout: Layout, plan: dict[str, Any]) -> None:
    specs = _planned_specs(plan)
    missing = sum(task.spec.chunk_bytes for task in _missing(config, layout, plan))
    sides = [specs[IMAGES].shape, specs[SENTENCES].shape]
    wanted = missing + retrieval_bytes(sides, config.pairs)
    free = shutil.disk_usage(existing_parent(layout.root)).free
    if wanted > free:
        raise InputError(
            f"{layout.root}: what is missing takes {wanted / 1e9:,.2f} GB and the disk has {free / 1e9:,.2f} GB free; "
            "free some or choose another cache.dir"
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there, or the path itself."""
    return path if path.exists() else existing_parent(path.parent)


def _listed_failures(layout: Layout) -> dict[int, str]:
    """Rows of images that were refused when they were listed, and those that a run before this one has marked."""
    table = RowTable(layout.image_rows)
    status, reason = (table.column(name).to_pylist() for name in ("status", "reason"))
    return {row: why for row, (what, why) in enumerate(zip(status, reason, strict=True)) if what == FAILED}


def _failures(record: ShardRecord, shard_rows: int) -> dict[int, str]:
    return {record.shard * shard_rows + row: reason for row, reason in record.failures}


def _require_few_failures(config: Config, layout: Layout, failed: dict[int, str], limit: float) -> None:
    if len(failed) > limit:
        raise InputError(
            f"images.source: {config.images.source}: {len(failed):,} images have no embedding "
            f"({counted_reasons(Counter(failed.values()))}), more than images.max_failed = "
            f"{config.images.max_failed:g} allows; mend them and delete {layout.root}, or raise images.max_failed"
        )
