"""What a user sets about the cache. No heavy import here: a config is refused before anything else loads."""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

KEPT_SIDES = (16, 4096)
"""Least and largest shorter side of kept pixels."""


def kept_side(setting: str) -> int | None:
    """The shorter side that `cache.pixels` asks for, in pixels; None where it is no such setting.

    >>> kept_side("jpeg-256")
    256
    """
    match = re.fullmatch(r"jpeg-([1-9]\d{1,3})", setting)
    side = int(match[1]) if match else 0
    return side if KEPT_SIDES[0] <= side <= KEPT_SIDES[1] else None


class Settings(BaseModel):
    """Base of every settings table: unknown keys are refused, types are not coerced, values do not change later.

    TOML's `nan` and `inf` are refused too: nothing that is set can be either, and a run's record is JSON.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class CacheSettings(Settings):
    """`[cache]`: where the teacher's embeddings go and in which pieces."""

    dir: Path = Field(strict=False)
    """Folder of the cache; made if it is not there."""
    shard_rows: int = Field(default=8192, ge=1, le=1_048_576)
    """Rows of one chunk file: the unit of writing, resuming, checking and mending."""
    rows: Path | None = Field(default=None, strict=False)
    """Folder of a finished cache of another teacher whose images and sentences this one takes, row by row."""
    pixels: str | None = None
    """`jpeg-N`: also keep each training image small, its shorter side N pixels, for stage two to read instead of the
    originals. A larger image is made smaller, none larger."""

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
