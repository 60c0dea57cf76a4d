"""The one place that teachers are loaded by, whatever kind they are."""

import torch

from ...cache.disk.durable import to_json
from ...cache.errors import InputError
from ..devices import memory_errors_as
from ..settings.models import TeacherSettings
from ..settings.plugins import load_function
from .plausible import is_logit_scale
from .teacher import ImageTeacher, Teacher, basic_identity
from .weights_file import one_line


def load_teacher(settings: TeacherSettings, device: torch.device) -> Teacher:
    """Load the teacher of `[teacher]` onto a device, and ask it for one image and one sentence.

    Raises:
        InputError: if it cannot be loaded, does not run or is no `Teacher`: one line.
    """
    teacher: Teacher = load_function(settings.loader, ["settings", "device"])(settings=settings, device=device)
    if settings.is_from_outside:
        _require_teacher(teacher, settings)
    _try_out(teacher, settings)
    return teacher


def _require_teacher(teacher: Teacher, settings: TeacherSettings) -> None:
    """Refuse what a function of the config has returned if it has not all that a teacher has."""
    names = [*ImageTeacher.__annotations__, *(name for name in dir(Teacher) if not name.startswith("_"))]
    missing = [name for name in names if not hasattr(teacher, name)]
    if missing:
        raise InputError(
            f"{settings.model}: returned a {type(teacher).__name__} without {', '.join(missing)}; wanted all of "
            "dimefm.stages.models.teacher.Teacher"
        )
    if not is_logit_scale(teacher.logit_scale):
        raise InputError(
            f"{settings.model}: its logit_scale is {teacher.logit_scale}; wanted what cosines are multiplied by, up to "
            "about 100, not the logarithm of it"
        )
    identity = teacher.identity()
    missing = sorted({"weights", *basic_identity(teacher)} - identity.keys())
    if missing:
        raise InputError(
            f"{settings.model}: its identity() lacks {', '.join(missing)}; wanted `weights` and all of basic_identity"
        )
    try:
        to_json(identity)
    except (TypeError, ValueError) as error:
        raise InputError(f"{settings.model}: its identity() is not JSON ({error}); wanted it ready for JSON") from error


def _try_out(teacher: Teacher, settings: TeacherSettings) -> None:
    """One image and one sentence: not every tower that can be built runs in every precision (Hugging Face's text)."""
    try:
        with memory_errors_as(
            f"{settings.model}: does not fit into the memory of {teacher.device} to embed one row; choose a smaller one"
        ):
            black = torch.zeros(1, *teacher.image_size, 3, dtype=torch.uint8)
            teacher.encode_images(teacher.normalise(black))
            teacher.encode_tokens(teacher.tokenize([""]))
    except RuntimeError as error:
        raise InputError(
            f"{settings.model}: does not run in {settings.precision} on {teacher.device} ({one_line(error)}); try "
            "teacher.precision = 'fp32'"
        ) from error
