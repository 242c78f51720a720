"""What several commands share: the flags that name a model, a cluster and a workload, and writing to the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from fms_parallel.errors import ConfigError

if TYPE_CHECKING:
    from fms_parallel.planner.api import Planner
    from fms_parallel.planner.hardware import Cluster
    from fms_parallel.planner.operators import Workload

SEQUENCE = 2048


def add_job(parser: argparse.ArgumentParser) -> None:
    """Flags that every command about one job has."""
    job = parser.add_argument_group("the job")
    job.add_argument(
        "--model", help="arch:variant (llama:3.1-70b), a seed model (gpt3_1T), or a JSON / config.json file"
    )
    job.add_argument("--gpus", nargs="+", metavar="SPEC", help="device:count (h100:64), /N for nodes of N (h100:64/4)")
    job.add_argument("--global-batch", type=int, metavar="N", help="sequences of one optimizer step")
    job.add_argument(
        "--seq", type=int, metavar="N", help=f"tokens of a sequence (default: the model's, at most {SEQUENCE})"
    )
    job.add_argument("--precision", default="bf16", choices=("fp8", "bf16", "fp32", "fp64"), help="of matrix products")
    job.add_argument(
        "--software", default="native", help="whose kernels and habits (default: %(default)s, this library)"
    )
    job.add_argument("--devices", metavar="FILE.json", help="more devices, in the form of the planner's devices.json")
    job.add_argument(
        "--constants", metavar="FILE.json", help="constants that `validate --calibrate-rows N --json` fitted"
    )


def require(args: argparse.Namespace, *names: str) -> None:
    """Refuse a command without these flags.

    Raises:
        ConfigError: naming the first that is missing.
    """
    for name in names:
        if getattr(args, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is needed; see --help.")


def read_cluster(args: argparse.Namespace) -> Cluster:
    """The cluster of `--gpus`, with the devices of `--devices`."""
    from fms_parallel.planner.hardware import Cluster, load_devices

    return Cluster.parse(",".join(args.gpus), load_devices(args.devices))


def read_planner(args: argparse.Namespace) -> Planner:
    """A planner for the job that the flags describe.

    Raises:
        ConfigError: a flag that is missing or impossible.
    """
    from fms_parallel.planner.api import Planner
    from fms_parallel.planner.catalog import find_model
    from fms_parallel.planner.efficiency import DEFAULT
    from fms_parallel.planner.hardware import read_json
    from fms_parallel.planner.operators import Workload

    require(args, "model", "gpus", "global_batch")
    if args.global_batch < 1 or (args.seq is not None and args.seq < 1):
        raise ConfigError("--global-batch and --seq: need whole numbers >= 1.")
    model = find_model(args.model)
    workload: Workload = Workload(
        args.global_batch, args.seq or min(model.shape.max_positions, SEQUENCE), args.precision
    )
    constants = DEFAULT
    if args.constants:
        table = read_json(args.constants)
        values = table.get("constants", table)
        if not isinstance(values, dict):
            raise ConfigError(f"{args.constants}: constants: needs an object with a number for each name.")
        if any(isinstance(value, dict) for value in values.values()):
            raise ConfigError(f"{args.constants}: describes devices, as `calibrate` writes them: give it to --devices.")
        try:
            constants = DEFAULT.having(values)
        except ConfigError as error:
            raise ConfigError(f"{args.constants}: {error}") from None
    return Planner.of(model, read_cluster(args), workload, args.software, constants)


def say(text: str) -> None:
    """One or more lines for a person, on stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def say_json(value: Any) -> None:
    """One JSON object for a program, on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
