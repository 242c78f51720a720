"""What each axis costs: CPU seconds of a training step summed over two ranks, relative to one rank.

    python -m benchmarks.parallel_overhead
    python -m benchmarks.parallel_overhead --size large --layout tp=2 --layout pp=2,schedule=gpipe,microbatches=8

One rank's step and every layout's take their turns in the same two processes (benchmarks/train_step.py, whose
contestants, rows and losses these are), on the model of the peers' published CPU runs: width 384, 8 blocks, 256 tokens,
8 rows. `goal` is this project's own.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.train_step import SIZES, check_losses, one_row, summary, weights_for
from fms_parallel.cli import run
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout

GOALS = {
    "tp=2": 1.15,
    "tp=2,sp": 1.15,
    "fsdp=2": 1.20,
    "dp=2": None,
    "pp=2,microbatches=4": 1.10,
    "cp=2": 1.25,
}
"""Layout -> the largest ratio to one rank that it should have."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="(default: %(default)s)")
    parser.add_argument("--layout", action="append", help="only these, each of two ranks")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each layout (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    layouts = args.layout or list(GOALS)
    for layout in layouts:
        if ParallelLayout.parse(layout).world_size != 2:
            raise ConfigError(f"--layout {layout}: this benchmark has two ranks; give a layout of two.")
    found = measure(layouts, args.size, args.steps)
    if args.json:
        print(json.dumps({"size": args.size, "steps": args.steps, "rows": found}))
        return 0
    print(f"{'':<32} CPU s    wall s   to one rank   goal")
    for layout, row in found.items():
        goal = f"{row['goal']:.2f}" if row.get("goal") else ""
        print(f"{layout:<30}{row['cpu_s']:8.3f} {row['wall_s']:9.3f} {row['ratio']:11.2f} x {goal:>6}")
    return 0


def measure(layouts: list[str], size: str, steps: int) -> dict[str, dict[str, Any]]:
    """CPU and wall seconds per step of one rank and of every layout, and the layouts' ratio to one rank."""
    names = ("ours", *(f"ours {layout}" for layout in layouts))
    with weights_for(SIZES[size]) as folder:
        costs = one_row(names, 2, SIZES[size], folder, steps)
    if broken := {name: cost for name, cost in costs.items() if isinstance(cost, str)}:
        raise ConfigError(f"did not run: {broken}")
    rows = {name: summary(cost) for name, cost in costs.items() if not isinstance(cost, str)}
    check_losses(rows)
    alone = rows["ours"]["cpu_s"]
    table: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        layout = name.removeprefix("ours").strip()
        table[layout or "one rank"] = {**row, "ratio": row["cpu_s"] / alone, "goal": GOALS.get(layout)}
    return table


if __name__ == "__main__":
    run(main)
