"""Whether the planner is right on this machine: predicted against measured steps of a small LLaMA over gloo ranks.

    python benchmarks/plan_truth.py                    13 layouts on 1, 2 and 4 ranks; two minutes on an idle machine
    python benchmarks/plan_truth.py --clock cpu        CPU seconds of all ranks together, for a machine with other work

For each number of ranks the machine is calibrated inside the very ranks that then take the steps, as their cores and
memory are shared. All layouts of one number of ranks take their steps in turn (A B C A B C ...), so whatever disturbs
the machine disturbs all of them; the lower quartile of each counts. Nothing is fitted to these steps. What other
processes took meanwhile is told: where it is more than a tenth of the machine, wall seconds are theirs as well.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fms_parallel.cli import run
from fms_parallel.data.feed import Batch
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_config, get_model
from fms_parallel.planner import Cluster, Model, Planner, Workload
from fms_parallel.planner.measure import device_of, measure_rank
from fms_parallel.planner.scoring import Score
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import train_step

SIZES: dict[str, Any] = {"width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_width": 704, "vocab_size": 2048}
SEQUENCE, BATCH = 128, 8
LAYOUTS = {
    1: ("",),
    2: ("dp=2", "fsdp=2", "tp=2", "tp=2,sp", "cp=2", "pp=2,microbatches=4"),
    4: ("dp=4", "fsdp=4", "tp=4", "dp=2,tp=2", "fsdp=2,tp=2,sp", "pp=2,dp=2,microbatches=4"),
}
MEMORY_GB = 8.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    """One layout: seconds of a step, predicted and measured; with the CPU's clock those of all ranks together."""

    layout: str
    ranks: int
    predicted_s: float
    measured_s: float


def measure(names: tuple[str, ...], steps: int, repeats: int, word: str) -> dict[str, Any]:
    """On one rank: the machine's constants, and the seconds of every step of every layout."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    clock, start = CLOCKS[word], time.perf_counter()
    cpu, busy = time.process_time(), busy_seconds()
    before = measure_rank(repeats, clock)
    ready = {name: _stepper(name, rank) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(steps + 2):
        for name, step in ready.items():
            if world > 1:
                dist.barrier()
            began = clock()
            step()
            if number > 1:  # the first ones allocate
                seconds[name].append(clock() - began)
    machine = _quicker(before, measure_rank(repeats, clock))
    own, spent = time.process_time() - cpu, busy_seconds() - busy
    return {"machine": machine, "seconds": seconds, "own": own, "busy": spent, "wall": time.perf_counter() - start}


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used since it started, on Linux; else not a number."""
    try:
        with open("/proc/stat") as file:
            words = [float(word) for word in file.readline().split()[1:]]
    except OSError:
        return float("nan")
    return (sum(words[:3]) + sum(words[5:8])) / os.sysconf("SC_CLK_TCK")


def _quicker(a: Any, b: Any) -> Any:
    """The shorter of two measurements of the same things: other work on the machine only ever makes them longer."""
    if isinstance(a, dict):
        return {key: _quicker(a[key], b[key]) for key in a}
    return [_quicker(x, y) for x, y in zip(a, b, strict=True)] if isinstance(a, list) else min(a, b)


def _stepper(name: str, rank: int) -> Any:
    layout = ParallelLayout.parse(name)
    model = get_model("llama", "micro", distributed_strategy=name or None, max_positions=SEQUENCE, **SIZES)
    optimizer = make_optimizer(model, TrainOptions())
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    shard = rank // (layout.cp * layout.tp) % layout.data_parallel
    mine = tokens.chunk(layout.data_parallel)[shard]
    batch = Batch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous())
    return lambda: train_step(model, optimizer, [batch], max_grad_norm=1.0)


def rows_of(ranks: int, steps: int, repeats: int, clock: str) -> tuple[list[Row], float]:
    """Predicted and measured for every layout of one number of ranks; and how many cores other processes took."""
    answers = run_ranks(measure, ranks, LAYOUTS[ranks], steps, repeats, clock, timeout=900.0)
    machines = [answer["machine"] for answer in answers]
    device = replace(device_of("cpu", machines, MEMORY_GB, os.cpu_count()), per_node=ranks)
    shape = get_config("llama", "micro", max_positions=SEQUENCE, **SIZES).shape()
    planner = Planner.of(Model.of("llama", shape), Cluster(((device, ranks),)), Workload(BATCH, SEQUENCE, "fp32"))
    rows = []
    for name in LAYOUTS[ranks]:
        every = np.array([answer["seconds"][name] for answer in answers])
        estimate = planner.estimate(ParallelLayout.parse(name))
        if clock == "wall":
            predicted, measured = estimate.step_time_s, every.max(axis=0)
        else:  # a rank that waits uses no CPU
            predicted, measured = (estimate.step_time_s - estimate.breakdown["bubble"]) * ranks, every.sum(axis=0)
        rows.append(Row(name or "one process", ranks, predicted, float(np.quantile(measured, 0.25))))
    others = (answers[0]["busy"] - sum(answer["own"] for answer in answers)) / answers[0]["wall"]
    return rows, max(others, 0.0)


def summary(rows: list[Row]) -> dict[str, float]:
    """Rank correlation, mean error, and how much slower the layout that looks best is than the best one."""
    predicted, measured = (np.array([getattr(row, name) for row in rows]) for name in ("predicted_s", "measured_s"))
    score = Score.of(predicted, measured)
    chosen = measured[int(np.argmin(predicted))] / measured.min() - 1
    return {"layouts": len(rows), "spearman": score.spearman or 0.0, "mape": score.mape, "chosen_is_slower_by": chosen}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each layout (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="of each calibration (default: %(default)s)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    answers = [rows_of(ranks, args.steps, args.repeats, args.clock) for ranks in LAYOUTS]
    rows = [row for part, _ in answers for row in part]
    found = {**summary(rows), "cores": os.cpu_count() or 1, "others": float(np.mean([others for _, others in answers]))}
    if args.json:
        print(json.dumps({**found, "rows": [vars(row) for row in rows]}))
        return 0
    for row in sorted(rows, key=lambda row: row.measured_s):
        print(f"{row.measured_s:9.3f} s measured {row.predicted_s:9.3f} s predicted   {row.ranks} ranks  {row.layout}")
    print(f"{found['layouts']} layouts: rank correlation {found['spearman']:.2f}, mean error {found['mape']:.0%}")
    print(f"the one that looks best is {found['chosen_is_slower_by']:.0%} slower than the best")
    print(f"meanwhile other processes took {found['others']:.2f} of {found['cores']} cores")
    return 0


if __name__ == "__main__":
    run(main)
