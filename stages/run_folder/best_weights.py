"""`best.pt`: the weights of the step that scored best so far, kept in step with the run's checkpoint."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ...cache.disk.durable import write_bytes
from ...cache.errors import InputError
from .checkpoint import load_checkpoint, save_checkpoint

BEST = "best.pt"
BEFORE = "best.before.pt"
"""The best as the last checkpoint knows it, while `best.pt` is already that of a later step."""
_REMEDY = "delete it; the next step that is scored begins a new one"


class BestWeights:
    """The best step of a run; the one process that writes its folder has one.

    A run that dies goes back to its last checkpoint, and what it then does again may come out otherwise (on a GPU, with
    other processes, on another set). So what was best up to that checkpoint is there until the next one is.

    Attributes:
        scores: of the best step, with its `step` and `set`; None before the first.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        """Take up the best of a run that continues after `step` steps; what was best later is about to come again."""
        self._path, self._before = run_dir / BEST, run_dir / BEFORE
        self.scores: dict[str, Any] | None = None
        self._settled = True
        for path in (self._path, self._before):
            if path.exists() and (state := load_checkpoint(path, _REMEDY))["step"] <= step:
                self.scores = state["scores"]
                if path == self._before:
                    path.replace(self._path)
                break
        else:
            self._path.unlink(missing_ok=True)
        self.settle()

    def offer(self, scores: dict[str, Any], weights: str, state: dict[str, dict[str, Tensor]]) -> bool:
        """Keep the weights of a step if they are the best so far. Of equal ones the earlier step stays.

        Args:
            scores: of the step, with its `step` and `set`; scores on another set than the best's are not compared: the
                step becomes the best.
            weights: which ones, `ema` or `model`.
            state: those, by tower, as `load_student` reads them.

        Returns:
            Whether it is the best now, and on disk.
        """
        if self.scores is not None and self.scores["set"] == scores["set"] and _rank(scores) <= _rank(self.scores):
            return False
        if self._settled and self._path.exists():
            write_bytes(self._before, self._path.read_bytes())
        save_checkpoint(self._path, {"step": scores["step"], "weights": weights, "scores": scores, **state})
        self.scores, self._settled = scores, False
        return True

    def settle(self) -> None:
        """The run's checkpoint is of this step now: it will not go back behind what is best."""
        self._before.unlink(missing_ok=True)
        self._settled = True


def load_best(run_dir: Path) -> dict[str, Any]:
    """`best.pt`: `step`, `scores`, which weights (`ema` or `model`) as `weights`, and those as `model` and, of a text
    tower of the student's own, `text_model`.

    Raises:
        InputError: if the run has none, or it is damaged.
    """
    path = run_dir / BEST
    if not path.exists():
        raise InputError(f"{path}: missing; a run keeps its best weights where distill.evaluate_every is set")
    return load_checkpoint(path, _REMEDY)


def _rank(scores: dict[str, Any]) -> tuple[float, float]:
    cosine = scores["cosine"]
    return scores["student_top1"], -math.inf if cosine is None else cosine
