"""The base of every settings table, and types that several of them share."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Base of every settings table: unknown keys are refused, types are not coerced, values do not change later.

    TOML's `nan` and `inf` are refused too: nothing that is set can be either, and a run's record is JSON.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class RandomCrop(Settings):
    """Random resized crops, perhaps mirrored: what torchvision's `RandomResizedCrop` draws."""

    scale: tuple[Annotated[float, Field(ge=0.0, le=1.0)], Annotated[float, Field(ge=0.0, le=1.0)]] = (0.65, 1.0)
    """Range of the crop's share of the image's area."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crop's width / height."""
    flip: bool = False
    """Mirror half of the views."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, keys: object) -> object:
        if isinstance(keys, dict):  # TOML and JSON have lists, strict tuples want tuples
            keys = {name: tuple(value) if isinstance(value, list) else value for name, value in keys.items()}
        return keys

    @model_validator(mode="after")
    def _ranges_run_upward(self) -> "RandomCrop":
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} = [{low}, {high}]: wanted 0 < low <= high")
        return self


FilePath = Annotated[Path, Field(strict=False)]


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Weight = Annotated[float, Field(ge=0.0)]


Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
