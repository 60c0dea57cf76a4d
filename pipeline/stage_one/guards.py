"""Whether a cache is this run's: refused before the teacher is loaded, by one key's name."""

from typing import Any

from ...cache.disk.durable import PARTIAL
from ...cache.disk.layout import Layout
from ...cache.errors import CacheError
from ...cache.reader.pixel_packs import kept_setting
from ...cache.version.manifest import read_manifest
from ...cache.version.plan_file import identity, require_same
from ...stages.models.teacher_identity import configured_identity
from ..config.load import Config
from .cached_views import require_same_views
from .inputs import compare_inputs
from .kept_packs import require_same_pixels
from .pseudo_pairs import pairs_document
from .shared_rows import shared_rows


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
