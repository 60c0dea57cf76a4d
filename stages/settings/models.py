"""What a user sets about the teacher and the students."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from .base import Device, Settings, StudentInit, StudentModel, StudentText, TeacherModel, TeacherWeights
from .plugins import is_function

PLAIN_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
"""Ends of the names of files that tensors are read from without anything else."""

TEACHER = "teacher"
"""What a student's `text` says where it has no text tower of its own."""

_OPEN_CLIP_TEACHER = "dimefm.stages.models.open_clip_teacher:load_open_clip_teacher"
TEACHERS = {"hf-hub": _OPEN_CLIP_TEACHER, "local-dir": _OPEN_CLIP_TEACHER}
"""What stands before the colon of `teacher.model` -> what loads such a teacher, called as function(settings=…,
device=…). A name without a colon is open_clip's."""

STUDENTS = {
    "timm": "dimefm.stages.models.image_student:timm_student",
    "open_clip": "dimefm.stages.models.image_student:open_clip_student",
}
"""What stands before the colon of a student's `model` -> what builds it, called as function(name=…, embed_dim=…,
image_size=…)."""


class PreprocessSettings(Settings):
    """`[teacher.preprocess]`: how the teacher's images are prepared, in open_clip's terms (its `preprocess_cfg`).

    A key that is set counts, whatever the weights, their config or their tag say; one that is not is as they say.
    """

    mean: tuple[float, float, float] | None = Field(default=None, strict=False)
    """Of red, green and blue between 0 and 1; what is subtracted."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(default=None, strict=False)
    """What is divided by then."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """The filter that resizes."""
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """`shortest`: the shorter side fits and the middle is cut out; `longest`: the longer one fits and the rest is
    padded; `squash`: both fit, proportions are lost."""
    fill_color: int | None = Field(default=None, ge=0, le=255)
    """Of the padding."""

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are set, ready for JSON: lists instead of tuples."""
        return self.model_dump(mode="json", exclude_none=True)


class TeacherSettings(Settings):
    """`[teacher]`: the model that is asked once."""

    model: TeacherModel
    """An open_clip architecture, `hf-hub:org/name`, `local-dir:path`, the path of a model config (.json), or
    `package.module:function`: a teacher from outside, called as function(settings=…, device=…)."""
    pretrained: TeacherWeights | None = None
    """An open_clip tag, `hf-hub:org/name`, or a .safetensors / .pt file; left out where the model brings weights."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of weights and activations."""
    preprocess: PreprocessSettings | None = None
    logit_scale: float | None = Field(default=None, gt=0.0)
    """What cosines are multiplied by before a softmax, in the place of the number that the weights hold."""
    batch_size: int = Field(default=256, ge=1)
    """Rows of one forward pass. Part of the cache's identity: the last bits of an embedding depend on it."""
    device: Device = "auto"
    """`auto` (every GPU there is, else the CPU), `cpu`, `cuda` or `cuda:N`."""
    workers: int = Field(default=0, ge=0)
    """Threads that read and decode images for one device; 0 takes one for each core."""

    @model_validator(mode="after")
    def _a_function_sets_its_own(self) -> "TeacherSettings":
        for key in ("preprocess", "logit_scale"):
            if self.is_from_outside and getattr(self, key) is not None:
                raise ValueError(f"{key} is for open_clip's models; {self.model} sets its own: remove the key")
        return self

    @property
    def is_from_outside(self) -> bool:
        """Whether `model` names a function that returns the teacher."""
        return self.model.partition(":")[0] not in TEACHERS and is_function(self.model)

    @property
    def loader(self) -> str:
        """What loads this teacher, as `package.module:function`."""
        return self.model if self.is_from_outside else TEACHERS.get(self.model.partition(":")[0], _OPEN_CLIP_TEACHER)


class StudentSettings(Settings):
    """`[student.NAME]`: one small model."""

    model: StudentModel
    """`timm:NAME`, `open_clip:ARCH` (its image tower) or `package.module:function`, called as function(embed_dim=…,
    image_size=…)."""
    image_size: int = Field(default=224, ge=8)
    """Side of the square input, pixels."""
    text: StudentText = TEACHER
    """`teacher`: its frozen text tower, which is not run in training. Else a text tower of the student's own, trained
    from the cached sentence embeddings: an open_clip architecture or the path of a model config (.json), of which the
    text tower counts and, of that, everything but the embedding's width."""
    init: StudentInit | None = None
    """Weights that the image tower begins with: `run:FOLDER` of another run, `pretrained` (timm's own),
    `open_clip:TAG` of the same architecture, or a .safetensors / .pt file. None: random ones."""

    @field_validator("model")
    @classmethod
    def _is_a_kind_of_student(cls, model: str) -> str:
        scheme, _, name = model.partition(":")
        if not (name and scheme in STUDENTS) and not is_function(model):
            kinds = ", ".join(f"{known}:NAME" for known in STUDENTS)
            raise ValueError(f"{model!r}: wanted {kinds} or package.module:function")
        return model

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
