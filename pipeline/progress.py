"""Progress of long work: a bar with rate and time left on a terminal, a line every 15 seconds elsewhere."""

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0
NAMES_SHOWN = 3
RESUMED = -1
"""As `done` of a bar: how much an earlier run has finished is what the first update says."""


def say(line: str = "") -> None:
    """Print a line on standard error; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def short(name: str, width: int = 60) -> str:
    """A name on one line, and not a long one."""
    shown = name if name.isprintable() else repr(name)
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."


def show_counts(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts in one line, the most frequent first."""
    return ", ".join(f"{count:,} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def some_names(names: Collection[str], rest: str = "") -> str:
    """The first few names in one line, and how many there are beside them.

    Args:
        rest: where the others are listed; said only if there are others.
    """
    shown = ", ".join(repr(short(name)) for name in islice(names, NAMES_SHOWN))
    more = len(names) - NAMES_SHOWN
    return shown if more <= 0 else f"{shown} and {more:,} more{f'; {rest}' if rest else ''}"


class Bar:
    """Progress of one piece of work; made by `bar`."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0, *, shown: bool = True) -> None:
        self.title, self.total, self.unit, self._shown = title, total, unit, shown
        self._start_done: int | None = None if done == RESUMED else done
        self._start = time.monotonic()
        self._last_line = self._start
        self._rich: tuple[Progress, TaskID] | None = None

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        """Show that `done` of the total are finished, with a text behind it."""
        self.total = self.total if total is None else total
        if self._start_done is None:  # what an earlier run did was not done at this one's rate
            self._start_done, self._start = done, time.monotonic()
        seconds = time.monotonic() - self._start
        rate = (done - self._start_done) / seconds if seconds > 0 else 0.0
        shown = f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.1f} {self.unit}/s"
        if self._rich:
            progress, task = self._rich
            progress.update(task, completed=done, total=self.total, rate=shown, text=text)
        elif self._shown and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = f", {(self.total - done) / rate:,.0f} s left" if rate > 0 else ""
            say(f"{self.title}: {done:,} of {self.total:,}, {shown}{left}{f', {text}' if text else ''}")


@contextmanager
def bar(title: str, total: int, unit: str, done: int = 0, *, shown: bool = True) -> Iterator[Bar]:
    """Show the progress of `total` units, `done` of which an earlier run has finished; nothing unless `shown`."""
    counter = Bar(title, total, unit, done, shown=shown)
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield counter
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:
        counter._rich = progress, progress.add_task(title, total=total, completed=max(done, 0), rate="", text="")
        yield counter
