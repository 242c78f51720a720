"""Measure a profile in FASOP's form on the machine at hand (also on a CPU).

fms-plan make-profile --model llama:3.2-1b --gpu CPU --tp 1 2 4 --rows 3 --seq 128 --out profiles/
fms-plan show-profile --dir profiles/
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan make-profile`."""
    parser.add_argument("--model", required=True, help="arch:variant, a seed model (llama70b), or a JSON file")
    parser.add_argument(
        "--gpu",
        default="CPU",
        help="name in the files; `search --compat fasop` knows A10, A40, A100 (default: %(default)s)",
    )
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="degrees (default: 1)")
    parser.add_argument("--rows", type=int, default=4, help="micro-batches 1, 2, 4, ... (default: %(default)s of them)")
    parser.add_argument("--seq", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where {model}_{gpu}_{tp}.npz go")


def run(args: argparse.Namespace) -> int:
    """Measure and write one file per tp."""
    from pathlib import Path

    import numpy as np

    from fms_parallel.errors import ConfigError
    from fms_parallel.planner.catalog import find_model
    from fms_parallel.planner.fasop.make import measure_profile
    from fms_parallel.planner.fasop.tables import profile_name

    if min(args.rows, args.seq, *args.tp) < 1 or "_" in args.gpu:
        raise ConfigError("--rows, --seq, --tp: need whole numbers >= 1; --gpu: no underscore, it parts the file name.")
    model = find_model(args.model)
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file: name a folder.")
    for tp in args.tp:
        data = measure_profile(model.shape, args.seq, tp, args.rows, device=args.device)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{profile_name(model.name)}_{args.gpu}_{tp}.npz"
        np.savez(path, data=data)
        common.say(f"{path}")
    return 0
