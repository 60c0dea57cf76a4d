"""`dimefm cache-teacher`: stage one, from sources to a finished cache. Safe to kill and to repeat.

The config is read here. Data passes once: list, embed, index, pairs, finish.
"""

import time
from typing import TYPE_CHECKING

import numpy as np

from ...cache.disk.arrays import declare_arrays
from ...cache.disk.durable import sweep_partials
from ...cache.disk.layout import Layout
from ...cache.disk.row_tables import FAILED, RowTable
from ...cache.errors import InputError
from ...cache.version.lock import writer_lock
from ...cache.version.plan_file import require_same, write_plan
from ...cache.version.schema import Inputs, Plan
from ...stages.inputs.image_source import ImageSource, row_keys
from ..config.load import Config
from ..config.remembered import note_config
from ..progress import say
from .add_pixels import add_pixels
from .embed_shards import embed_shards, missing_shards, teacher_at_hand
from .finish import finish_cache
from .free_space import require_disk
from .guards import check_run, is_finished, require_own_folder
from .inputs import list_inputs, transductive_sets_or_recorded
from .planned import make_plan, planned_specs
from .retry_failed import retry_failed
from .shared_rows import share_inputs
from .sources import Sources

if TYPE_CHECKING:
    from ...stages.models.teacher import Teacher

SAMPLE_ROWS = 256


def cache_teacher(config: Config, scheduler: str | None = None, *, retry: bool = False) -> None:
    """Run stage one to its end, or go on from where an earlier run stopped; a finished cache is left untouched.

    Args:
        scheduler: address of a Dask scheduler; None embeds in this process.
        retry: embed rows that have failed again, in a finished cache too.

    Raises:
        CacheError: if the cache was begun with another teacher, other inputs, or is being written by another process.
        InputError: if a source or the teacher is unusable, the disk too small, or too many images are unreadable.
    """
    layout, sources = Layout(config.cache.dir), Sources.of(config)
    if not retry and is_finished(layout, config.pairs, config.cache.pixels):
        for note in check_run(layout, config.teacher, config.cache, sources).notes:
            say(note)
        say(f"{layout.root}: finished; nothing to do")
        return
    require_own_folder(layout)
    with writer_lock(layout):
        start = time.perf_counter()
        if retry:
            retry_failed(config, layout, sources)
        if is_finished(layout, config.pairs, config.cache.pixels):  # perhaps by another process, while this one looked
            return
        sweep_partials(layout.root)
        note_config(config, layout)
        _run(config, layout, sources, scheduler)
        say(f"{layout.root}: finished in {time.perf_counter() - start:,.0f} s")


def _run(config: Config, layout: Layout, sources: Sources, scheduler: str | None) -> None:
    checked = check_run(layout, config.teacher, config.cache, sources)
    for note in checked.notes:
        say(note)
    plan = checked.plan
    if not checked.is_embedded:
        inputs = plan.inputs if plan else _list(config, layout, sources)
        if plan is None or not layout.text_tower.exists() or missing_shards(layout, plan, sources):
            plan = _embed(config, layout, sources, inputs, plan, scheduler)
    assert plan is not None
    if checked.is_embedded and config.cache.pixels:
        add_pixels(layout, plan, config.cache.pixels, sources.images, config.teacher.workers)
    transductive = transductive_sets_or_recorded(sources, layout)
    finish_cache(layout, plan, config.pairs, config.cache.pixels, transductive)


def _list(config: Config, layout: Layout, sources: Sources) -> Inputs:
    """List the sources into row tables, or share those of another cache."""
    say("listing images and sentences")
    for stale in (layout.journal, layout.timings):  # of a cache whose plan is gone: its shards are nobody's
        stale.unlink(missing_ok=True)
    shard_rows, other = config.cache.shard_rows, config.cache.rows
    if other is not None:
        return share_inputs(layout, Layout(other), shard_rows, sources.evaluate)
    return list_inputs(sources, layout, shard_rows)


def _embed(
    config: Config, layout: Layout, sources: Sources, inputs: Inputs, plan: Plan | None, scheduler: str | None
) -> Plan:
    """Load the teacher, check it, freeze the plan, and embed every shard that is missing."""
    from ...stages.models.frozen_text_tower import save_text_tower, text_tower_bytes

    with teacher_at_hand(config.teacher) as teacher:
        wanted = make_plan(layout, config.cache, teacher.identity(), inputs)
        tasks = missing_shards(layout, wanted, sources)
        has_tower = layout.text_tower.exists()
        if plan is None:
            _check_teacher(teacher, sources.images, layout)
        else:
            there, asked = plan.to_dict(), wanted.to_dict()
            require_same(layout.root, {key: there.get(key) for key in asked}, asked)
        require_disk(layout, wanted, tasks, config.pairs, 0 if has_tower else text_tower_bytes(teacher))
        if plan is None:
            write_plan(layout, wanted)
        declare_arrays(layout.teacher_zarr, planned_specs(wanted))
        if not has_tower:
            save_text_tower(teacher, layout.text_tower)
        profile, limits = config.cache.profile, config.cluster
        embed_shards(layout, wanted, tasks, sources, config.teacher, scheduler, limits, profile=profile)
    return wanted


def _check_teacher(teacher: "Teacher", source: ImageSource, layout: Layout) -> None:
    """Embed a few rows before the long run, show what came out, and stop if that cannot be a working teacher."""
    from ...stages.images.decode import ImageError, decode_image
    from ...stages.models.teacher_check import check_teacher

    def sample(table: RowTable) -> list[int]:
        status = table.column("status").to_pylist()
        good = [row for row, value in enumerate(status) if value != FAILED]
        return good[:: max(1, len(good) // SAMPLE_ROWS)][:SAMPLE_ROWS]

    images, sentences = RowTable(layout.image_rows), RowTable(layout.sentence_rows)
    crops, sampled = [], row_keys(source, images)(np.array(sample(images), dtype=np.int64))
    for key in sampled:
        try:
            crops.append(teacher.crop(decode_image(source.read(key))))
        except ImageError:
            continue  # it has its row's reason when its shard comes
    if not crops:
        raise InputError(f"images.source: {source.location}: none of {len(sampled)} sampled images is readable")
    for line in check_teacher(teacher, crops, sentences.take(sample(sentences), "text")):
        say(line)
