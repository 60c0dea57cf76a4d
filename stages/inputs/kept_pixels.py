"""Where stage two reads its pictures from the cache: kept pixels as a source of images, row by row.

Worker processes import this file: it does without what opens a cache (pyarrow, zarr).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import InputError
from ...cache.reader.pixel_packs import PixelPacks

if TYPE_CHECKING:
    from ...cache.reader.feature_cache import FeatureCache

FILES = "files"
"""What a run's record calls the original files; kept ones are called by their setting, `jpeg-256`."""


class KeptPixels:
    """The kept pixels of a cache. A ticket is a row's number; reading one needs nothing but the packs."""

    def __init__(self, packs: PixelPacks) -> None:
        """Read from these packs. It pickles as small as they do."""
        self._packs = packs

    @property
    def name(self) -> str:
        """What a run's record calls them."""
        return self._packs.setting

    def require(self) -> None:
        """Nothing to look for: an open cache has its packs."""

    def tickets(self, rows: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """What a worker needs to read each of these rows."""
        return np.asarray(rows, dtype=np.int64).tolist()

    def read(self, ticket: int) -> bytes:
        """The JPEG of a row.

        Raises:
            CacheError: if it has none, or its pack is missing or cut.
        """
        return self._packs.read(ticket)

    def where(self, ticket: int) -> str:
        """Where a row's pixels are, for messages."""
        return f"{self._packs.path(ticket)}: row {ticket}"


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
