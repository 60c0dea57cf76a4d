"""What a user sets about inputs, teacher and students. No heavy import: a config is refused before anything loads."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..cache.settings import Settings

FilePath = Annotated[Path, Field(strict=False)]
PLAIN_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
"""Ends of the names of files that tensors are read from without anything else."""
TEACHER = "teacher"
"""What a student's `text` says where it has no text tower of its own."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class TeacherSettings(Settings):
    """`[teacher]`: the model that is asked once."""

    model: str
    """An open_clip architecture, `hf-hub:org/name`, `local-dir:path`, or the path of a model config (.json)."""
    pretrained: str | None = None
    """An open_clip tag, `hf-hub:org/name`, or a .safetensors / .pt file; left out where the model brings weights."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of weights and activations."""
    batch_size: int = Field(default=256, ge=1)
    """Rows of one forward pass. Part of the cache's identity: the last bits of an embedding depend on it."""
    device: Device = "auto"
    """`auto` (every GPU there is, else the CPU), `cpu`, `cuda` or `cuda:N`."""
    workers: int = Field(default=0, ge=0)
    """Threads that read and decode images for one device; 0 takes one for each core."""


class ImagesSettings(Settings):
    """`[images]`: the unlabelled images."""

    source: FilePath
    """A folder, read recursively: .jpg, .jpeg, .png and .webp."""
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
    templates: str = "openai"
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

    images: FilePath
    """A folder with one folder per class id."""
    classes: FilePath
    """JSON, class id -> list of names."""
    templates: str = "openai"
    """`openai` or the path of a text file, one template a line, {} for the name."""
    names: Literal["first", "all"] = "first"
    """Which of a class's names make its prompts."""
    probe: str | None = None
    """Name of another `[evaluate.*]` set, of the same classes: neighbours and a linear probe learn its labels and are
    scored on this one. No part of the cache: it may be added at any time."""
    captions: FilePath | None = None
    """JSON, path of an image below `images` -> list of its captions: retrieval is scored both ways. No part of the
    cache either."""


class StudentSettings(Settings):
    """`[student.NAME]`: one small model."""

    model: str = Field(pattern=r"^(timm:.+|open_clip:.+|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
    """`timm:NAME`, `open_clip:ARCH` (its image tower) or `package.module:function`."""
    image_size: int = Field(default=224, ge=8)
    """Side of the square input, pixels."""
    text: str = Field(default=TEACHER, min_length=1)
    """`teacher`: its frozen text tower, which is not run in training. Else a text tower of the student's own, trained
    from the cached sentence embeddings: an open_clip architecture or the path of a model config (.json), of which the
    text tower counts and, of that, everything but the embedding's width."""
    init: str | None = None
    """Weights that the image tower begins with: `run:FOLDER` of another run, `pretrained` (timm's own),
    `open_clip:TAG` of the same architecture, or a .safetensors / .pt file. None: random ones."""

    @model_validator(mode="after")
    def _init_suits_the_model(self) -> "StudentSettings":
        init = self.init
        if init == "pretrained":
            if not self.model.startswith("timm:"):
                raise ValueError("init = 'pretrained' is for timm: models; name a run, an open_clip: tag or a file")
        elif init is not None and init.startswith("open_clip:"):
            if not self.model.startswith("open_clip:") or self.model.endswith(".json"):
                raise ValueError(
                    f"init = {init!r}: tags belong to open_clip's own architectures, model = 'open_clip:ARCH'; "
                    "give the path of the weights"
                )
        elif init is not None and not init.startswith("run:") and not init.endswith(PLAIN_WEIGHTS):
            raise ValueError(
                f"init = {init!r}: wanted run:FOLDER, pretrained, open_clip:TAG or a file ({', '.join(PLAIN_WEIGHTS)})"
            )
        return self

    @property
    def own_text(self) -> str | None:
        """What its own text tower is built from; None where it has none."""
        return None if self.text == TEACHER else self.text
