"""Starts and ends jobs of two ranks many times over, each rank with a whole interpreter's exit. Run by test_exit.py.

    python -m tests.distributed.exit_race ROUNDS

Ranks are forked from this process, which has torch loaded and has never used it (no thread to lose in the fork). A
rank ends as a script does: `sys.exit`, exit handlers, static destructors; ranks of `run_ranks` skip most of that.
Prints a line for each rank that did not end with exit code 0, and ends with 1 when there was one.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import sys
from collections.abc import Iterator

import torch
import torch._dynamo  # fully_shard loads it: once here instead of in every rank
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fms_parallel.distributed.collectives import all_reduce
from fms_parallel.distributed.mesh import build_mesh, shard_mesh, tp_axis
from fms_parallel.distributed.start import process_group
from fms_parallel.layout import ParallelLayout

LAYOUTS = ("tp=2", "fsdp=2")
"""Of the rounds, in turn."""

AT_ONCE = 3
"""Jobs side by side: on a busy machine one rank ends later than the other."""

PATIENCE = 60
"""Seconds until ranks that do not end are killed, by an alarm of their own."""


def main(rounds: int) -> int:
    """Exit code."""
    gc.freeze()  # a rank that ends need not look through what was loaded here: a quarter of the time
    ports, ranks, bad = free_ports(), dict[int, str](), 0
    for index in range(rounds):
        layout, port = LAYOUTS[index % len(LAYOUTS)], next(ports)
        ranks |= {start(rank, port, layout): f"round {index}, {layout}, rank {rank}" for rank in range(2)}
        bad += reap(ranks, until=2 * (AT_ONCE - 1))
    bad += reap(ranks, until=0)
    print(f"{rounds} rounds")
    return 1 if bad else 0


def reap(ranks: dict[int, str], until: int) -> int:
    """Wait until no more than so many ranks run; returns how many of the others did not end with 0."""
    bad = 0
    while len(ranks) > until:
        pid, status = os.wait()
        name, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            bad += 1
            print(f"{name}: exit code {code}", flush=True)
    return bad


def start(rank: int, port: int, layout: str) -> int:
    """The process id of a new rank; the rank itself never returns."""
    if pid := os.fork():
        return pid
    signal.alarm(PATIENCE)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(ParallelLayout.parse(layout))
    sys.exit(0)


def work(layout: ParallelLayout) -> None:
    """What every job does: a mesh, a collective, a model; all of them still in use when the group is left."""
    with process_group("cpu"):
        mesh = build_mesh(layout)
        if layout.tp > 1:
            total = all_reduce(torch.ones(3), tp_axis(mesh))
            assert total.eq(2).all()
        else:
            model = nn.Linear(4, 4)
            fully_shard(model, mesh=shard_mesh(mesh))
            model(torch.ones(2, 4)).sum().backward()
            # Nobody waits for these: a rank that leaves without its peer still has threads at work on them.
            for _ in range(8):
                dist.all_reduce(torch.ones(1 << 18), group=mesh["fsdp"].get_group(), async_op=True)


def free_ports() -> Iterator[int]:
    """Ports that nothing listens on, below those that systems give to outgoing connections."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                yield port


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
