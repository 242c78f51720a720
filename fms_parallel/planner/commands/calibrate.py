"""Measure the machine at hand and write a device file that every other command takes.

fms-plan calibrate --ranks 4 --out machine.json
fms-plan search --devices machine.json --gpus cpu:4 --precision fp32 --model llama:micro --global-batch 16 --seq 256

Matrix products, memory, small kernels, one transformer block, an optimizer's step, and collectives over gloo ranks; all
ranks are at work during every measurement. About half a minute on two ranks.
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan calibrate`."""
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the machine (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE.json", help="the device file")
    parser.add_argument("--name", default="cpu", help="the device's name in it (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement (default: %(default)s)")
    parser.add_argument("--memory-gb", type=float, help="of one rank (default: this machine's, shared by the ranks)")


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    import json
    import os
    from dataclasses import asdict
    from pathlib import Path

    from fms_parallel.errors import ConfigError
    from fms_parallel.planner import measure

    if args.ranks < 1 or args.repeats < 1:
        raise ConfigError("--ranks and --repeats: need whole numbers >= 1.")
    if args.memory_gb is not None and not 0 < args.memory_gb < float("inf"):
        raise ConfigError(f"--memory-gb {args.memory_gb}: needs a number > 0.")
    if args.ranks == 1:
        seconds = [measure.measure_rank(args.repeats)]
    else:
        from fms_parallel.distributed.launch import run_ranks

        seconds = run_ranks(measure.measure_rank, args.ranks, args.repeats)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = os.cpu_count()
    device = measure.device_of(args.name, seconds, args.memory_gb or whole / args.ranks, cores)
    table = {key: value for key, value in asdict(device).items() if key != "name"}
    Path(args.out).write_text(json.dumps({args.name: table}, indent=2) + "\n", encoding="utf-8")
    rate, link = device.peak("fp32") / 1e9, device.intra
    common.say(f"{args.name}: {rate:.1f} GFLOP/s and {device.memory_gb_s:.1f} GB/s per rank of {args.ranks}")
    if args.ranks > 1:
        common.say(f"collectives: {link.latency_us:.0f} us per hop, {link.gb_s:.2f} GB/s")
    common.say(f"one block: {measure.predicted_block(device) * 1e3:.2f} ms predicted, "
               f"{max(r['block'] for r in seconds) * 1e3:.2f} ms measured")  # fmt: skip
    common.say(f"written to {args.out}; use it with --devices {args.out} --gpus {args.name}:{args.ranks}")
    return 0
