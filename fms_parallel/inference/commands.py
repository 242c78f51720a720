"""What an engine is told while it works: requests and cancellations, from any thread, heard by every rank.

Requests are made on the first rank. Before each step it hands what came in to the others, so that all ranks plan the
same steps. It knows plain values; it knows no rows.
"""

from __future__ import annotations

import pickle
import threading
from collections import deque
from typing import Any, NamedTuple

from fms_parallel.inference.ranks import SameOnAllRanks


class Command(NamedTuple):
    """`add` (value: prompt, options), `cancel`, or `close`; number: of the request it is about."""

    word: str
    number: int = -1
    value: Any = None


class Inbox:
    """Commands that wait for the next step."""

    def __init__(self, ranks: SameOnAllRanks) -> None:
        self._ranks = ranks
        self._waiting: deque[Command] = deque()
        self._closed = False
        self.arrived = threading.Condition()

    def put(self, command: Command) -> bool:
        """From any thread; False: it is closed, nobody will hear of it."""
        with self.arrived:
            if not self._closed:
                self._waiting.append(command)
                self.arrived.notify_all()
            return not self._closed

    def close(self) -> list[Command]:
        """Take what waits, and nothing more."""
        with self.arrived:
            self._closed = True
            return self.take()

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def take(self) -> list[Command]:
        """What waits here, in order."""
        with self.arrived:
            found, self._waiting = list(self._waiting), deque()
        return found

    def take_everywhere(self) -> list[Command]:
        """What waits on the first rank, on all of them. Collective."""
        found = self.take()
        if self._ranks.alone:
            return found
        heard = self._ranks.share(pickle.dumps(found) if found and self._ranks.is_first else b"")
        loaded: list[Command] = pickle.loads(heard) if heard else []
        return loaded
