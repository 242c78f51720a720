"""FASOP's tables as CSV, JSON lines, JSON and plots. It knows rows, prices none, and writes only where it is told."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast

from fms_parallel.errors import ConfigError
from fms_parallel.planner.fasop.costs import Job
from fms_parallel.planner.fasop.search import Options, Row, clusters, frontier
from fms_parallel.planner.fasop.tables import Gpu

COST, SPEED = "cost($)", "throughput(samples/s)"
STAGES_SHOWN = 16
"""Of a partition in a line of a table for a person."""


def experiments(
    nodes: Sequence[Gpu], options: Options, subsets: bool, batches: Sequence[int]
) -> Iterator[tuple[list[Gpu], Options]]:
    """The cluster, or every subset of it, with every batch."""
    for chosen in clusters(nodes) if subsets else [list(nodes)]:
        for gbs in batches:
            yield chosen, replace(options, gbs=gbs)


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """The ranked table with the seed's columns, to exactly this file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0].columns()))
        writer.writeheader()
        writer.writerows(row.columns() for row in rows)


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a table that `write_csv` or the seed wrote, for plotting: cost, throughput, whether it fits, cluster.

    Raises:
        ConfigError: unreadable, or a line without these columns; file, line and reason are named.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            found = []
            for number, row in enumerate(csv.DictReader(file), 2):
                try:
                    fits = {"True": False, "False": True}[row["is_oom"]]
                    found.append({**row, COST: float(row[COST]), SPEED: float(row[SPEED]), "is_oom": not fits})
                except (KeyError, TypeError, ValueError) as error:
                    raise ConfigError(f"{path}:{number}: {_what_is_wrong(row, error)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"{path}: cannot be read: not a text file.") from None
    if not found:
        raise ConfigError(f"{path}:1: no rows.")
    return found


def _what_is_wrong(row: Mapping[str, Any], error: Exception) -> str:
    """Of a line of a table: columns that are missing, a line that ends early, or a value."""
    missing = [name for name in (COST, SPEED, "is_oom", "gpu_cluster") if name not in row]
    if missing:
        return f"no column {', '.join(missing)}; `search --compat fasop --csv` writes tables that have them."
    if None in row.values():
        return "the line ends early."
    if row["is_oom"] not in ("True", "False"):
        return f"is_oom is {row['is_oom']!r}: needs True or False."
    return f"{error}; {COST} and {SPEED} need numbers."


def write_plot(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Cost against throughput, with the Pareto frontier, to exactly this file.

    Raises:
        ConfigError: matplotlib is missing, or no row fits in memory.
    """
    fitting = [row for row in rows if not row["is_oom"]]
    if not fitting:
        raise ConfigError("no configuration fits in memory: there is no Pareto frontier to plot.")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'fms_parallel[plot]'.") from None
    figure, axes = pyplot.subplots(figsize=(8, 5))
    names = sorted({str(row["gpu_cluster"]) for row in fitting})
    for name in names:
        own = [row for row in fitting if str(row["gpu_cluster"]) == name]
        axes.scatter([r[COST] for r in own], [r[SPEED] for r in own], s=18, alpha=0.6, label=name)
    line = skyline(fitting)
    axes.plot([r[COST] for r in line], [r[SPEED] for r in line], color="black", marker="o", label="Pareto frontier")
    axes.set(xlabel="cost of one pass over the dataset, $", ylabel="throughput, samples/s", title=title)
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", dpi=130)
    pyplot.close(figure)


def skyline(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows that no other is both cheaper and faster than, cheapest first."""
    best, found = float("-inf"), []
    for row in sorted(rows, key=lambda r: (r[COST], -r[SPEED])):
        if row[SPEED] > best:
            best = row[SPEED]
            found.append(row)
    return found


class _Both:
    """A stream whose text goes to a file as well."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        """Write to both."""
        self.file.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush both."""
        self.file.flush()
        self.stream.flush()


@contextmanager
def copied(path: str | None) -> Iterator[None]:
    """While the body runs, what it shows on standard output and error is written to a file, started anew, as well."""
    if path is None:
        yield
        return
    with open(path, "w", encoding="utf-8") as file:
        out, err = cast(TextIO, _Both(sys.stdout, file)), cast(TextIO, _Both(sys.stderr, file))
        with redirect_stdout(out), redirect_stderr(err):
            yield


class Lines:
    """The seed's JSON lines as they come: on standard output, in a file that is started anew, or nowhere."""

    def __init__(self, shown: bool, path: str | None) -> None:
        self.shown, self.path = shown, path
        if path:
            Path(path).write_text("", encoding="utf-8")

    def meta(self, count: int, job: Job) -> None:
        """The line before the configurations of one cluster."""
        names = [gpu.name for gpu in job.nodes]
        cluster = {name: names.count(name) for name in sorted(set(names))}
        self._write({"type": "meta", "total_count": count, "gbs": job.gbs, "cluster": cluster})

    def row(self, number: int, row: Row) -> None:
        """One configuration."""
        columns = row.columns()
        plain = {
            "gpu_cluster": "gpu_cluster_str",
            "total_time(s)": "total_time_seconds",
            "total_time(h)": "total_time_hours",
        }
        named = {plain.get(key, key.partition("(")[0]): value for key, value in columns.items() if key != "rank"}
        self._write({**named, "index": number})

    def _write(self, value: Mapping[str, Any]) -> None:
        if self.shown:
            sys.stdout.write(json.dumps(value) + "\n")
            sys.stdout.flush()
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(value) + "\n")


def as_json(rows: Sequence[Row], seconds: float, borrowed: Sequence[str]) -> dict[str, Any]:
    """One object with every row; the words of the native search beside the seed's columns."""

    def result(row: Row) -> dict[str, Any]:
        columns = row.columns()
        same = {"step_time_s": row.step, "memory_gb": row.memory, "throughput": columns[SPEED], "breakdown": row.parts}
        return {**columns, **same, "layout": _layout(row.job), "notes": row.notes}

    return {
        "configurations_considered": len(rows),
        "feasible": sum(not row.is_oom for row in rows),
        "seconds": seconds,
        "borrowed_profiles": list(borrowed),
        "results": [result(row) for row in rows],
        "pareto": [row.rank for row in frontier(rows)],
    }


def _layout(job: Job) -> str:
    from fms_parallel.layout import ParallelLayout

    micros = job.micros if job.pp > 1 else 1
    return str(ParallelLayout(pp=job.pp, dp=job.dp, tp=job.tp, precision="bf16", microbatches=micros))


def as_text(rows: Sequence[Row], top: int, seconds: float) -> str:
    """The ranked table for a person."""
    from fms_parallel.planner.render import table

    lines = []
    for row in rows[:top]:
        c = row.columns()
        numbers = (f"{row.step:.3f}", f"{c[SPEED]:.3f}", f"{row.memory:.1f}", "too large" if row.is_oom else "fits")
        degrees = (str(c[name]) for name in ("rank", "tp", "dp", "pp", "mbs"))
        lines.append((*degrees, *numbers, f"{c[COST]:.2f}", c["gpu_cluster"], _shown(row.layers or row.counts)))
    header = ("rank", "tp", "dp", "pp", "mbs", "step s", "samples/s", "GB", "memory", "cost $", "cluster", "partition")
    fitting = sum(not row.is_oom for row in rows)
    return table(lines, header) + f"\n\n{len(rows)} configurations, {fitting} fit ({seconds:.2f} s)"


def _shown(partition: Sequence[int]) -> str:
    """A partition in a table's line: all stages, or the first and the last of many; files have every stage."""
    if len(partition) <= STAGES_SHOWN:
        return str(list(partition))
    return f"[{', '.join(map(str, partition[: STAGES_SHOWN - 1]))}, .. {partition[-1]}] of {len(partition)}"
