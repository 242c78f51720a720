"""Search as transformer-perf-estimates does: its layers, its systems, its candidates, its numbers.

fms-plan search --compat tpe --tensor-parallel 1d --model gpt3_1T --system A100 --nvlink-domain 4 --num-gpus 2048 \\
    --global-batch 4096 --top 100 --json

The original's mistakes are kept; --corrected leaves them out and says which they are.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fms_parallel.planner.commands import common

if TYPE_CHECKING:
    from fms_parallel.planner.tpe.search import Found

STRATEGIES = ("1d", "2d-summa", "2d-seqp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan search --compat tpe`."""
    parser.add_argument("--tensor-parallel", choices=STRATEGIES, default="1d", help="(default: %(default)s)")
    parser.add_argument("--model", required=True, help="gpt3, gpt3_1T, vit_era5 or a JSON file with l, e, h, depth, f")
    parser.add_argument("--system", required=True, help="A100, H200, B200, B200-next or a JSON file of the same form")
    parser.add_argument(
        "--nvlink-domain", type=int, metavar="N", help="devices in an NVLink domain (default: the system's)"
    )
    parser.add_argument("--num-gpus", type=int, required=True, metavar="N")
    parser.add_argument("--global-batch", type=int, required=True, metavar="N")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="(default: %(default)s)")
    parser.add_argument("--corrected", action="store_true", help="without the original's mistakes")
    parser.add_argument("--layers", action="store_true", help="also the layers of the best configuration")
    parser.add_argument("--plot", metavar="FILE.png", help="draw where time and memory of these configurations go")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Search and show."""
    from fms_parallel.errors import ConfigError
    from fms_parallel.planner.tpe import plots, search, system

    if min(args.top, args.num_gpus, args.global_batch, 1 if args.nvlink_domain is None else args.nvlink_domain) < 1:
        raise ConfigError("--top, --num-gpus, --global-batch and --nvlink-domain: need whole numbers >= 1.")
    model, chosen = system.find_model(args.model), system.find_system(args.system, args.nvlink_domain)
    compat, job = not args.corrected, (args.tensor_parallel, args.num_gpus, args.global_batch)
    found = search.search(model, chosen, *job, args.top, compat)
    if not found.feasible:
        raise search.nothing_fits(model, chosen, *job)
    layers = search.layer_rows(model, chosen, args.tensor_parallel, found, compat) if args.layers else []
    if args.plot:
        plots.over_configurations(found.rows(), args.plot)
    if args.json:
        common.say_json(_as_json(found, args.corrected, layers))
        return 0
    _show(found, layers)
    if args.corrected:
        common.say("\nunlike the original:")
        common.say("\n".join(f"  {name}: {text}" for name, text in system.CORRECTIONS.items()))
    return 0


def _as_json(found: Found, corrected: bool, layers: list[dict[str, Any]]) -> dict[str, Any]:
    from fms_parallel.planner.tpe import search, system

    def result(row: dict[str, Any]) -> dict[str, Any]:
        ours = {"layout": search.layout_of(row), "step_time_s": row["t"], "memory_gb": row["mem"]}
        return {**row, **ours, "breakdown": search.parts(row)}

    return {
        "configurations_considered": found.considered,
        "feasible": found.feasible,
        "seconds": found.seconds,
        "results": [result(row) for row in found.rows()],
        **({"layers": layers} if layers else {}),
        **({"corrections": dict(system.CORRECTIONS)} if corrected else {}),
    }


def _show(found: Found, layers: list[dict[str, Any]]) -> None:
    from fms_parallel.planner import render
    from fms_parallel.planner.tpe import search

    rows = found.rows()
    names = [name for name in ("dp", "tp1", "tp2", "tp", "pp", "mbs", "nb") if name in rows[0]]
    placed = [name for name in rows[0] if name.startswith("nv_")]
    lines = []
    for row in rows:
        numbers = (f"{row['t']:.3f}", f"{row['throughput']:.3f}", f"{row['mem']:.1f}")
        lines.append((*(str(row[n]) for n in names), *numbers, ",".join(str(row[n]) for n in placed)))
    together = f"in one domain ({', '.join(n[3:] for n in placed)})"
    common.say(render.table(lines, (*names, "t s", "samples/s", "GB", together)))
    common.say(f"\nwhere the first one spends a step\n{render.bars(search.parts(rows[0]), 's')}")
    common.say(f"\n{found.considered} candidates, {found.feasible} fit ({found.seconds:.3f} s)")
    if layers:
        header = [name for name in layers[0] if name != "name"]
        table = [(*(f"{row[n]:.3e}" for n in header), str(row["name"])) for row in layers]
        common.say("\n" + render.table(table, (*header, "layer")))
