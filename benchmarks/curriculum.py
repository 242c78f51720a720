"""A run whose rows grow: every static layout against one that changes with the rows, step by step beside each other.

    python benchmarks/curriculum.py                      200 short and 40 long steps, three seeds; an hour on two cores
    python benchmarks/curriculum.py --short 40 --long 8 --seeds 1

All contenders run in the same processes and take their steps in turn, so what else the machine does hits them alike.
Told are total seconds (changes included), and the ratio of the changing run to the best and to the worst static one,
with a 95 % interval over pairs of steps (bootstrap).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.data import RandomRows
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.dynamic.hardware import HardwareProfiler
from fms_parallel.dynamic.manager import ParallelismManager, train_step
from fms_parallel.models import get_model
from fms_parallel.phases import Phase

DYNAMIC = "dynamic"


def run(args: argparse.Namespace, seed: int) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of every step of every contender, and what the changing one did."""
    sizes: dict[str, Any] = {"width": args.width, "layers": args.layers, "heads": 8, "kv_heads": 8}
    sizes |= {"ffn_width": args.width * 8 // 3, "vocab_size": 512, "max_positions": args.long_rows}
    steps = args.short + args.long

    def build(layout: Any, **how: Any) -> nn.Module:
        return get_model("llama", "micro", distributed_strategy=layout, seed=seed, **sizes, **how)

    hardware = HardwareProfiler(repeats=3).profile()
    contenders: dict[str, ParallelismManager] = {}
    for name in (*args.layouts.split("/"), DYNAMIC):
        contenders[name] = ParallelismManager(
            build,
            lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
            RandomRows(args.long_rows, 512, args.rows * steps, seed),
            batch_size=args.rows,
            enable_dynamic_adaptation=name == DYNAMIC,
            layout=None if name == DYNAMIC else name,
            layouts=args.layouts.split("/"),
            steps=steps,
            phases=[Phase(0, seq_len=args.short_rows), Phase(args.short, seq_len=args.long_rows)],
            hardware=hardware,
        )
        contenders[name].initialize()
    loaders = {name: manager.loader() for name, manager in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(steps):
        for name, manager in contenders.items():
            dist.barrier()
            began = time.perf_counter()
            manager.adaptation.monitor.restart()
            manager.step(train_step(manager.state, next(loaders[name])))
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
    events = [
        f"step {e.step}: {e.more['before']} -> {e.more['after']} ({e.reason})"
        for e in contenders[DYNAMIC].history.of("switch")
    ]
    return seconds, events


def ratio(one: list[float], other: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Ratio of two totals and its 95 % interval over pairs of steps."""
    pairs, generator = np.array([one, other]), np.random.default_rng(0)
    picks = generator.integers(0, pairs.shape[1], (draws, pairs.shape[1]))
    sums = pairs[:, picks].sum(2)
    low, high = np.quantile(sums[0] / sums[1], (0.025, 0.975))
    return float(pairs[0].sum() / pairs[1].sum()), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layouts", default="dp=2/tp=2", help="contenders, between slashes (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--short", type=int, default=200, help="steps of short rows")
    parser.add_argument("--long", type=int, default=40, help="steps of long rows")
    parser.add_argument("--short_rows", type=int, default=8, help="tokens")
    parser.add_argument("--long_rows", type=int, default=384, help="tokens")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for seed in range(args.seeds):
        seconds, events = run_ranks(run, args.ranks, args, seed, timeout=3600)[0]
        totals = {name: sum(found) for name, found in seconds.items()}
        print(f"seed {seed}: " + ", ".join(f"{name} {total:.1f} s" for name, total in totals.items()))
        print("".join(f"  {event}\n" for event in events) or "  no change of layout\n", end="")
        static = sorted((name for name in totals if name != DYNAMIC), key=totals.__getitem__)
        for word, name in (("best", static[0]), ("worst", static[-1])):
            middle, low, high = ratio(seconds[DYNAMIC], seconds[name])
            print(f"  dynamic over the {word} static layout ({name}): {middle:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
