"""A second teacher over the same rows: a cache that shares another one's row tables (`cache.rows`) and copies none."""

import os
from collections.abc import Collection

from ...cache.disk.durable import sync_folder
from ...cache.disk.layout import Layout
from ...cache.errors import CacheError, InputError
from ...cache.version.manifest import read_manifest
from ...cache.version.plan_file import read_plan
from ...cache.version.schema import Inputs


def share_inputs(layout: Layout, other: Layout, shard_rows: int, sets: Collection[str]) -> Inputs:
    """Link another cache's row tables into a new one.

    Args:
        sets: names of the labelled sets that are wanted.

    Returns:
        The inputs of that cache, without labelled sets that are not wanted.

    Raises:
        InputError: if the other cache is unfinished or divided otherwise, or lacks one of the labelled sets.
        CacheError: if the new cache has row tables already.
    """
    plan = read_plan(other)
    if plan is None or read_manifest(other) is None:
        raise InputError(f"cache.rows: {other.root}: not a finished cache; run `dimefm cache-teacher` on its config")
    if plan.shard_rows != shard_rows:
        raise InputError(
            f"cache.rows: {other.root} has cache.shard_rows = {plan.shard_rows}, this config {shard_rows}; "
            "wanted the same"
        )
    lacking = sorted(set(sets) - set(plan.inputs.evaluate))
    if lacking:
        raise InputError(
            f"evaluate.{lacking[0]}: {other.root}, whose rows this cache shares, does not have it; "
            "let that one `dimefm cache append` it first"
        )
    _link(layout, other)
    return plan.inputs.replace(evaluate={name: plan.inputs.evaluate[name] for name in sets})


def _link(layout: Layout, other: Layout) -> None:
    rows = layout.image_rows.parent
    target = os.path.relpath(other.image_rows.parent, layout.root)
    if rows.is_symlink() and os.readlink(rows) == target:  # noqa: PTH115 - compared as it was written
        return
    if rows.exists() or rows.is_symlink():
        raise CacheError(f"{rows}: is there already; cache.rows wants a new cache.dir")
    rows.symlink_to(target)
    sync_folder(layout.root)
