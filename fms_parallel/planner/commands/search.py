"""Rank the layouts of a model on a cluster.

fms-plan search --model llama:3.1-70b --gpus h100:64 --global-batch 1024 --seq 8192
fms-plan search ... --pin "tp<=8" --exclude cp --max-micro-batch 2 --json
fms-plan search --compat tpe --help      as transformer-perf-estimates does
fms-plan search --compat fasop --help    as FASOP does
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fms_parallel.planner.commands import common

if TYPE_CHECKING:
    from fms_parallel.planner.api import Planner, Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan search`."""
    common.add_job(parser)
    parser.add_argument(
        "--top", type=int, default=10, metavar="K", help="layouts that are shown (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--html", metavar="FILE.html", help="also write a report that opens in a browser, offline")
    limits = parser.add_argument_group("what may be chosen")
    limits.add_argument(
        "--pin", action="extend", nargs="+", default=[], metavar="RULE", help='such as "tp<=8", "pp=4", "sp=1"'
    )
    limits.add_argument(
        "--exclude", action="extend", nargs="+", default=[], metavar="WORD", help="an axis or policy: pp, cp, full"
    )
    limits.add_argument("--max-micro-batch", type=int, metavar="N", help="largest micro-batch")
    limits.add_argument(
        "--schedules", nargs="+", metavar="WORD", help="pipeline schedules (default: 1f1b interleaved1f1b zbv)"
    )
    limits.add_argument(
        "--recompute",
        nargs="+",
        metavar="WORD",
        help="policies, every=N and budget=PART among them (default: none selective full)",
    )
    limits.add_argument("--offload", action="store_true", help="also consider optimizer and parameters in host memory")
    limits.add_argument("--deadline", type=float, metavar="HOURS", help="with --steps: drop what takes longer")
    limits.add_argument("--budget", type=float, metavar="DOLLARS", help="with --steps: drop what costs more")
    limits.add_argument("--steps", type=int, metavar="N", help="optimizer steps of the whole run")


def run(args: argparse.Namespace) -> int:
    """Search and show."""
    from fms_parallel.errors import ConfigError
    from fms_parallel.planner import advice, api, render
    from fms_parallel.planner.space import Space

    planner = common.read_planner(args)
    if args.top < 1 or (args.max_micro_batch is not None and args.max_micro_batch < 1):
        raise ConfigError("--top and --max-micro-batch: need whole numbers >= 1.")
    space = Space(
        schedules=tuple(args.schedules or Space().schedules),
        recompute=tuple(args.recompute or Space().recompute),
        offloads=("none", "optimizer_state") if args.offload else ("none",),
        max_micro=args.max_micro_batch,
        pins=tuple(args.pin),
        exclude=tuple(args.exclude),
    )
    limit = advice.step_limit(planner.cluster, args.steps, args.deadline, args.budget)
    result = api.search_with(planner, space, args.top, limit)
    if not result.results:
        raise advice.nothing_fits(planner, space, result, limit)
    if args.html:
        _write_html(args.html, planner, result)
    if args.json:
        common.say_json({**result.as_json(), "launch": render.launch(result, result.results[0])})
        return 0
    best = result.results[0]
    common.say(f"{planner.model.name} on {planner.cluster}, {planner.workload.global_batch} sequences of "
               f"{planner.workload.sequence} tokens per step, {planner.workload.precision}\n")  # fmt: skip
    common.say(render.ranked(result))
    common.say(f"\nwhere the first one spends a step\n{render.bars(best.breakdown, 's')}")
    common.say(f"\nwhat fills its memory\n{render.bars(best.memory_breakdown, 'GiB')}")
    common.say(f"\n{render.rejected(result)}\n({result.seconds:.3f} s)")
    common.say(f"\nto run the first one:\n{render.launch(result, best)}")
    return 0


def _write_html(path: str, planner: Planner, result: Result) -> None:
    """The report, with the pipeline of the best layout when it has one and few enough micro-batches to see."""
    from pathlib import Path

    from fms_parallel.planner import render, report
    from fms_parallel.planner.simulate import simulate

    best = result.results[0]
    shown = min(best.micro_batches, 4 * best.layout.pp)
    events = (
        simulate(best.layout.schedule, best.layout.pp, shown, planner.stages(best.layout)) if best.layout.pp > 1 else []
    )
    Path(path).write_text(report.as_html(result, render.launch(result, best), events), encoding="utf-8")
