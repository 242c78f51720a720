"""A layout as a person can see it: which rank is where, and what a pipeline does when.

    python -m fms_parallel.strategy.show "pp=2,fsdp=2,tp=2,sp,schedule=zbv,microbatches=8" --picture step.png
    python -m fms_parallel.strategy.show "pp=2,schedule=zbv,microbatches=8" --write-schedule step.csv    # edit it, then
    python -m fms_parallel.strategy.show "pp=2,schedule=file:step.csv,virtual_stages=2,microbatches=8"

It knows layouts and the simulated schedule; it starts no ranks. Forward of one micro-batch on one stage counts one unit
of time, backward two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod

from fms_parallel import compat
from fms_parallel.cli import run
from fms_parallel.errors import ConfigError
from fms_parallel.layout import AXES, ParallelLayout
from fms_parallel.planner.simulate import ORDERS, B, Event, F, Stages, W, Work, makespan, run_orders, simulate
from fms_parallel.planner.timeline import as_text, write_plot
from fms_parallel.schedule_file import (
    BACKWARD,
    FORWARD,
    INPUTS,
    WEIGHTS,
    Action,
    FileSchedule,
    of_orders,
    parse_cells,
    write_schedule,
)
from fms_parallel.schedules import FILE, find_schedule

PICTURES = (".png", ".svg", ".pdf")


def rank_grid(layout: ParallelLayout) -> str:
    """One line per line of tp neighbours, with the place of the line on the other axes.

    pp 0  fsdp 0   ranks  0  1
    pp 0  fsdp 1   ranks  2  3
    """
    return "\n".join(_grid_lines(layout))


def _grid_lines(layout: ParallelLayout) -> Iterator[str]:
    degrees = dict(zip(AXES, layout.degrees, strict=True))
    outer = [axis for axis in AXES if axis != "tp"]
    width = len(str(layout.world_size - 1))
    for number, place in enumerate(product(*(range(degrees[axis]) for axis in outer))):
        named = [f"{axis} {at}" for axis, at in zip(outer, place, strict=True) if degrees[axis] > 1]
        ranks = range(number * layout.tp, (number + 1) * layout.tp)
        label = "  ".join(named) + "   " if named else ""
        yield f"{label}ranks " + " ".join(f"{rank:{width}}" for rank in ranks)


def stage_lines(layout: ParallelLayout) -> str:
    """Which stages each pipeline rank holds."""
    return "\n".join(f"pp {rank}: stages {' '.join(map(str, layout.stages_of(rank)))}" for rank in range(layout.pp))


def timeline(layout: ParallelLayout, costs: Stages | None = None) -> list[Event]:
    """The schedule's events; without `costs` in units of one stage's forward of one micro-batch."""
    if costs is None:
        units = [1.0] * layout.stages
        costs = Stages(units, [2.0] * layout.stages, weight=units)
    schedule = find_schedule(layout.schedule)
    if not isinstance(schedule, FileSchedule):
        return simulate(layout.schedule, layout.pp, layout.pieces, costs)
    orders = [schedule.order(rank) for rank in range(layout.pp)]
    return run_orders([[Work(_KINDS[a.kind], a.stage, a.micro) for a in order] for order in orders], costs)


_KINDS = {FORWARD: F, BACKWARD: B, INPUTS: B, WEIGHTS: W}


def as_file(layout: ParallelLayout) -> FileSchedule:
    """The layout's schedule as a file has it, in the order in which torch works it off."""
    schedule = find_schedule(layout.schedule)
    if isinstance(schedule, FileSchedule):
        return schedule
    if schedule.shape == "single":
        orders = [ORDERS[layout.schedule](rank, layout.pp, 1, layout.pieces) for rank in range(layout.pp)]
        return of_orders([[Action(work.stage, work.kind, work.micro) for work in order] for order in orders])
    held = layout.stages_of(0)
    cells = compat.schedule_cells(schedule.torch_name, layout.pp, held, layout.stages, layout.pieces)
    return parse_cells(cells, layout.schedule)


def describe(layout: ParallelLayout) -> str:
    """Grid, stages and schedule as text."""
    sizes = " x ".join(f"{axis}={degree}" for axis, degree in zip(AXES, layout.degrees, strict=True) if degree > 1)
    parts = [f"{str(layout) or 'one process'}: {prod(layout.degrees)} ranks{f' = {sizes}' if sizes else ''}"]
    parts.append(rank_grid(layout))
    if layout.pp > 1:
        events = timeline(layout)
        work = sum(event.end - event.start for event in events)
        busy = work / (makespan(events) * layout.pp)
        parts.append(stage_lines(layout))
        parts.append(f"{layout.schedule}, {layout.pieces} micro-batches: ranks are busy {busy:.0%} of the time")
        parts.append(as_text(events, layout.pp))
        parts.append("A b c: forward of micro-batch 0, backward of 1 and 2; w: weight gradients; dots: idle")
    return "\n\n".join(parts) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Print, and draw when asked to."""
    parser = argparse.ArgumentParser(prog="python -m fms_parallel.strategy.show", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("layout", help='such as "pp=2,fsdp=2,tp=2,sp"; every axis with its number')
    parser.add_argument("--picture", help="also draw the schedule: a .png, .svg or .pdf file")
    parser.add_argument(
        "--write-schedule", metavar="FILE", help="also write the schedule as CSV, for schedule=file:FILE"
    )
    args = parser.parse_args(words)
    layout = ParallelLayout.parse(args.layout)
    if (args.picture or args.write_schedule) and layout.pp == 1:
        flag = "picture" if args.picture else "write-schedule"
        raise ConfigError(f"layout {args.layout!r} has no schedule to draw: that is what pp=N has; drop --{flag}.")
    if args.picture is not None and not args.picture.endswith(PICTURES):
        raise ConfigError(f"--picture {args.picture}: the suffix says what is drawn; use {', '.join(PICTURES)}.")
    layout.check_schedule()
    sys.stdout.write(describe(layout))
    if args.write_schedule is not None:
        own = replace(
            layout,
            schedule=f"{FILE}{args.write_schedule}",
            virtual_stages=layout.stages // layout.pp,
            microbatches=layout.pieces,
        )
        write_schedule(as_file(layout), args.write_schedule)
        sys.stdout.write(f"\nschedule written: {args.write_schedule}; its layout is {str(own)!r}\n")
    if args.picture is not None:
        unit = "time, in forward passes of one micro-batch through one stage"
        write_plot(timeline(layout), layout.pp, args.picture, unit)
        sys.stdout.write(f"\nschedule drawn: {args.picture}\n")
    return 0


if __name__ == "__main__":
    run(main)
