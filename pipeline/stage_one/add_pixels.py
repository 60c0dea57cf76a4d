"""Pixels for a cache that is finished and has none: its images are decoded once more, and no teacher is loaded.

The packs lie in the cache's folder as they come, each counted in the journal; they become the cache's with the next
manifest. A pass that was killed goes on with the packs that are missing.
"""

import time

from ...cache.disk.layout import IMAGES, Layout
from ...cache.errors import InputError
from ...cache.reader.pixel_packs import kept_setting
from ...cache.version.journal import Journal
from ...cache.version.manifest import read_manifest
from ...cache.version.schema import Plan
from ...stages.embed.pack_pixels import pack_shard
from ...stages.inputs.image_source import ImageSource
from ..progress import bar, say
from .free_space import require_free
from .kept_packs import image_sizes, pack_bytes, pack_task, packed_images
from .planned import planned_specs


def add_pixels(layout: Layout, plan: Plan, setting: str, source: ImageSource, workers: int) -> None:
    """Write every pack that is asked for and not there yet; a cache that has pixels is left alone.

    Raises:
        InputError: if the images are not at hand, one of them is no longer what was embedded, or the disk is too small.
    """
    if kept_setting(read_manifest(layout)):
        return
    spec, journal, array = planned_specs(plan)[IMAGES], Journal(layout), layout.packs(setting)
    num_rows = spec.shape[0]
    missing = [shard for shard in range(spec.num_chunks) if not journal.has(array, shard, spec.rows_of(shard))]
    if not missing:
        return
    if not source.at_hand():
        raise InputError(
            f"images.source: {source.location} is not at hand; cache.pixels wants the images that were embedded"
        )
    sizes = image_sizes(layout, num_rows)
    in_missing = [sizes[shard * spec.chunk_rows : (shard + 1) * spec.chunk_rows] for shard in missing]
    require_free(layout, sum(pack_bytes(setting, part) for part in in_missing), estimated=True)
    num_missing = sum(len(part) for part in in_missing)
    start, done = time.perf_counter(), num_rows - num_missing
    with bar("pixels", num_rows, "images", done) as shown:
        for shard in missing:
            images = packed_images(source, layout, layout.image_rows, num_rows, shard)
            record = pack_shard(pack_task(layout, setting, shard, plan), source, images, workers)
            journal.add(record, {})
            done += record.num_rows
            shown.update(done)
    say(f"kept the pixels of {num_missing:,} images in {time.perf_counter() - start:,.1f} s")
