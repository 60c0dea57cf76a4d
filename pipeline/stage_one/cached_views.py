"""The views of training images in the jobs: what a config asks for, and what a plan says."""

from collections.abc import Mapping
from typing import Any

from ...cache.disk.layout import Layout
from ...cache.version.plan_file import require_same
from ...stages.images.crops import decoder
from ...stages.settings.cache import CENTER, CropSettings
from ..config.load import Config


def views_document(config: Config) -> dict[str, Any]:
    """`views` of a new plan.json: nothing where the teacher's own view is all that is wanted."""
    if not config.cache.num_crops:
        return {}
    return {"views": {**_asked(config), "decoder": decoder()}}


def num_crops(plan: Mapping[str, Any]) -> int:
    """Crops of each training image that a plan has beside the centre."""
    return int(plan["views"]["count"]) if "views" in plan else 0


def require_same_views(config: Config, layout: Layout, plan: Mapping[str, Any]) -> None:
    """Refuse a cache of other views.

    Raises:
        CacheError: naming what is there and what is asked for.
    """
    there = plan.get("views", {"count": CENTER})
    found = {"views": there["count"], "crops": there.get("crops", {})}
    asked = _asked(config) if config.cache.num_crops else {"count": CENTER, "crops": {}}
    require_same(layout.root, {"cache": {"views": found["views"]}}, {"cache": {"views": asked["count"]}})
    require_same(layout.root, {"cache": {"crops": found["crops"]}}, {"cache": {"crops": asked["crops"]}})


def _asked(config: Config) -> dict[str, Any]:
    crops = config.cache.crops or CropSettings()
    return {"count": config.cache.num_crops, "crops": crops.model_dump(mode="json")}
