"""Plot cost against throughput again from a table that `search --compat fasop --csv` (or FASOP) wrote.

fms-plan pareto-plot table.csv pareto.png --title "A40, squad"
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan pareto-plot`."""
    parser.add_argument("table", metavar="TABLE.csv")
    parser.add_argument("plot", metavar="PLOT.png", help="png, svg or pdf")
    parser.add_argument("--title", default="Pareto", help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Read, plot, and list the frontier."""
    from fms_parallel.planner.fasop import output

    rows = output.read_csv(args.table)
    output.write_plot(rows, args.plot, args.title)
    line = output.skyline([row for row in rows if not row["is_oom"]])
    common.say(f"{len(rows)} rows, {len(line)} on the frontier, drawn to {args.plot}")
    return 0
