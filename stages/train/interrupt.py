"""Stopping a long run between two steps when the user or the system asks for it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):  # noqa: N818 - no error: nothing is lost
    """The run was asked to stop and has saved its state. Its text is one line with the step."""


class StopSignals:
    """While open, SIGINT and SIGTERM only ask to stop; a second one acts as it would have without us.

    Attributes:
        asked: whether a signal has come.
    """

    def __init__(self, *, patient: bool = False) -> None:
        """Args:
        patient: further signals only ask, too: torchrun sends one after the other to make processes leave, and
            kills those that are still there half a minute later.
        """
        self.asked, self._patient = False, patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
