"""Why layout A beats layout B: where the time and the memory of both go.

fms-plan explain "fsdp=8,tp=8,sp" "pp=8,tp=8,sp,microbatches=64" --model llama:3.1-8b --gpus h100:64 --global-batch 512
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan explain`."""
    parser.add_argument("first", metavar="A", help="a layout")
    parser.add_argument("second", metavar="B", help="another one")
    common.add_job(parser)
    parser.add_argument("--micro-batch", type=int, help="sequences of one micro-batch where a layout has no pipeline")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compare and show."""
    from fms_parallel.layout import ParallelLayout
    from fms_parallel.planner import explain, render

    planner = common.read_planner(args)
    world = planner.cluster.gpus
    layouts = [
        ParallelLayout.parse(text).resolve(world, planner.cluster.device.per_node) for text in (args.first, args.second)
    ]
    pair = [planner.estimate(layout, args.micro_batch) for layout in layouts]
    found = explain.differences(*pair)
    if args.json:
        common.say_json(
            {
                "explanation": explain.sentence(*pair),
                "layouts": [estimate.as_json() for estimate in pair],
                "seconds_gained": {d.purpose: d.gained for d in found},
            }
        )
        return 0
    common.say(explain.sentence(*pair) + "\n")
    rows = [(f"{d.first:.3f}", f"{d.second:.3f}", f"{d.gained:+.3f}", explain.NAMES[d.purpose]) for d in found]
    total = [estimate.step_time_s for estimate in pair]
    rows.append((f"{total[0]:.3f}", f"{total[1]:.3f}", f"{total[1] - total[0]:+.3f}", "a whole step"))
    common.say(render.table(rows, ("A s", "B s", "A gains", "spent on")))
    memory = [
        (f"{pair[0].memory_breakdown[k]:.2f}", f"{pair[1].memory_breakdown[k]:.2f}", k)
        for k in pair[0].memory_breakdown
    ]
    memory.append((f"{pair[0].memory_gb:.2f}", f"{pair[1].memory_gb:.2f}", "all of it"))
    common.say("\n" + render.table(memory, ("A GiB", "B GiB", "memory for")))
    return 0
