"""`dimefm cache-teacher`: stage one, from source files to a finished cache. Safe to kill and to repeat."""

import time
from typing import Any

import numpy as np

from ...cache.disk.arrays import declare_arrays
from ...cache.disk.durable import sweep_partials
from ...cache.disk.layout import Layout
from ...cache.disk.row_tables import FAILED, RowTable
from ...cache.errors import CacheError, InputError
from ...cache.version.lock import writer_lock
from ...cache.version.manifest import read_manifest
from ...cache.version.plan_file import read_plan, require_same, write_plan
from ..config.load import Config
from ..config.remembered import note_config
from ..progress import say
from .add_pixels import add_pixels
from .cached_views import views_document
from .embed_shards import embed_shards, missing_shards, planned_specs, require_disk, teacher_at_hand
from .finish import finish_cache
from .guards import is_finished, require_own_folder, require_same_run
from .inputs import freeze_inputs, transductive_sets_or_recorded
from .shared_rows import share_inputs, shared_rows

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


def _embed(
    config: Config, layout: Layout, inputs: dict[str, Any], plan: dict[str, Any] | None, scheduler: str | None
) -> dict[str, Any]:
    """Load the teacher, check it, freeze the plan, and embed every shard that is missing."""
    from ...stages.models.frozen_text_tower import save_text_tower, text_tower_bytes

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


def _check_teacher(config: Config, layout: Layout, teacher: Any) -> None:
    """Embed a few rows before the long run, show what came out, and stop if that cannot be a working teacher."""
    from ...stages.images.decode import ImageError, decode_image
    from ...stages.inputs.image_source import row_keys
    from ...stages.inputs.open_source import open_source
    from ...stages.models.teacher_check import check_teacher

    def sample(table: RowTable) -> list[int]:
        status = table.column("status").to_pylist()
        good = [row for row, value in enumerate(status) if value != FAILED]
        return good[:: max(1, len(good) // SAMPLE_ROWS)][:SAMPLE_ROWS]

    source, images, sentences = (
        open_source(config.images.source),
        *map(RowTable, (layout.image_rows, layout.sentence_rows)),
    )
    crops, sampled = [], row_keys(source, images)(np.array(sample(images), dtype=np.int64))
    for key in sampled:
        try:
            crops.append(teacher.crop(decode_image(source.read(key))))
        except ImageError:
            continue  # it has its row's reason when its shard comes
    if not crops:
        raise InputError(f"images.source: {source.location}: none of {len(sampled)} sampled images is readable")
    for line in check_teacher(teacher, crops, sentences.take(sample(sentences), "text")).lines():
        say(line)
