"""The timeline of one step of a layout.

fms-plan simulate "pp=4,tp=8,sp,microbatches=16" --model gpt3 --gpus a100:32 --global-batch 16 --trace step.json
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan simulate`."""
    parser.add_argument("layout", metavar="LAYOUT")
    common.add_job(parser)
    parser.add_argument("--trace", metavar="FILE.json", help="write a Chrome trace (chrome://tracing, Perfetto)")
    parser.add_argument("--plot", metavar="FILE.png", help="write a Gantt plot")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Simulate and show."""
    from fms_parallel.layout import ParallelLayout
    from fms_parallel.planner import filed, timeline
    from fms_parallel.planner.simulate import idle, makespan

    planner = common.read_planner(args)
    layout = ParallelLayout.parse(args.layout).resolve(planner.cluster.gpus, planner.cluster.device.per_node)
    estimate = planner.estimate(layout)
    stages = planner.stages(layout)
    events = filed.events(planner, layout)
    if args.trace:
        timeline.write_trace(events, args.trace)
    if args.plot:
        timeline.write_plot(events, layout.pp, args.plot)
    whole, waiting = makespan(events), idle(events, layout.pp)
    if args.json:
        common.say_json(
            {
                "layout": str(layout),
                "pipeline_s": whole,
                "idle": waiting,
                "step_time_s": estimate.step_time_s,
                "memory_gb": estimate.memory_gb,
                "stage_forward_s": list(stages.forward),
                "stage_backward_s": list(stages.backward),
                "trace": args.trace,
                "plot": args.plot,
            }
        )
        return 0
    common.say(timeline.as_text(events, layout.pp))
    common.say("capital letters: forward; small ones: backward; w: weight gradients; dots: idle")
    common.say(
        f"{whole:.3f} s of forward and backward, {waiting:.1%} of it idle; a whole step {estimate.step_time_s:.3f} s"
    )
    if estimate.margin < 0:
        common.say(f"it would not run: {estimate.memory_gb:.1f} GiB, more than a device has")
    if args.trace or args.plot:
        common.say(f"written to {', '.join(path for path in (args.trace, args.plot) if path)}")
    return 0
