"""What a user sets about inputs, teacher and students. No heavy import: a config is refused before anything loads."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from .base import FilePath, Fraction, Settings, Templates, Weight
from .plugins import is_function, require_function

ImageLocation = Annotated[
    Annotated[FilePath, Tag("[path]")] | Annotated[str, AfterValidator(require_function), Tag("[function]")],
    Discriminator(lambda value: "[function]" if isinstance(value, str) and is_function(value) else "[path]"),
]
"""A folder, or `package.module:function` that makes a source of images; a folder of such a name is written `./a:b`."""


class ImagesSettings(Settings):
    """`[images]`: the unlabelled images."""

    source: ImageLocation
    """A folder, read recursively: JPEG, PNG and WebP by their endings; or `package.module:function` that makes an
    `ImageSource`, called without arguments."""
    max_failed: Fraction = 0.01
    """Share of unreadable images above which stage one stops."""
    mask: str | None = None
    """Name of a mask of the cache: stage two draws the images that it keeps and no others."""
    weights: dict[str, Weight] = Field(default_factory=dict)
    """First folder below the source (`.`: files in none) -> how often stage two draws one of its images relative to
    others. 1 is as without it, 0 never, 2 twice as often; folders that are not named have 1."""
    hash: bool = False
    """Keep a checksum of each image file, which reads all of them once more: it tells a changed file from one that was
    only copied. Without it, size and modification time have to do."""


class PromptSettings(Settings):
    """`[sentences.prompts]`: class names through templates join the sentences."""

    classes: FilePath
    """JSON, class id -> list of names."""
    templates: Templates = "openai"
    """`openai` (open_clip's 80 ImageNet templates) or the path of a text file, one template a line, {} for the name."""
    names: Literal["first", "all"] = "first"
    """Which of a class's names are used."""


class SentencesSettings(Settings):
    """`[sentences]`: the sentences, paired with nothing."""

    source: list[FilePath] = Field(min_length=1)
    """Text files, UTF-8, one sentence a line."""
    prompts: PromptSettings | None = None
    mask: str | None = None
    """Name of a mask of the cache: stage two draws the sentences that it keeps and no others."""
    weights: dict[str, Weight] = Field(default_factory=dict)
    """Name of a source file, or `prompts` -> how often stage two draws one of its sentences relative to others."""


class EvaluateSettings(Settings):
    """`[evaluate.NAME]`: a labelled set to score on."""

    images: ImageLocation
    """A folder with one folder per class id; or a function, as `images.source`, of images named `<class id>/…`."""
    classes: FilePath
    """JSON, class id -> list of names."""
    templates: Templates = "openai"
    """`openai` or the path of a text file, one template a line, {} for the name."""
    names: Literal["first", "all"] = "first"
    """Which of a class's names make its prompts."""
    probe: str | None = None
    """Name of another `[evaluate.*]` set, of the same classes: neighbours and a linear probe learn its labels and are
    scored on this one. No part of the cache: it may be added at any time."""
    captions: FilePath | None = None
    """JSON, path of an image below `images` -> list of its captions: retrieval is scored both ways. No part of the
    cache either."""
    scores: list[Annotated[str, AfterValidator(require_function)]] = Field(default_factory=list)
    """More scores, each a function of your own, `package.module:function` (docs/scores.md). No part of the cache
    either."""
