"""What checking a cache brings to light: each finding names a file, its rows and what to do."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Runs = tuple[tuple[int, int], ...]
"""Rows as (first, last) of each stretch, both included."""

RUNS_SHOWN = 6

BYTES = ("changed", "missing", "short", "long", "unreadable")
"""Kinds of findings after which no byte of the file can be relied on."""

REPAIR = "run `dimefm cache repair` on this folder"
MOVE = "`dimefm cache repair` moves it to log/removed/"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the manifest says, or that disagrees with another file.

    Attributes:
        kind: one of `BYTES`; `extra`, `leftover` (a file that
            does not belong); `rows`, `table`, `pairs`, `index`, `pixels`, `journal` (what files say about each
            other);
            `teacher` (what the live teacher says).
        where: the file, relative to the cache.
        message: what was found and what was wanted.
        repair: what to do.
        array: the array that the file belongs to.
        rows: rows of that array, or of that table, that cannot be relied on.
    """

    kind: str
    where: str
    message: str
    repair: str = REPAIR
    array: str | None = None
    rows: Runs = ()

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "rows": [list(run) for run in self.rows]}

    def line(self) -> str:
        """For a person."""
        more = "; --json has all" if len(self.rows) > RUNS_SHOWN else ""
        rows = f" [{self.array or 'rows'}: {show_runs(self.rows)}{more}]" if self.rows else ""
        return f"{self.where}: {self.message}{rows}; {self.repair}"


@dataclass
class Report:
    """Everything that was found in one cache.

    Attributes:
        version: of the cache, from its manifest.
        num_files: files that were read.
        num_bytes: bytes that were read.
        findings: what is wrong; none in a sound cache.
        notes: what is worth knowing and no damage.
    """

    version: int = 0
    num_files: int = 0
    num_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> set[str]:
        """Files that something is wrong with."""
        return {finding.where for finding in self.findings}


def runs_of(rows: Iterable[int] | NDArray[np.int64]) -> Runs:
    """Ascending rows as stretches.

    >>> runs_of([3, 4, 5, 9])
    ((3, 5), (9, 9))
    """
    numbers = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows), dtype=np.int64)
    if not numbers.size:
        return ()
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts, lasts = numbers[np.r_[0, breaks + 1]], numbers[np.r_[breaks, len(numbers) - 1]]
    return tuple(zip(firsts.tolist(), lasts.tolist(), strict=True))


def show_runs(runs: Runs) -> str:
    """Stretches for a person, the first few.

    >>> show_runs(((3, 5), (9, 9)))
    'rows 3-5, 9'
    """
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:RUNS_SHOWN])
    more = f" and {len(runs) - RUNS_SHOWN} more stretches" if len(runs) > RUNS_SHOWN else ""
    return f"{'row' if runs and runs[0][0] == runs[-1][1] else 'rows'} {shown}{more}"
