"""Predicted against measured step times and collectives.

    fms-plan validate --measured vtrain.json --json
    fms-plan validate --measured vtrain.json --calibrate-rows 30     fit to 30 rows, score the others

Forms that are read: {"multi": [...], "single": [...]} with vTrain's columns; {"rows": [...]} with columns of NCCL tests
(op, size, num_nodes, gpus_per_node, time-o in microseconds); {"tables": [...]} of published tables with their captions.
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan validate`."""
    parser.add_argument("--measured", required=True, metavar="FILE.json", help="measurements in one of the forms above")
    parser.add_argument("--calibrate-rows", type=int, default=0, metavar="N", help="rows of each table to fit to first")
    parser.add_argument(
        "--network", default="a100-perlmutter", help="device whose links collectives ran on (default: %(default)s)"
    )
    parser.add_argument(
        "--devices", metavar="FILE.json", help="more devices, in the form of the planner's devices.json"
    )
    parser.add_argument("--rows", action="store_true", help="also show every row")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Score and show."""
    from fms_parallel.planner import render, validation
    from fms_parallel.planner.hardware import load_devices
    from fms_parallel.planner.measured import read_measured

    devices = load_devices(args.devices)
    found = validation.validate(read_measured(args.measured), devices, args.calibrate_rows, args.network)
    if args.json:
        common.say_json(validation.as_json(found, with_rows=args.rows))
        return 0
    header = ("n", "MAPE", "signed median", "p90", "Spearman", "feasible", "table")
    common.say(render.table([validation.as_row(part) for part in found], header))
    if args.rows:
        for part in found:
            common.say(f"\n{part.name}")
            for row in part.rows:
                common.say(
                    f"  {row['measured_s']:10.4f} {row['predicted_s']:10.4f} {row['error']:+7.1%}  {row['label']}"
                )
    return 0
