"""From a step's events to numbers: what memory was for, and how much there was when there was most.

It knows events; purposes may be found out after the fact, since it reads them when the step is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fms_parallel.simulate.recorder import ACTIVATIONS, Event


@dataclass(frozen=True)
class Ledger:
    """Bytes by purpose over a step.

    Attributes:
        peak: at the moment when there was most in all. most: the most there ever was of each purpose.
        moments: (name, by purpose) at each named moment, in order.
    """

    peak: Mapping[str, int]
    most: Mapping[str, int]
    moments: Sequence[tuple[str, Mapping[str, int]]]

    @classmethod
    def of(cls, events: Sequence[Event], purposes: Mapping[int, str]) -> Ledger:
        """Add the events up."""
        held: Counter[str] = Counter()
        total = highest = 0
        peak: Mapping[str, int] = {}
        most: dict[str, int] = {}
        moments: list[tuple[str, Mapping[str, int]]] = []
        for event in events:
            if event.number < 0:
                moments.append((event.name, dict(held)))
                continue
            purpose = purposes.get(event.number, ACTIVATIONS)
            held[purpose] += event.bytes
            total += event.bytes
            most[purpose] = max(most.get(purpose, 0), held[purpose])
            if total > highest:
                highest, peak = total, dict(held)
        return cls(peak, most, moments)

    def kept_between(self, purpose: str = ACTIVATIONS) -> Iterator[tuple[str, int]]:
        """(name, bytes that were there at the end and not at the beginning) of each pair `+name`, `-name`."""
        begun: dict[str, int] = {}
        for name, held in self.moments:
            if name.startswith("+"):
                begun[name[1:]] = held.get(purpose, 0)
            elif name[1:] in begun:
                yield name[1:], held.get(purpose, 0) - begun.pop(name[1:])
