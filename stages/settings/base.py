"""The base of every settings table, and types that several of them share."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator


class Settings(BaseModel):
    """Base of every settings table: unknown keys are refused, types are not coerced, values do not change later.

    Paths become absolute while a table is validated: a relative one starts at `folder` of the validation context, the
    config file's own. Defaults are validated for the same reason; a table with paths in it is a default by
    `default_factory=dict`, since an instance would be validated before there is a context. Without a context
    (settings made in Python) paths stay as they are given, relative to the working directory.

    TOML's `nan` and `inf` are refused: nothing that is set can be either, and a run's record is JSON.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )


def _resolved(path: Path, info: ValidationInfo) -> Path:
    if not info.context:
        return path
    try:
        return Path(os.path.normpath(info.context["folder"] / path.expanduser()))
    except RuntimeError as error:
        raise ValueError("begins with the name of a user who has no home folder") from error


class PathIn:
    """Validates a string that may hold a path: the part that the pattern's one matching group stands for."""

    def __init__(self, pattern: str) -> None:
        """Args:
        pattern: of the whole string; one that does not match holds no path.
        """
        self._pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, text: str, info: ValidationInfo) -> str:
        found = self._pattern.fullmatch(text)
        if found is None or not info.context:
            return text
        start, end = found.span(found.lastindex or 0)
        return f"{text[:start]}{_resolved(Path(text[start:end]), info)}{text[end:]}"


FilePath = Annotated[Path, Field(strict=False), AfterValidator(_resolved)]
"""The path of a file or folder."""
Templates = Annotated[str, AfterValidator(PathIn(r"(?!openai$)(.+)"))]
"""`openai` or a text file."""
TeacherModel = Annotated[str, AfterValidator(PathIn(r"local-dir:(.*)|((?!hf-hub:).+\.json)"))]
"""An open_clip architecture, `hf-hub:NAME`, `local-dir:FOLDER`, a .json file or `package.module:function`."""
TeacherWeights = Annotated[str, AfterValidator(PathIn(r"(?!hf-hub:)(.*/.*|.+\.(?:safetensors|pt|pth|bin|npz))"))]
"""An open_clip tag, `hf-hub:NAME` or a file."""
StudentModel = Annotated[str, AfterValidator(PathIn(r"open_clip:(.+\.json)"))]
"""`timm:NAME`, `open_clip:` and an architecture or a .json file, or `package.module:function`."""
StudentText = Annotated[str, Field(min_length=1), AfterValidator(PathIn(r"(.+\.json)"))]
"""`teacher`, an open_clip architecture or a .json file."""
StudentInit = Annotated[str, AfterValidator(PathIn(r"run:(.*)|((?!open_clip:).+\.(?:safetensors|pt|pth|bin))"))]
"""`run:FOLDER`, `pretrained`, `open_clip:TAG` or a file."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class RandomCrop(Settings):
    """Random resized crops, perhaps mirrored: what torchvision's `RandomResizedCrop` draws."""

    scale: tuple[Fraction, Fraction] = Field(default=(0.65, 1.0), strict=False)
    """Range of the crop's share of the image's area."""
    ratio: tuple[float, float] = Field(default=(0.75, 4 / 3), strict=False)
    """Range of the crop's width / height."""
    flip: bool = False
    """Mirror half of the views."""

    @model_validator(mode="after")
    def _ranges_run_upward(self) -> "RandomCrop":
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} = [{low}, {high}]: wanted 0 < low <= high")
        return self
