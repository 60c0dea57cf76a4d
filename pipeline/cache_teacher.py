"""`dimefm cache-teacher`: stage one, from source files to a finished cache. Safe to kill and to repeat."""

import time
from typing import Any

from ..cache.arrays import declare_arrays
from ..cache.durable import PARTIAL, sweep_partials
from ..cache.errors import CacheError, InputError
from ..cache.layout import Layout
from ..cache.lock import writer_lock
from ..cache.manifest import read_manifest
from ..cache.pixels import kept_setting
from ..cache.plan import identity, read_plan, require_same, write_plan
from ..cache.rows import FAILED, RowTable
from ..stages.teacher_identity import configured_identity
from .add_pixels import add_pixels
from .config import Config
from .config_of import note_config
from .embedding import embed_shards, missing_shards, planned_specs, require_disk, teacher_at_hand
from .finish import finish_cache, pairs_document
from .inputs import compare_inputs, freeze_inputs, transductive_sets
from .pixels import require_same_pixels
from .progress import say
from .siblings import share_inputs, shared_rows
from .views import require_same_views, views_document

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
        note_config(config, layout)
        _run(config, layout, scheduler)


def is_finished(config: Config, layout: Layout) -> bool:
    """Whether the manifest is there, its pairs are those that the config asks for, and it has pixels if those are.

    Raises:
        CacheError: if plan.json is not the one that the manifest was written for.
    """
    manifest = read_manifest(layout)
    if manifest is None:
        return False
    if not layout.plan.exists() or manifest.get("plan") != identity(layout):
        raise CacheError(f"{layout.root}: plan.json is not the one that manifest.json was written for; restore it")
    has_pixels = config.cache.pixels is None or kept_setting(manifest) is not None
    return bool(manifest.get("pairs_settings") == pairs_document(config.pairs)) and has_pixels


def _run(config: Config, layout: Layout, scheduler: str | None) -> None:
    start = time.perf_counter()
    plan = read_plan(layout)
    if plan is None:
        say("listing images and sentences")
        for stale in (layout.journal, layout.timings):  # of a cache whose plan is gone: its shards are nobody's
            stale.unlink(missing_ok=True)
        inputs = share_inputs(config, layout) if config.cache.rows else freeze_inputs(config, layout)
    else:
        for note in require_same_run(config, layout, plan):
            say(note)
        inputs = plan["inputs"]
        for name in sorted(set(inputs["evaluate"]) - set(config.evaluate)):
            if read_manifest(layout) is None:
                raise CacheError(
                    f"{layout.root}: begun with evaluate.{name}, which the config no longer has; put it back"
                )
    embedded = read_manifest(layout) is not None
    if plan is None or not (embedded or (layout.text_tower.exists() and not missing_shards(config, layout, plan))):
        plan = _embed(config, layout, inputs, plan, scheduler)
    if embedded:
        add_pixels(config, layout, plan)
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


def _embed(
    config: Config, layout: Layout, inputs: dict[str, Any], plan: dict[str, Any] | None, scheduler: str | None
) -> dict[str, Any]:
    """Load the teacher, check it, freeze the plan, and embed every shard that is missing."""
    from ..stages.text_tower import save_text_tower, text_tower_bytes

    with teacher_at_hand(config) as teacher:
        wanted = {"shard_rows": config.cache.shard_rows, "teacher": teacher.identity(), "inputs": inputs}
        wanted |= shared_rows(config, layout)
        wanted |= {"pixels": config.cache.pixels} if config.cache.pixels else {}
        wanted |= views_document(config)
        tower = 0 if layout.text_tower.exists() else text_tower_bytes(teacher)
        if plan is None:
            _check_teacher(config, layout, teacher)
            require_disk(config, layout, wanted, tower)
            write_plan(layout, wanted)
        else:
            require_same(layout.root, {key: plan[key] for key in wanted}, wanted)
            require_disk(config, layout, wanted, tower)
        declare_arrays(layout.teacher_zarr, planned_specs(wanted))
        tasks = missing_shards(config, layout, wanted)
        if not layout.text_tower.exists():
            save_text_tower(teacher, layout.text_tower)
        embed_shards(config, layout, wanted, tasks, scheduler)
    return wanted


def require_same_run(config: Config, layout: Layout, plan: dict[str, Any], *, report: bool = False) -> list[str]:
    """Refuse another run's cache by what is known without loading the teacher; returns notes on the inputs."""
    require_same_teacher(config, layout, plan)
    return compare_inputs(config, layout, plan, report=report)


def require_same_teacher(config: Config, layout: Layout, plan: dict[str, Any]) -> None:
    """Refuse a cache of another teacher, division, row tables, views or kept pixels, without loading the teacher."""
    wanted = configured_identity(config.teacher)
    found = {key: plan["teacher"].get(key) for key in wanted}
    require_same(layout.root, {"teacher": found}, {"teacher": wanted})
    require_same(layout.root, {"cache.shard_rows": plan["shard_rows"]}, {"cache.shard_rows": config.cache.shard_rows})
    rows_of = shared_rows(config, layout).get("rows_of")
    require_same(layout.root, {"cache.rows": plan.get("rows_of")}, {"cache.rows": rows_of})
    require_same_views(config, layout, plan)
    require_same_pixels(config, layout, plan)


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
