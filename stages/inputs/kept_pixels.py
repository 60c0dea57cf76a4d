"""Kept pixels of a cache as a source of images: rows by number, from packs of small JPEGs.

Worker processes import this file: it does without what opens a cache (pyarrow, zarr).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import InputError
from ...cache.reader.pixel_packs import PixelPacks, read_offsets
from .image_source import FILES, FoundImage, ImageSource

if TYPE_CHECKING:
    from ...cache.reader.feature_cache import FeatureCache


class KeptPixels(ImageSource):
    """The kept pixels of a cache. A row's key is its number; what reads one pickles as small as the packs do."""

    columns = ("row",)

    def __init__(self, packs: PixelPacks) -> None:
        self._packs, self.name, self.location = packs, packs.setting, str(packs.folder)

    def list(self) -> Sequence[FoundImage]:
        """Every row that has pixels, named by its number.

        Raises:
            CacheError: if a pack is missing or damaged.
        """
        packs, found = self._packs, []
        for first in range(0, packs.num_rows, packs.shard_rows):
            sizes = np.diff(read_offsets(packs.path(first), packs.shard_rows))[: packs.num_rows - first]
            found += [FoundImage(str(first + i), int(sizes[i]), 0) for i in np.flatnonzero(sizes).tolist()]
        return found

    def read(self, key: int) -> bytes:
        """The JPEG of a row.

        Raises:
            CacheError: if it has none, or its pack is missing or cut.
        """
        return self._packs.read(key)

    def locate(self, key: int) -> str:
        return f"{self._packs.path(key)}: row {key}"


def choose_pixels(setting: str, cache: FeatureCache, began_with: str | None = None) -> KeptPixels | None:
    """What `distill.pixels` means for a cache.

    Args:
        setting: `auto` (kept ones where the cache has them), `files` or `kept`.
        began_with: of a run that goes on, what its record says: `auto` stays with that. A cache may have been given
            pixels since.

    Returns:
        The kept pixels, or None for the original files.

    Raises:
        InputError: if kept pixels are wanted and the cache has none, or other ones than the run began with.
    """
    if setting == FILES or (setting == "auto" and began_with == FILES):
        return None
    there = cache.pixels
    if setting == "auto" and began_with is None and there is None:
        return None
    if there is None or began_with not in (None, FILES, there.setting):
        wanted = f"the {began_with} that this run began with" if began_with not in (None, FILES) else "some"
        raise InputError(
            f'distill.pixels = "{setting}": {cache.layout.root} has {there.setting if there else "no"} kept pixels, '
            f'wanted {wanted}; set cache.pixels = "jpeg-256" and run `dimefm cache-teacher` once more, or take "files"'
        )
    return KeptPixels(there)
