"""`--distributed auto`: the planner's fastest layout for the machine at hand, or for the one that --gpus describes.

It knows command lines and what a strategy refuses for a model; what is fast is the planner's. Every rank decides for
itself, before the process group starts, from the same numbers; `agree` makes sure that they were the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.training.options import TrainOptions

if TYPE_CHECKING:
    from torch import nn

    from fms_parallel.distributed.start import Launch
    from fms_parallel.planner import Cluster, Estimate

PLANNED = "planned"
"""Where run.json keeps what was predicted."""


def settle(
    args: argparse.Namespace, options: TrainOptions, layout: ParallelLayout | None, config: Any
) -> tuple[TrainOptions, ParallelLayout, dict[str, Any]]:
    """Options and layout of the run, and `{"planned": ...}` for its metadata when the layout was left to the planner.

    Without a pipeline the planner's micro-batches are gradient accumulation, unless --grad_accum_steps sets them.

    Raises:
        ConfigError: an unknown device, another number of devices than ranks, or nothing that fits and can be run.
    """
    if layout is not None:
        return options, layout, {}
    from fms_parallel.distributed.start import Launch
    from fms_parallel.planner import Model, Planner, Space, Workload, choose

    launch = Launch.read()
    cluster, source = read_cluster(args, launch)
    pieces = options.grad_accum_steps
    if options.batch_size % pieces:
        raise ConfigError(f"--batch_size {options.batch_size} does not divide into --grad_accum_steps {pieces}.")
    name = f"{args.architecture}:{args.variant}" if args.variant else str(args.architecture)
    workload = Workload(options.batch_size // pieces, args.seq_len, args.default_dtype or "fp32")
    planner = Planner.of(Model.of(name, config.shape()), cluster, workload)
    can = runnable(args, config)

    def runs(estimate: Estimate) -> None:
        if pieces > 1 and estimate.layout.pp == 1 and estimate.micro_batches > 1:
            raise ConfigError(f"--grad_accum_steps {pieces} is given, and would be {estimate.micro_batches} times that")
        can(estimate.layout)

    best, result = choose(planner, Space(), runs)
    accumulated = best.micro_batches if best.layout.pp == 1 else 1
    predicted = {
        "cluster": str(cluster),
        "source": source,
        "step_time_s": best.step_time_s * pieces,
        "memory_gb": best.memory_gb,
        "micro_batch": best.micro_batch,
        "configurations_considered": result.considered,
        "feasible": result.feasible,
    }
    return replace(options, grad_accum_steps=pieces * accumulated), best.layout, {PLANNED: predicted}


def read_cluster(args: argparse.Namespace, launch: Launch) -> tuple[Cluster, str]:
    """What to plan for, and who says so.

    Raises:
        ConfigError: as `Cluster.parse` and `machine_at_hand`, or --gpus with another number of devices than ranks.
    """
    from fms_parallel.planner import Cluster, load_devices, machine_at_hand
    from fms_parallel.planner.hardware import read_json

    known = load_devices(args.devices)
    if args.gpus is None:
        place = (args.device_type, launch.world_size, launch.local_world_size, launch.local_rank)
        here = machine_at_hand(*place, known)
        if args.devices is None:
            return here, "this machine, the constants that the library brings along"
        described = read_json(args.devices)
        if here.device.name not in described:
            raise ConfigError(
                f"--devices {args.devices} describes {', '.join(described)}, this machine is a {here.device.name}: say "
                "with --gpus which one is meant."
            )
        return here, f"this machine, {args.devices}"
    cluster = Cluster.parse(args.gpus, known)
    if cluster.gpus != launch.world_size:
        raise ConfigError(
            f"--gpus {args.gpus} are {cluster.gpus} devices but the job has {launch.world_size} ranks: each rank uses "
            "one; start as many, or change the number."
        )
    return cluster, f"--gpus {args.gpus}"


def runnable(args: argparse.Namespace, config: Any) -> Callable[[ParallelLayout], None]:
    """A function that raises for every layout which this model cannot run in."""
    import torch

    from fms_parallel.models.build import find_model
    from fms_parallel.strategy.compose import refuses

    known, _ = find_model(args.architecture, args.variant, args.model_path, {})
    with torch.device("meta"):
        model: nn.Module = known.build(config)
    return refuses(model, config.shape())


def agree(planned: dict[str, Any], layout: ParallelLayout, launch: Launch) -> None:
    """Say what was planned; every rank must have come to the same layout.

    Raises:
        LayoutError: on every rank, when nodes differ.
    """
    if not planned:
        return
    if launch.world_size > 1:
        import torch.distributed as dist

        words: list[str] = [""] * launch.world_size
        dist.all_gather_object(words, f"{layout} with {planned[PLANNED]['micro_batch']} rows at once")
        if len(set(words)) > 1:
            raise LayoutError(
                f"--distributed auto: ranks planned {' and '.join(repr(word) for word in sorted(set(words)))}, because "
                "their nodes are not alike: say what to plan for with --gpus."
            )
    if launch.rank == 0:
        p = planned[PLANNED]
        print(f"planned for {p['cluster']} ({p['source']}): {str(layout) or 'one process'}, {p['micro_batch']} rows at "
              f"once, {p['step_time_s']:.3f} s per step and {p['memory_gb']:.2f} GiB per rank predicted; "
              f"{p['feasible']} of {p['configurations_considered']} layouts fit", flush=True)  # fmt: skip
