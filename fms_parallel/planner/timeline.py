"""A simulated step as a person or a browser can see it: text, PNG, Chrome trace. It knows events; it runs none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fms_parallel.errors import ConfigError
from fms_parallel.planner.simulate import Event, makespan

COLOURS = {"F": "#4477aa", "B": "#66ccee", "W": "#ccbb44"}


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """For chrome://tracing or Perfetto; one row per rank, times in microseconds."""
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            {
                "name": f"{e.work.kind} micro-batch {e.work.micro}",
                "cat": e.work.kind,
                "ph": "X",
                "ts": e.start * 1e6,
                "dur": (e.end - e.start) * 1e6,
                "pid": 0,
                "tid": e.rank,
                "args": {"stage": e.work.stage, "micro_batch": e.work.micro},
            }
            for e in events
        ],
    }


def write_trace(events: Sequence[Event], path: str | Path) -> None:
    """Write the Chrome trace to exactly this file."""
    Path(path).write_text(json.dumps(chrome_trace(events)), encoding="utf-8")


def as_text(events: Sequence[Event], ranks: int, width: int = 100) -> str:
    """One line per rank: capital letters forward, small letters backward, `w` weights, dots idle."""
    end = makespan(events) or 1.0
    lines = [["."] * width for _ in range(ranks)]
    for event in events:
        letter = chr(ord("A") + event.work.micro % 26)
        letter = {"F": letter, "B": letter.lower(), "W": "w"}[event.work.kind]
        first, last = int(event.start / end * width), int(event.end / end * width)
        for column in range(first, min(max(last, first + 1), width)):
            lines[event.rank][column] = letter
    return "\n".join(f"rank {rank:3} |{''.join(line)}|" for rank, line in enumerate(lines))


def write_plot(events: Sequence[Event], ranks: int, path: str | Path, unit: str = "seconds") -> None:
    """A Gantt plot as PNG, SVG or PDF, by the file's suffix. Raises ConfigError: matplotlib is not installed."""
    write_plots({"": events}, ranks, path, unit)


def write_plots(panels: Mapping[str, Sequence[Event]], ranks: int, path: str | Path, unit: str = "seconds") -> None:
    """Several timelines below one another, over one time in `unit`; by title. Raises ConfigError as `write_plot`."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'fms_parallel[plot]'.") from None
    height = len(panels) * (0.4 * ranks + 1.2)
    figure, rows = pyplot.subplots(len(panels), figsize=(12, height), sharex=True, squeeze=False, layout="constrained")
    for (title, events), axes in zip(panels.items(), rows[:, 0], strict=True):
        _draw(axes, events, ranks)
        axes.set(title=title, ylabel="pipeline rank", yticks=range(ranks))
        axes.invert_yaxis()
        axes.margins(x=0.01)
    rows[-1, 0].set(xlabel=unit)
    rows[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(COLOURS), frameon=False, fontsize="small")
    figure.savefig(path, bbox_inches="tight", dpi=130)
    pyplot.close(figure)


def _draw(axes: Any, events: Sequence[Event], ranks: int) -> None:
    for kind, colour in COLOURS.items():
        label: str | None = {"F": "forward", "B": "backward", "W": "weight gradients"}[kind]
        for rank in range(ranks):
            pieces = [(e.start, e.end - e.start) for e in events if e.rank == rank and e.work.kind == kind]
            if pieces:
                bars = {"facecolors": colour, "edgecolors": "white", "linewidth": 0.3, "label": label}
                axes.broken_barh(pieces, (rank - 0.4, 0.8), **bars)
                label = None
