"""`metrics.jsonl`, `scores.jsonl` and TensorBoard of one run, kept in step with its checkpoint."""

import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ...cache.disk.durable import append_line, read_lines, sync_file, to_json_line, write_bytes

METRICS = "metrics.jsonl"
SCORES = "scores.jsonl"


class MetricsLog:
    """A line for each logged step, and one for each scored step. `close` it in the end, for TensorBoard's file.

    Attributes:
        scores: last line of `scores.jsonl`; None if there is none.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        """Open the log of a run that continues after `step` steps.

        Lines of later steps are dropped: they were written by a run that died before its next checkpoint, and their
        steps are about to be repeated.
        """
        self._path, self._scores_path = run_dir / METRICS, run_dir / SCORES
        _drop_after(self._path, step)
        scored = _drop_after(self._scores_path, step) if self._scores_path.exists() else []
        self.scores: dict[str, Any] | None = scored[-1] if scored else None
        self._board = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)

    def close(self) -> None:
        """Write out what TensorBoard has not written yet."""
        self._board.close()

    def write(self, metrics: dict[str, float]) -> None:
        """Add a line; `metrics["step"]` counts the steps that are done."""
        append_line(self._path, metrics, durable=False)
        step = int(metrics["step"])
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, step)

    def write_scores(self, scores: dict[str, Any]) -> None:
        """Add a line of `scores.jsonl`; `scores["set"]` is what was scored, `scores["step"]` as in `write`."""
        self.scores = scores
        append_line(self._scores_path, scores)
        for name, value in scores.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{scores['set']}/{name}", value, int(scores["step"]))

    def sync(self) -> None:
        """Make what was written last; before a checkpoint, since lines after it are written again anyway."""
        sync_file(self._path)
        self._board.flush()


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    lines = [_finite(line) for line in read_lines(path) if line["step"] <= step]
    write_bytes(path, b"".join(map(to_json_line, lines)))
    return lines


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what no JSON parser takes; older runs wrote such numbers."""
    return {name: value for name, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
