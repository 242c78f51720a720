"""Signals that ask a run to stop: noted, and acted on between two steps, on all ranks at the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

PATIENCE = 3.0
"""Seconds. One Ctrl-C reaches a rank up to three times: from the terminal, and passed on by its launcher."""


@dataclass(frozen=True)
class Interrupt:
    """The signal that ended a run early."""

    number: int

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + self.number


class Pending:
    """The signal that waits to be acted on, 0 for none."""

    def __init__(self) -> None:
        self.number = 0
        self.moment = 0.0

    def pending(self) -> int:
        """Its number."""
        return self.number


@contextmanager
def catch_interrupts() -> Iterator[Pending]:
    """Note SIGINT and SIGTERM instead of dying of them. One that comes later than `PATIENCE` does what it always did.

    In a thread that is not the main one nothing is caught: Python allows no handlers there.
    """
    noted = Pending()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        if noted.number and time.monotonic() - noted.moment > PATIENCE:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        elif not noted.number:
            noted.number, noted.moment = number, time.monotonic()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
