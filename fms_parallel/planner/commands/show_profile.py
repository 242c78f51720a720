"""Show profiles in FASOP's form: milliseconds of each module by tensor-parallel degree and micro-batch.

fms-plan show-profile                 those of the package
fms-plan show-profile --dir mine/     a folder of {model}_{gpu}_{tp}.npz
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan show-profile`."""
    parser.add_argument("--dir", metavar="FOLDER", help="profiles (default: those of the package)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show every profile: a summary, then the modules of a layer."""
    from fms_parallel.errors import ConfigError
    from fms_parallel.planner.fasop.tables import COLUMNS, load_profiles
    from fms_parallel.planner.render import table

    profiles = load_profiles(args.dir)
    if not profiles:
        raise ConfigError(f"{args.dir}: no profile there; their names are {{model}}_{{gpu}}_{{tp}}.npz.")
    if args.json:
        named = {f"{m}_{g}_{tp}": data.tolist() for (m, g, tp), data in profiles.items()}
        common.say_json({"columns": list(COLUMNS), "unit": "ms", "profiles": named})
        return 0
    for model, gpu in sorted({(m, g) for m, g, _ in profiles}):
        own = sorted((tp, data) for (m, g, tp), data in profiles.items() if (m, g) == (model, gpu))
        cells = [(tp, 2**row, values) for tp, data in own for row, values in enumerate(data)]
        summary = [
            (str(tp), str(mbs), *(f"{x:.2f}" for x in (v[0], v[1:9].sum(), v[9], v.sum()))) for tp, mbs, v in cells
        ]
        common.say(f"{model} on {gpu}, forward pass, ms")
        common.say(table(summary, ("tp", "mbs", "embed", "layer", "lm_head", "total")))
        parts = [(str(tp), str(mbs), *(f"{x:.2f}" for x in v[1:9])) for tp, mbs, v in cells]
        common.say("\nmodules of a layer, ms")
        common.say(table(parts, ("tp", "mbs", *COLUMNS[1:9])) + "\n")
    return 0
