"""`dimefm cache append`: new images, sentences and evaluation sets join a finished cache; nothing is embedded twice.

The next version is made in `next/` (cache/version/versions.py), so the version in force stays whole and its readers are
not disturbed. An append that was killed goes on with the list of new rows that it began with.
"""

import time
from pathlib import Path

from ...cache.disk.arrays import declare_arrays
from ...cache.disk.layout import Layout
from ...cache.errors import CacheError, InputError
from ...cache.reader.pixel_packs import kept_setting
from ...cache.version.lock import writer_lock
from ...cache.version.manifest import read_manifest
from ...cache.version.plan_file import identity, read_plan, require_same, write_plan
from ...cache.version.schema import GrowthStep, Plan
from ...cache.version.versions import discard_change
from ...stages.images.crops import decoder
from ..config.load import Config
from ..config.remembered import ConfigChoice, config_of, note_config
from ..progress import say
from ..stage_one.embed_shards import embed_shards, missing_shards, teacher_at_hand
from ..stage_one.finish import finish_cache
from ..stage_one.free_space import require_disk
from ..stage_one.guards import require_same_settings
from ..stage_one.inputs import transductive_sets
from ..stage_one.planned import planned_specs
from ..stage_one.source_changes import compare_inputs
from ..stage_one.sources import Sources
from .growth import Growth, find_growth, stage_growth


def append_to(folder: Path, config: ConfigChoice | Path | None = None, scheduler: str | None = None) -> bool:
    """`append` for a cache's folder; its config is the one given, or the one that it was made by."""
    loaded = config_of(Layout(folder), config)
    return append(loaded, Layout(loaded.cache.dir), scheduler)


def append(config: Config, layout: Layout, scheduler: str | None = None) -> bool:
    """Take into a finished cache what its sources have gained, or go on with an append that was interrupted.

    New images follow the old ones, sorted among themselves; new lines follow all sentences that are there, prompts
    too; then new prompts. Rows never move.

    Args:
        scheduler: address of a Dask scheduler; None embeds in this process.

    Returns:
        Whether there was anything to append.

    Raises:
        CacheError: if the cache is unfinished, of another teacher, damaged where it has to grow or being written by
            another process, or if its sources have changed otherwise than by growing.
        InputError: if a source or the teacher is unusable, the disk too small, or too many images are unreadable.
    """
    if read_manifest(layout) is None:
        raise CacheError(f"{layout.root}: not a finished cache; `dimefm cache-teacher` makes and finishes one")
    with writer_lock(layout):
        start = time.perf_counter()
        plan, manifest = read_plan(layout), read_manifest(layout)
        assert plan is not None and manifest is not None
        require_same_settings(layout, plan, config.teacher, config.cache)
        sources, pixels = Sources.of(config), kept_setting(manifest)
        if config.cache.pixels and not pixels:
            say(f"cache.pixels: {layout.root} has none yet; `dimefm cache-teacher` adds them, append does not")
        note_config(config, layout)
        following, growth = layout.next, None
        staged = _interrupted_plan(layout, pixels)
        if staged is None:
            growth = find_growth(sources, layout, plan)
            if not growth:
                say(f"{layout.root}: nothing to append")
                return False
            say(growth.line())
        else:
            say("going on with an append that was interrupted; what has come since is for the next one")
            for note in compare_inputs(sources, following, staged):
                say(note)
        if staged is None or missing_shards(following, staged, sources):
            staged = _embed(config, layout, sources, plan, staged, growth, scheduler)
        finish_cache(
            following, staged, config.pairs, config.cache.pixels, _transductive(sources, manifest.transductive)
        )
        say(f"{layout.root}: appended in {time.perf_counter() - start:,.0f} s")
    return True


def _interrupted_plan(layout: Layout, pixels: str | None) -> Plan | None:
    """The plan of an interrupted append to the version in force; what is left of any other append is removed.

    Args:
        pixels: setting of the pixels that the cache keeps; they may have been added since.
    """
    path = layout.next.plan
    staged = Plan.read(path) if path.exists() else None
    if staged and staged.grown[-1].plan == identity(layout) and staged.pixels == pixels:
        return staged
    discard_change(layout)
    return None


def _embed(
    config: Config,
    layout: Layout,
    sources: Sources,
    plan: Plan,
    staged: Plan | None,
    growth: Growth | None,
    scheduler: str | None,
) -> Plan:
    """Load the teacher, list the new rows unless that is done, and embed every shard that is missing."""
    following = layout.next
    with teacher_at_hand(config.teacher) as teacher:
        found = teacher.identity()
        libraries = found.pop("libraries")
        # Other library versions may change the last bits and nothing more: the plan says which rows they embedded.
        made_with = {key: value for key, value in plan.teacher.to_dict().items() if key in found}
        require_same(layout.root, {"teacher": made_with}, {"teacher": found})
        if staged is None:
            assert growth is not None
            rows = {name: spec.shape[0] for name, spec in planned_specs(plan).items()}
            step = GrowthStep(plan=identity(layout), rows=rows, libraries=libraries)
            step = step.replace(decoder=decoder()) if plan.views else step
            staged = plan.replace(inputs=stage_growth(sources, layout, plan, growth), grown=[*plan.grown, step])
            if pixels := kept_setting(read_manifest(layout)):
                staged = staged.replace(pixels=pixels)
            require_disk(following, staged, missing_shards(following, staged, sources), config.pairs)
            write_plan(following, staged)
        began_with = {"teacher": {"libraries": staged.grown[-1].libraries}}
        require_same(following.root, began_with, {"teacher": {"libraries": libraries}})
        declare_arrays(following.teacher_zarr, planned_specs(staged))
        tasks = missing_shards(following, staged, sources)
        profile, limits = config.cache.profile, config.cluster
        embed_shards(following, staged, tasks, sources, config.teacher, scheduler, limits, profile=profile)
    return staged


def _transductive(sources: Sources, recorded: list[str]) -> list[str]:
    """Evaluation sets whose class names are among the training prompts, those recorded earlier included."""
    try:
        return sorted({*recorded, *transductive_sets(sources)})
    except InputError:  # the class files are no longer at hand
        return sorted(recorded)
