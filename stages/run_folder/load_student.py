"""A trained student, rebuilt from its run folder."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..devices import resolve_device
from ..models.image_student import build_student
from ..models.text_student import TextStudent, build_text_student, text_tokenizer
from ..settings.models import StudentSettings
from .best_weights import BEST, load_best
from .checkpoint import load_checkpoint, load_weights, weights_to_use
from .run_record import CHECKPOINT, read_run_record

Which = Literal["best", "last"]


def load_student(run_dir: Path, which: Which | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a student from its run, with averaged weights where it kept some; needs no teacher, cache or network.

    Args:
        which: `best`, the step that scored best on the run's dev set, or `last`, its checkpoint; None: the best where
            the run keeps one.

    Returns:
        The student, from (B, 3, S, S) to (B, embed_dim), in eval mode, on the CPU; and its `run.json`, with the number
        of steps that the weights have behind them as `step`, which they are, `ema` or `model`, as `weights`, `best` or
        `last` as `checkpoint`, and as `chosen_on` the set that the best was chosen on, else None.

    Raises:
        InputError: if the folder holds no run, it has no such checkpoint yet, or a file is damaged.
    """
    record = read_run_record(run_dir)
    student = student_of(record)
    state, path = _chosen_state(run_dir, which)
    load_weights(student, state, path, weights_to_use(state))
    facts = {"step": state["step"], "weights": weights_to_use(state), "checkpoint": "last", "chosen_on": None}
    if path.name == BEST:  # its `model` holds the averaged weights, where there are some
        facts |= {"weights": state["weights"], "checkpoint": "best", "chosen_on": state["scores"]["set"]}
    return student.eval(), {**record, **facts}


def load_text_student(run_dir: Path, device: str = "auto", *, which: Which | None = None) -> TextStudent | None:
    """Rebuild a student's own text tower from its run; None for a student that uses the teacher's.

    The weights are of the step that `load_student` takes, averaged ones where it takes averaged ones. Arguments and
    errors are those of `load_student`.
    """
    student = text_student_of(read_run_record(run_dir), resolve_device(device))
    if student is not None:
        state, path = _chosen_state(run_dir, which)
        load_weights(student.tower, state, path, f"text_{weights_to_use(state)}")
    return student


def student_of(record: dict[str, Any]) -> nn.Module:
    """The student that a `run.json` is about, with random weights."""
    settings = record["student"][record["name"]]
    return build_student(settings["model"], record["embed_dim"], settings["image_size"])


def text_student_of(record: dict[str, Any], device: torch.device) -> TextStudent | None:
    """The own text tower of the student that a `run.json` is about, with random weights; None if it has none."""
    spec = StudentSettings.model_validate(record["student"][record["name"]]).own_text
    if spec is None:
        return None
    return TextStudent(build_text_student(spec, record["embed_dim"]), text_tokenizer(spec), device)


def _chosen_state(run_dir: Path, which: Which | None) -> tuple[dict[str, Any], Path]:
    """The state that weights are taken from, and its file."""
    if which == "best" or (which is None and (run_dir / BEST).exists()):
        return load_best(run_dir), run_dir / BEST
    return load_checkpoint(run_dir / CHECKPOINT), run_dir / CHECKPOINT
