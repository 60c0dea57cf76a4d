"""Whether the disk holds what is about to be written."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ...cache.disk.layout import IMAGES, SENTENCES, Layout
from ...cache.errors import InputError
from ...cache.version.schema import Plan
from ...stages.embed.tasks import ShardTask
from ...stages.settings.cache import PairsSettings
from .kept_packs import image_sizes, pack_bytes
from .planned import planned_specs
from .pseudo_pairs import retrieval_bytes


def require_disk(layout: Layout, plan: Plan, tasks: Sequence[ShardTask], pairs: PairsSettings, also: int = 0) -> None:
    """Refuse to begin what the disk cannot hold: shards and packs, indexes, pairs, copies of row tables.

    Args:
        tasks: shards that are missing.
        also: bytes of what else is to be written.

    Raises:
        InputError: with what it takes and what is free.
    """
    specs = planned_specs(plan)
    wanted = also + sum(task.spec.chunk_bytes for task in tasks)
    wanted += sum(path.stat().st_size for path in layout.root.glob("rows/**/*.parquet"))
    wanted += retrieval_bytes([(specs[side].shape[0], specs[side].shape[-1]) for side in (IMAGES, SENTENCES)], pairs)
    if plan.pixels:
        sizes = image_sizes(layout, specs[IMAGES].shape[0])
        firsts = [task.shard * plan.shard_rows for task in tasks if task.pack]
        wanted += sum(pack_bytes(plan.pixels, sizes[first : first + plan.shard_rows]) for first in firsts)
    require_free(layout, wanted, estimated=bool(plan.pixels))


def require_free(layout: Layout, num_bytes: int, *, estimated: bool) -> None:
    """As `require_disk`, for a number of bytes."""
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
