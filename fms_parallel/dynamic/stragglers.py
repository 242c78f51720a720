"""Which ranks are slow, from what each measured: found when two windows in a row say so, gone when two say otherwise.

It knows numbers; it knows no ranks' machines and no layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

FOUND, GONE = 1.7, 1.3
"""Times as long as the faster half of the ranks: above the first one is slow, below the second it is not."""


class Stragglers:
    """What is believed of every rank: `slowness`, 1.0 for those that are as fast as the others."""

    def __init__(self, ranks: int) -> None:
        self.slowness: tuple[float, ...] = (1.0,) * ranks
        self._last: tuple[float, ...] | None = None

    def hear(self, seconds: Sequence[float]) -> str:
        """Learn one window's seconds per block of every rank; a sentence when what is believed has changed."""
        if min(seconds, default=0.0) <= 0:
            return ""  # some rank is not timed
        half = sorted(seconds)[: max(len(seconds) // 2, 1)]
        ratios = tuple(one / fmean(half) for one in seconds)
        last, self._last = self._last, ratios
        if last is None:
            return ""
        both = zip(self.slowness, last, ratios, strict=True)
        believed = tuple(self._one(old, *pair) for old, *pair in both)
        words = [
            f"rank {rank} takes {new:.1f} times as long as others for the same work"
            if new > 1
            else f"rank {rank} is as fast as the others again"
            for rank, (old, new) in enumerate(zip(self.slowness, believed, strict=True))
            if old != new
        ]
        self.slowness = believed
        return "; ".join(words)

    @staticmethod
    def _one(old: float, first: float, second: float) -> float:
        """What is believed of one rank after two windows."""
        mean = (first + second) / 2
        if min(first, second) > FOUND and not 0.75 < mean / old < 1.33:
            return round(mean, 2)
        return 1.0 if max(first, second) < GONE else old

    def restart(self) -> None:
        """The next window is the first one of another layout."""
        self._last = None
