"""A rank that becomes three times slower, and what the manager does about it.

    python benchmarks/straggler.py                      four stages, then a control run with noise alone; eight minutes
    python benchmarks/straggler.py --ranks 2 --work 6 --factor 4 --policy rules --layouts tp=2,sp pp=2,microbatches=8
                                            two ranks of tp, of which one gets slow: a pipeline is the way out

A block's work is a sleep, forward and backward, so that figures depend little on the cores of this machine: `--work` ms
for two rows on every rank and `--factor` times that on one rank from step 21 to 60. Told are the step in which it was
found, the changes of layout, step times before, while and after, and how far the losses are from those of a run in one
process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel.data import RandomRows
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.dynamic.history import draw_history, read_history
from fms_parallel.dynamic.manager import ParallelismManager, train_step
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.planner.hardware import Cluster, load_devices
from fms_parallel.strategy.base import repeated_blocks

SIZES: dict[str, Any] = {
    "width": 64,
    "heads": 4,
    "kv_heads": 4,
    "ffn_width": 128,
    "vocab_size": 97,
    "max_positions": 16,
}
BEGINS, ENDS, STEPS = 20, 60, 84


class Work:
    """How long a block works on this rank, now."""

    def __init__(
        self, seconds: float, noise: float, numbers: int | None = None, spend: Callable[[float], None] = time.sleep
    ) -> None:
        """Seconds for activations of so many numbers, None: for any; `spend` lets them pass."""
        self.seconds, self.noise, self.factor, self.numbers, self.spend = seconds, noise, 1.0, numbers, spend
        self.draws = Random(dist.get_rank() if dist.is_initialized() else 0)

    def do(self, x: Tensor) -> None:
        share = x.numel() / self.numbers if self.numbers else 1.0
        self.spend(share * self.seconds * self.factor * self.draws.lognormvariate(0.0, self.noise))


class Working(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, work: Work) -> Tensor:
        ctx.work = work
        work.do(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.work.do(gradients[0])
        return gradients[0], None


def working(model: nn.Module, work: Work) -> nn.Module:
    """The model, whose blocks take their time."""
    for _, block in repeated_blocks(model):
        forward = block.forward
        block.forward = lambda x, *rest, forward=forward, **named: forward(Working.apply(x, work), *rest, **named)  # type: ignore
    return model


def run(args: argparse.Namespace, folder: str, steps: int, slow: bool) -> tuple[list[float], list[float]]:
    """Losses and step seconds of one managed run."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    two_rows = 2 * SIZES["max_positions"] * SIZES["width"]
    work = Work(args.work / 1e3 if ranks > 1 else 0.0, args.noise, two_rows)

    def build(layout: ParallelLayout, **how: Any) -> nn.Module:
        model = get_model("llama", "micro", distributed_strategy=layout, layers=args.layers, **SIZES, **how)
        return working(model, work)

    manager = ParallelismManager(
        build,
        # AdamW divides by square roots of nearly nothing: with it rounding grows tenfold every ten steps in any layout.
        lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
        RandomRows(8, 97, 4096),
        batch_size=16,
        enable_dynamic_adaptation=ranks > 1,
        layouts=(args.layouts or [f"pp={ranks},microbatches=8"]) if ranks > 1 else None,
        precision="fp64",
        steps=steps,
        policy=args.policy,
        hardware=Cluster.parse(f"cpu:{ranks}", load_devices()),
        history=f"{folder}/history.jsonl" if ranks > 1 else None,
    )
    manager.initialize()
    losses, seconds = [], []
    for batch in manager.loader():
        inside = slow and BEGINS <= manager.state.step < ENDS
        work.factor = args.factor if inside and ranks > 1 and dist.get_rank() == args.slow_rank else 1.0
        began = time.perf_counter()
        metrics = train_step(manager.state, batch)
        seconds.append(time.perf_counter() - began)
        manager.step(metrics)
        losses.append(metrics["loss"])
    manager.cleanup()
    return losses, seconds


def tell(events: list[dict[str, Any]], seconds: list[float]) -> None:
    """What happened, in words and numbers."""
    changes = [event for event in events if event["kind"] == "switch"]
    for event in events:
        if event["kind"] in ("straggler", "refused"):
            print(f"  step {event['step']:>4}: {event['kind']}: {event['reason']}")
        if event["kind"] == "switch":
            print(
                f"  step {event['step']:>4}: {event['before']} -> {event['after']} in {event['seconds']['all']:.2f} s"
            )
    found = next(event["step"] for event in events if event["kind"] == "straggler")
    print(f"  found {found - BEGINS} steps after it began")
    split = next((event["step"] for event in changes if event["step"] > BEGINS), None)
    if split is None:
        print("  no change of layout")
        return
    before, hurt = median(seconds[4:BEGINS]), median(seconds[BEGINS + 1 : split])
    mended = median(seconds[split + 2 : ENDS])
    after = median(seconds[max(event["step"] for event in changes) + 2 :])
    parts = {"healthy": before, "slowed": hurt, "re-split": mended, "at the end": after}
    print("  step: " + ", ".join(f"{1e3 * value:.0f} ms {word}" for word, value in parts.items()))
    print(f"  speed-up of the slowed steps: {hurt / mended:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layouts", nargs="+", help="that there are to choose from (default: pp of all ranks)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--work", type=float, default=30.0, help="milliseconds of a block, each way (default: %(default)s)"
    )
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--slow_rank", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.1, help="of a block's work, relative (default: %(default)s)")
    parser.add_argument("--control", type=int, default=200, help="steps of the run with noise alone")
    parser.add_argument("--policy", default="thompson")
    parser.add_argument("--output", default="/tmp/fms_parallel_straggler")
    args = parser.parse_args()
    expected, _ = run(args, "", STEPS, False)
    losses, seconds = run_ranks(run, args.ranks, args, args.output, STEPS, True, timeout=900)[0]
    events = read_history(f"{args.output}/history.jsonl")
    words = f"rank {args.slow_rank} is {args.factor:g} times slower from step {BEGINS} to {ENDS}"
    print(f"{args.ranks} ranks, {args.layers} blocks, {words}:")
    tell(events, seconds)
    apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"  largest difference of a loss from one process: {apart:.1e}")
    print(f"  drawn: {draw_history(events, f'{args.output}/history.png')}")
    if args.control:
        args.work = min(args.work, 5.0)  # where nothing is to be found, other work of the machine may disturb
        run_ranks(run, args.ranks, args, f"{args.output}/control", args.control, False, timeout=1800)
        events = read_history(f"{args.output}/control/history.jsonl")
        count = sum(event["kind"] == "switch" for event in events)
        print(f"{args.control} steps with noise alone: {count} changes of layout")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
