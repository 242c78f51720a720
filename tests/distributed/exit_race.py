"""Starts and ends a job of two ranks many times over, each rank with a whole interpreter's exit. Run by test_exit.py.

    python exit_race.py ROUNDS

Ranks are forked from this process, which has torch loaded and has never used it (no thread to lose in the fork). A
rank ends as a script does: `sys.exit`, exit handlers, static destructors. Other test ranks skip those.
Prints one line for each rank that did not exit with 0, and exits with their number.
"""

from __future__ import annotations

import os
import socket
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fms_parallel.distributed.collectives import all_reduce
from fms_parallel.distributed.mesh import build_mesh, shard_mesh, tp_axis
from fms_parallel.distributed.start import process_group
from fms_parallel.layout import ParallelLayout

WORLD_SIZE = 2
PATIENCE = 60.0
"""Seconds until a rank that does not end is killed."""

LAYOUTS = ("tp=2", "fsdp=2")


def main(rounds: int) -> int:
    failures = 0
    for index in range(rounds):
        layout = LAYOUTS[index % len(LAYOUTS)]
        port = free_port()
        ranks = [start(rank, port, layout) for rank in range(WORLD_SIZE)]
        if ranks == [None] * WORLD_SIZE:
            continue
    return failures
