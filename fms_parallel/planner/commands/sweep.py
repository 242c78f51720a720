"""Sweeps of transformer-perf-estimates.

fms-plan sweep --model gpt3_1T --systems A100 H200 B200 --domains 4 8 64 --num-gpus 1024 2048 4096 \\
    --global-batch 4096 --plot overall.png
fms-plan sweep --model gpt3_1T --systems B200 --num-gpus 4096 --global-batch 4096 --bandwidths 2000 4000 8000 \\
    --capacities 80 192 384 [--flops 1000 2500] --plot design.png
"""

from __future__ import annotations

import argparse
from typing import Any

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan sweep`."""
    parser.add_argument("--model", required=True, help="gpt3, gpt3_1T, vit_era5 or a JSON file")
    parser.add_argument("--tensor-parallel", choices=("1d", "2d-summa", "2d-seqp"), default="1d")
    parser.add_argument("--systems", nargs="+", default=["A100", "H200", "B200"])
    parser.add_argument("--domains", nargs="+", type=int, default=[4, 8, 64], help="NVLink domain sizes")
    parser.add_argument("--num-gpus", nargs="+", type=int, required=True)
    parser.add_argument("--global-batch", type=int, required=True)
    parser.add_argument("--bandwidths", nargs="+", type=float, help="GB/s of memory: sweep these instead")
    parser.add_argument("--capacities", nargs="+", type=float, help="GB of memory")
    parser.add_argument("--flops", nargs="+", type=float, default=[], help="TFLOP/s of matrix products")
    parser.add_argument("--corrected", action="store_true", help="without the original's mistakes")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Sweep and show."""
    from fms_parallel.errors import ConfigError
    from fms_parallel.planner import render
    from fms_parallel.planner.tpe import plots, sweeps, system

    model, systems = system.find_model(args.model), [system.find_system(name) for name in args.systems]
    memory = args.bandwidths or args.capacities or args.flops
    if min(*args.num_gpus, *args.domains, args.global_batch) < 1:
        raise ConfigError("--num-gpus, --domains, --global-batch: need whole numbers >= 1.")
    if not all(
        0 < number < float("inf") for number in (*(args.bandwidths or ()), *(args.capacities or ()), *args.flops)
    ):
        raise ConfigError("--bandwidths, --capacities, --flops: need numbers > 0.")
    if memory and (len(systems) > 1 or len(args.num_gpus) > 1):
        raise ConfigError("--bandwidths, --capacities and --flops vary one system at one --num-gpus: name one of each.")
    if memory:
        one = systems[0]
        ranges = (args.bandwidths or [one.hbm_bandwidth], args.capacities or [one.hbm_capacity], args.flops)
        job = (args.tensor_parallel, args.num_gpus[0], args.global_batch)
        rows = list(sweeps.over_memory(model, one, *job, *ranges, compat=not args.corrected))
    else:
        job_ = (args.domains, args.tensor_parallel, args.num_gpus, args.global_batch)
        rows = list(sweeps.over_systems(model, systems, *job_, compat=not args.corrected))
    if args.plot and memory:
        plots.over_memory(rows, args.plot)
    elif args.plot:
        plots.over_devices(rows, args.plot)
    if args.json:
        common.say_json({"points": rows})
        return 0
    common.say(render.table([_line(row) for row in rows], HEADER))
    if args.plot:
        common.say(f"drawn to {args.plot}")
    return 0


HEADER = ("gpus", "domain", "TFLOP/s", "GB/s", "GB", "t s", "dp", "tp", "pp", "system")


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("gpus", "nvlink_size", "matrix_flops_fp16", "hbm_bandwidth", "hbm_capacity")
    best = (f"{row['t']:.3f}", row["dp"], row["tp"], row["pp"]) if row["t"] else ("too large", "", "", "")
    return (*(f"{row[name]:g}" for name in names), *(str(word) for word in (*best, row["system"])))
