"""What a user sets about the teacher and the students."""

from typing import Literal

from pydantic import Field, model_validator

from .base import Device, Settings, StudentInit, StudentModel, StudentText, TeacherModel, TeacherWeights

PLAIN_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
"""Ends of the names of files that tensors are read from without anything else."""


TEACHER = "teacher"
"""What a student's `text` says where it has no text tower of its own."""


class TeacherSettings(Settings):
    """`[teacher]`: the model that is asked once."""

    model: TeacherModel
    """An open_clip architecture, `hf-hub:org/name`, `local-dir:path`, or the path of a model config (.json)."""
    pretrained: TeacherWeights | None = None
    """An open_clip tag, `hf-hub:org/name`, or a .safetensors / .pt file; left out where the model brings weights."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of weights and activations."""
    batch_size: int = Field(default=256, ge=1)
    """Rows of one forward pass. Part of the cache's identity: the last bits of an embedding depend on it."""
    device: Device = "auto"
    """`auto` (every GPU there is, else the CPU), `cpu`, `cuda` or `cuda:N`."""
    workers: int = Field(default=0, ge=0)
    """Threads that read and decode images for one device; 0 takes one for each core."""


class StudentSettings(Settings):
    """`[student.NAME]`: one small model."""

    model: StudentModel
    """`timm:NAME`, `open_clip:ARCH` (its image tower) or `package.module:function`."""
    image_size: int = Field(default=224, ge=8)
    """Side of the square input, pixels."""
    text: StudentText = TEACHER
    """`teacher`: its frozen text tower, which is not run in training. Else a text tower of the student's own, trained
    from the cached sentence embeddings: an open_clip architecture or the path of a model config (.json), of which the
    text tower counts and, of that, everything but the embedding's width."""
    init: StudentInit | None = None
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
