"""The table of formats that `dimefm export` writes.

A new format is a file of this room with one function, and an entry here; docs/export.md has the recipe. Functions are
imported when they are called: reading the table loads no torch.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...cache.errors import InputError
from ..settings.models import STUDENTS
from ..settings.plugins import load_function

_HERE = __package__


@dataclass(frozen=True)
class Exporter:
    """One format.

    Attributes:
        name: what `--format` calls it.
        function: `module:function`, called as `function(job=ExportJob)`; writes into `job.folder`, returns `Exported`.
        library: what the hub calls the library that loads it.
        precisions: what `--precision` may be.
        any_student: whether students of the user's own (`package.module:function`) can be written.
        needs: packages that it imports and dimefm does not depend on.
    """

    name: str
    function: str
    library: str
    precisions: tuple[str, ...] = ("fp32", "fp16")
    any_student: bool = False
    needs: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Import its function."""
        return load_function(self.function, ["job"])


EXPORTERS = {
    exporter.name: exporter
    for exporter in (
        Exporter("open_clip", f"{_HERE}.to_open_clip:write_open_clip", "open_clip"),
        Exporter("timm", f"{_HERE}.to_timm:write_timm", "timm"),
        Exporter(
            "onnx",
            f"{_HERE}.to_onnx:write_onnx",
            "onnx",
            precisions=("fp32", "fp16", "int8"),
            any_student=True,
            needs=("onnx", "onnxscript", "onnxruntime"),
        ),
        Exporter("torch", f"{_HERE}.to_torch:write_torch", "pytorch", any_student=True),
    )
}
"""What `--format` may be."""

EXTRA = "export"
"""Of `pip install dimefm[…]`: every package that an exporter may need."""


def exporter_for(name: str, precision: str, student: str) -> Exporter:
    """The exporter of a format, if it can write this student at this precision with what is installed here.

    Args:
        student: `model` of its `[student.NAME]`.

    Raises:
        InputError: one line that says what to take instead.
    """
    if name not in EXPORTERS:
        raise InputError(f"--format {name}: no such format; wanted {', '.join(EXPORTERS)}")
    exporter = EXPORTERS[name]
    if precision not in exporter.precisions:
        able = [other.name for other in EXPORTERS.values() if precision in other.precisions]
        raise InputError(
            f"--format {name} --precision {precision}: it has {' and '.join(exporter.precisions)}; "
            + (f"take --format {' or '.join(able)}" if able else "no format has that")
        )
    if not exporter.any_student and student.partition(":")[0] not in STUDENTS:
        able = [other.name for other in EXPORTERS.values() if other.any_student]
        raise InputError(
            f"--format {name}: the student is {student}, a function of your own, which {exporter.library} cannot "
            f"build; take --format {' or '.join(able)}"
        )
    missing = [package for package in exporter.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"--format {name}: needs {' and '.join(missing)}; pip install 'dimefm[{EXTRA}]'")
    return exporter
