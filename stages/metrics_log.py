"""`metrics.jsonl` and TensorBoard of one run, kept in step with its checkpoint."""

import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from ..cache.durable import append_line, read_lines, sync_file, to_json_line, write_bytes

METRICS = "metrics.jsonl"


class MetricsLog:
    """A line for each logged step. `close` it in the end, for TensorBoard's file."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Open the log of a run that continues after `step` steps.

        Lines of later steps are dropped: they were written by a run that died before its next checkpoint, and their
        steps are about to be repeated.
        """
        self._path = run_dir / METRICS
        lines = [line for line in read_lines(self._path) if line["step"] <= step]
        write_bytes(self._path, b"".join(to_json_line(_finite(line)) for line in lines))
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

    def sync(self) -> None:
        """Make what was written last; before a checkpoint, since lines after it are written again anyway."""
        sync_file(self._path)
        self._board.flush()


def _finite(line: dict[str, float]) -> dict[str, float]:
    """A line without what no JSON parser takes; older runs wrote such numbers."""
    return {name: value for name, value in line.items() if math.isfinite(value)}
