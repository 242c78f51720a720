"""What a run's layouts did and why: events in memory, as lines of JSON on disk, and as a picture.

    {"kind": "switch", "step": 120, "before": "fsdp=4", "after": "pp=4", "reason": "...", "moved": 1234, ...}

It knows events; it decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

from fms_parallel.errors import ConfigError

SWITCH, REFUSED, STRAGGLER, PHASE, MEMORY, METRICS, WINDOW, START, STAY, CALIBRATED = (
    "switch",
    "refused",
    "straggler",
    "phase",
    "memory",
    "metrics",
    "window",
    "start",
    "stay",
    "calibrated",
)
"""Kinds of events; `window` is what was measured over a few steps, `stay` a decision that changed nothing."""

SHOWN = {SWITCH: "tab:green", REFUSED: "tab:red", STRAGGLER: "tab:orange", PHASE: "tab:purple", MEMORY: "tab:brown"}
"""Kinds that a picture marks, and their colours."""


@dataclass(frozen=True)
class Event:
    """Something that happened before step `step` (from 0) began; `reason` is a sentence."""

    kind: str
    step: int
    reason: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values, flat."""
        return {"kind": self.kind, "step": self.step, "reason": self.reason, **self.more}


class History:
    """Events in order. One rank writes them down.

    Args:
        path: a file of JSON lines; None: only in memory. append: go on with the file of the run that is resumed.
    """

    def __init__(self, path: str | Path | None = None, append: bool = False) -> None:
        self.events: list[Event] = []
        self._file = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a" if append else "w", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def add(self, kind: str, step: int, reason: str = "", **more: Any) -> Event:
        """Note an event, on disk when this returns."""
        event = Event(kind, step, reason, more)
        self.events.append(event)
        if self._file is not None:
            self._file.write(json.dumps(event.as_json()) + "\n")
            self._file.flush()
        return event

    def of(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event.kind == kind]

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The events of a file that `History` wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def draw_history(events: Sequence[dict[str, Any]], picture: str | Path) -> Path:
    """Step time over steps, the layout of each part in words, and every change, refusal and straggler where it was.

    Args:
        events: of `read_history`, or `[event.as_json() for event in history]`.
    Raises:
        ConfigError: matplotlib is not installed, or nothing was measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'fms_parallel[plot]'.") from None
    windows = [event for event in events if event["kind"] == WINDOW and event["seconds"] is not None]
    if not windows:
        raise ConfigError("no step was measured: there is nothing to draw.")
    marks = [event for event in events if event["kind"] in SHOWN]
    lines = [line for number, event in enumerate(marks, start=1) for line in _reason(number, event)]
    figure = Figure(figsize=(10, 4.5 + 0.18 * len(lines)), layout="constrained")
    axes, words = figure.subplots(2, 1, height_ratios=(4.0, 0.6 + 0.18 * len(lines)))
    seconds = [1e3 * event["seconds"] for event in windows]
    axes.plot([event["step"] for event in windows], seconds, color="0.8", lw=0.8, zorder=1)
    for index, layout in enumerate(dict.fromkeys(event["layout"] for event in windows)):
        part = [(event["step"], 1e3 * event["seconds"]) for event in windows if event["layout"] == layout]
        axes.scatter(*zip(*part, strict=True), s=14, color=f"C{index}", label=layout or "one process", zorder=2)
    for number, event in enumerate(marks, start=1):
        axes.axvline(event["step"], color=SHOWN[event["kind"]], lw=1.0, alpha=0.7)
        axes.annotate(
            str(number),
            (event["step"], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -10 - 9 * (number % 2)),
            textcoords="offset points",
            fontsize=8,
            color=SHOWN[event["kind"]],
        )
    axes.set_xlabel("step")
    axes.set_ylabel("step time (ms)")
    axes.set_ylim(bottom=0, top=1.1 * min(max(seconds), 5 * median(seconds)))  # a pause of another kind may be long
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside upper left")
    axes.spines[["top", "right"]].set_visible(False)
    words.axis("off")
    for index, (text, colour) in enumerate(lines):
        place = 1 - (index + 0.5) / len(lines)
        words.text(0.0, place, text, fontsize=7.5, color=colour, va="center", transform=words.transAxes)
    figure.savefig(picture, dpi=120)
    return Path(picture)


def _reason(number: int, event: dict[str, Any]) -> list[tuple[str, str]]:
    """A mark in words: lines and their colour."""
    change = f"{event['before'] or 'one process'} -> {event['after']}: " if event["kind"] == SWITCH else ""
    text = f"{number}  step {event['step']}, {event['kind']}: {change}{event['reason']}"
    return [(line, SHOWN[event["kind"]]) for line in wrap(text, 150, subsequent_indent="        ")]
