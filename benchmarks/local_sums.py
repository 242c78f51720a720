"""What a sum between ranks of one host takes: over gloo, through sockets, through memory that they share.

    python benchmarks/local_sums.py                        two ranks; activations of 1 to 2048 tokens of a 110 M model
    python benchmarks/local_sums.py --ranks 4 --width 4096

The ways take turns, so whatever else the machine does disturbs all of them alike. Microseconds of wall time and of one
rank's CPU, gloo's threads included: medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from fms_parallel.distributed import direct
from fms_parallel.distributed.collectives import Axis
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.inference.local import _connected, _sharing

TOKENS = (1, 8, 32, 128, 512, 2048)


def run(width: int, rounds: int) -> dict[tuple[int, str], tuple[float, float]]:
    """(tokens, way) -> seconds of wall and CPU of one sum. One rank."""
    group: Any = dist.group.WORLD
    axis = Axis(group, dist.get_world_size(), dist.get_rank(), "gloo")
    sockets, memory = _connected(axis), _sharing(axis)
    assert sockets is not None and memory is not None
    ways = {"gloo": direct.all_reduce, "sockets": sockets.all_reduce, "shared_memory": memory.all_reduce}
    found = {}
    for tokens in TOKENS:
        x = torch.zeros(tokens, width)
        repeats = max(5, 200 // tokens)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    way(x, group)
                seconds = time.perf_counter() - wall, time.process_time() - cpu
                taken[name].append((seconds[0] / repeats, seconds[1] / repeats))
        for name, pairs in taken.items():
            wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
            found[tokens, name] = (wall, cpu)
    sockets.close()
    memory.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=768, help="numbers of a token (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="(default: %(default)s)")
    args = parser.parse_args()
    every = run_ranks(run, args.ranks, args.width, args.rounds, timeout=600)
    names = list(dict.fromkeys(name for _, name in every[0]))
    print(f"{args.ranks} ranks, microseconds of a sum: wall (CPU of a rank)")
    print(f"{'tokens':>6} {'KiB':>7}" + "".join(f"{name:>22}" for name in names))
    for tokens in TOKENS:
        line = f"{tokens:6} {tokens * args.width * 4 / 1024:7.0f}"
        for name in names:
            wall, cpu = (max(rank[tokens, name][clock] for rank in every) for clock in (0, 1))
            line += f"{1e6 * wall:12.0f} ({1e6 * cpu:6.0f}) "
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
