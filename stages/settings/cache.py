"""What a user sets about the cache. No heavy import here: a config is refused before anything else loads."""

import re
from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from .base import FilePath, RandomCrop, Settings

KEPT_SIDES = (16, 4096)
"""Least and largest shorter side of kept pixels."""

MOST_CROPS = 64
"""Crops of each image that a cache may hold."""

CENTER: Final = "center"
"""The one view of an image that open_clip's own preprocessing makes for the teacher."""


def kept_side(setting: str) -> int | None:
    """The shorter side that `cache.pixels` asks for, in pixels; None where it is no such setting.

    >>> kept_side("jpeg-256")
    256
    """
    match = re.fullmatch(r"jpeg-([1-9]\d{1,3})", setting)
    side = int(match[1]) if match else 0
    return side if KEPT_SIDES[0] <= side <= KEPT_SIDES[1] else None


class CropSettings(RandomCrop):
    """`[cache.crops]`: the crops of each training image that are embedded beside the teacher's own view."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Another seed makes other crops."""


class CacheSettings(Settings):
    """`[cache]`: where the teacher's embeddings go and in which pieces."""

    dir: FilePath
    """Folder of the cache; made if it is not there."""
    shard_rows: int = Field(default=8192, ge=1, le=1_048_576)
    """Rows of one chunk file: the unit of writing, resuming, checking and mending."""
    rows: FilePath | None = None
    """Folder of a finished cache of another teacher whose images and sentences this one takes, row by row."""
    pixels: str | None = None
    """`jpeg-N`: also keep each training image small, its shorter side N pixels, for stage two to read instead of the
    originals. A larger image is made smaller, none larger."""
    views: int | Literal["center"] = CENTER
    """`center`, the teacher's own view of each training image alone; or how many crops are embedded beside it, for
    stage two to replay: 1 to 64."""
    crops: CropSettings | None = None
    """The crops of `views`; the defaults where it is left out."""

    profile: bool = False
    """Profile stage one into `log/profile/` of the cache: a trace of its first batches, and a table of where the time
    went."""

    @field_validator("views")
    @classmethod
    def _views_can_be_stored(cls, views: int | str) -> int | str:
        if isinstance(views, int) and not 1 <= views <= MOST_CROPS:
            raise ValueError(f'wanted "center", or a number of crops from 1 to {MOST_CROPS}')
        return views

    @model_validator(mode="after")
    def _crops_are_asked_for(self) -> "CacheSettings":
        if self.crops is not None and self.views == CENTER:
            raise ValueError(
                'crops are there and views = "center": set views to how many crops are wanted of each image'
            )
        return self

    @property
    def num_crops(self) -> int:
        """Crops of each training image beside the teacher's own view."""
        return self.views if isinstance(self.views, int) else 0

    @field_validator("pixels")
    @classmethod
    def _pixels_can_be_kept(cls, setting: str | None) -> str | None:
        if setting is not None and kept_side(setting) is None:
            low, high = KEPT_SIDES
            raise ValueError(f"wanted jpeg-N, N the shorter side in pixels, from {low} to {high}: jpeg-256, say")
        return setting


class PairsSettings(Settings):
    """`[pairs]`: retrieval of pseudo-pairs between the images and the sentences."""

    k: int = Field(default=8, ge=0, le=1024)
    """Neighbours kept for each row, both ways; 0 turns retrieval off (no index is built)."""
    index: Literal["auto", "flat", "ivf"] = "auto"
    """`flat` is exact; `ivf` is approximate and says its measured recall; `auto` is flat while that is affordable."""
    min_recall: float = Field(default=0.95, gt=0.0, le=1.0)
    """Recall@k that the number of probed lists of an IVF index is raised for."""
