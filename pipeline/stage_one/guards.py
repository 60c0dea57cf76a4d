"""Whether a cache is this run's: all that is refused before the teacher is loaded, in one pass."""

from dataclasses import dataclass, field
from typing import Any

from ...cache.disk.durable import PARTIAL
from ...cache.disk.layout import Layout
from ...cache.errors import CacheError
from ...cache.reader.pixel_packs import kept_setting
from ...cache.version.manifest import read_manifest
from ...cache.version.plan_file import identity, read_plan, require_same
from ...cache.version.schema import Plan, Views
from ...stages.models.teacher_identity import configured_identity, recorded_identity
from ...stages.settings.cache import CENTER, CacheSettings, PairsSettings
from ...stages.settings.models import TeacherSettings
from .planned import asked_views, rows_of
from .pseudo_pairs import pairs_document
from .source_changes import compare_inputs
from .sources import Sources

MISSING = "nothing"


@dataclass(frozen=True)
class CheckedRun:
    """What a run found of its cache, and may go on with.

    Attributes:
        plan: None where stage one has not begun.
        is_embedded: the cache has a manifest: nothing is left to embed.
        notes: lines to show about sources that have changed since they were listed.
    """

    plan: Plan | None
    is_embedded: bool = False
    notes: list[str] = field(default_factory=list)


def check_run(
    layout: Layout, teacher: TeacherSettings, cache: CacheSettings, sources: Sources, *, report: bool = False
) -> CheckedRun:
    """Refuse a cache of other settings or other inputs; the teacher is not loaded for it.

    Args:
        report: say what has become of lines of sentences, rather than refuse a run that has other ones.

    Raises:
        CacheError: naming the key that differs.
    """
    plan, is_embedded = read_plan(layout), read_manifest(layout) is not None
    if plan is None:
        return CheckedRun(None)
    require_same_settings(layout, plan, teacher, cache)
    notes = compare_inputs(sources, layout, plan, report=report)
    removed = sorted(set(plan.inputs.evaluate) - set(sources.evaluate))
    if removed and not is_embedded and not report:
        raise CacheError(
            f"{layout.root}: begun with evaluate.{removed[0]}, which the config no longer has; put it back"
        )
    return CheckedRun(plan, is_embedded, notes)


def is_finished(layout: Layout, pairs: PairsSettings, pixels: str | None) -> bool:
    """Whether the manifest is there, its pairs are those that are asked for, and it has pixels if those are.

    Raises:
        CacheError: if plan.json is not the one that the manifest was written for.
    """
    manifest = read_manifest(layout)
    if manifest is None:
        return False
    if not layout.plan.exists() or manifest.plan != identity(layout):
        raise CacheError(f"{layout.root}: plan.json is not the one that manifest.json was written for; restore it")
    has_pixels = pixels is None or kept_setting(manifest) is not None
    return manifest.pairs_settings == pairs_document(pairs) and has_pixels


def require_same_settings(layout: Layout, plan: Plan, teacher: TeacherSettings, cache: CacheSettings) -> None:
    """Refuse a cache of another teacher, division, row tables, views or kept pixels."""
    wanted = configured_identity(teacher)
    there = recorded_identity(plan.teacher.to_dict(), wanted)
    asked_views_, views = asked_views(cache), plan.views
    for found, asked in (
        ({"teacher": there}, {"teacher": wanted}),
        ({"cache.shard_rows": plan.shard_rows}, {"cache.shard_rows": cache.shard_rows}),
        ({"cache.rows": plan.rows_of}, {"cache.rows": rows_of(layout, cache)}),
        ({"cache.views": _count(views)}, {"cache.views": _count(asked_views_)}),
        ({"cache": {"crops": _crops(views)}}, {"cache": {"crops": _crops(asked_views_)}}),
    ):
        require_same(layout.root, found, asked)
    _require_same_pixels(layout, plan, cache.pixels)


def _count(views: Views | None) -> int | str:
    return views.count if views else CENTER


def _crops(views: Views | None) -> dict[str, Any]:
    return views.crops if views else {}


def _require_same_pixels(layout: Layout, plan: Plan, asked: str | None) -> None:
    """Refuse a cache whose pixels are kept otherwise. A config without the key leaves a finished cache as it is."""
    manifest = read_manifest(layout)
    there = kept_setting(manifest) if manifest else plan.pixels
    if there == asked or (manifest and (there is None or asked is None)):
        return
    advice = "choose another cache.dir, or ask for the same"
    if manifest is None:
        advice = "ask for the same until it is finished (a finished cache can still be given pixels), or delete it"
    raise CacheError(
        f"{layout.root}: made with cache.pixels = {there or MISSING}, but this run asks for {asked or MISSING}; "
        f"{advice}"
    )


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
