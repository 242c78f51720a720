"""Tensor parallelism with and without sequence parallelism, or any layouts of its ranks: time and memory by length.

    python benchmarks/tp_vs_sp.py                                              2 blocks of width 1024 on two CPU ranks
    python benchmarks/tp_vs_sp.py --width 4096 --heads 32 --ffn_width 11008    2 blocks of the 7b shape
    python benchmarks/tp_vs_sp.py --plot tp_vs_sp.png --tensorboard runs/tp_vs_sp
    python benchmarks/tp_vs_sp.py --layouts tp,sp tp,sp,tp_parts=attention --width 256 --seq 2048 --steps 10

All layouts live in the same ranks and take turns; ratios are medians over turns, each to the first layout's step of
the same turn. A step is forward, backward and, of gradients that are partial sums, their sum. Activation bytes are what
autograd keeps between forward and backward, each storage counted once, parameters aside: the part of memory that sp can
make smaller. Losses must agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.cli import run
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError

LAYOUTS = ["tp", "tp,sp"]


@dataclass(frozen=True)
class Point:
    """One layout at one length, on the rank that needed most: seconds, times the first layout's, bytes, loss."""

    layout: str
    seq: int
    forward_s: float
    step_s: float
    ratio: float
    activation_bytes: int
    weight_bytes: int
    peak_bytes: int
    loss: float


def measure(layouts: list[str], sizes: dict[str, Any], seq: int, batch: int, steps: int) -> list[Point]:
    """On one rank: all layouts in turn; medians."""
    from fms_parallel.distributed.boxes import local_tensor
    from fms_parallel.models import get_model

    models = {layout: get_model("llama", "micro", distributed_strategy=layout, **sizes) for layout in layouts}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(sizes["vocab_size"], (batch, seq + 1), generator=generator)
    taken: dict[str, list[tuple[float, float, int, float]]] = {layout: [] for layout in layouts}
    for _ in range(steps + 1):
        for layout, model in models.items():
            taken[layout].append(one_step(model, tokens))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    points = []
    for layout, model in models.items():
        forward, whole, _, _ = (list(column) for column in zip(*taken[layout][1:], strict=True))
        turns = zip(taken[layout][1:], taken[layouts[0]][1:], strict=True)
        ratio = statistics.median(mine[1] / first[1] for mine, first in turns)
        weights = sum(local.numel() * local.element_size() for local in map(local_tensor, model.parameters()))
        _, _, kept, loss = taken[layout][-1]
        medians = statistics.median(forward), statistics.median(whole)
        points.append(Point(layout, seq, *medians, ratio, kept, weights, peak, loss))
    return points


def one_step(model: nn.Module, tokens: Tensor) -> tuple[float, float, int, float]:
    """(seconds of the forward, of the step, bytes kept between forward and backward, mean loss)."""
    from fms_parallel.training.gradients import complete_gradients

    held: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in map(_local, model.parameters())}

    def keep(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens[:, :-1], labels=tokens[:, 1:])
    middle = time.perf_counter()
    loss.backward()
    complete_gradients(model.parameters())
    end = time.perf_counter()
    return middle - start, end - start, sum(held.values()), float(loss.detach()) / tokens[:, 1:].numel()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def worst_rank(answers: list[list[Point]]) -> list[Point]:
    """Per layout, the largest figure of any rank.

    Raises:
        ConfigError: ranks or layouts disagree on the loss.
    """
    points = []
    for parts in zip(*answers, strict=True):
        largest = {name: max(asdict(part)[name] for part in parts) for name in asdict(parts[0])}
        points.append(Point(**largest))
    losses = [part.loss for answer in answers for part in answer]
    if max(losses) - min(losses) > 1e-4:
        raise ConfigError(f"the layouts do not compute the same loss: {losses}.")
    return points


def log(points: list[Point], folder: str | None, project: str | None) -> None:
    """TensorBoard scalars by length, and Weights & Biases when asked for."""
    scalars = ("forward_s", "step_s", "activation_bytes", "peak_bytes")
    if folder is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder) as writer:  # type: ignore[no-untyped-call]
            for point in points:
                for name in scalars:
                    writer.add_scalar(f"{name}/{point.layout}", asdict(point)[name], point.seq)  # type: ignore[no-untyped-call]
    if project is not None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("--wandb needs it installed: pip install wandb.") from None
        logged = wandb.init(project=project)
        for point in points:
            logged.log({f"{point.layout}/{name}": asdict(point)[name] for name in scalars} | {"seq": point.seq})
        logged.finish()


def plot(points: list[Point], picture: str) -> None:
    """Time and memory over length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layout in dict.fromkeys(point.layout for point in points):
        mine = [point for point in points if point.layout == layout]
        lengths = [point.seq for point in mine]
        left.plot(lengths, [point.step_s for point in mine], "o-", label=layout)
        right.plot(lengths, [point.activation_bytes / 2**20 for point in mine], "o-", label=layout)
    left.set_ylabel("a step, s")
    right.set_ylabel("activations per rank, MiB")
    for axes in (left, right):
        axes.set_xlabel("sequence length")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="tp (default: %(default)s)")
    for name, default in {"width": 1024, "heads": 16, "ffn_width": 2752, "layers": 2, "vocab_size": 8192}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument(
        "--layouts", nargs="+", default=LAYOUTS, help="of all ranks, each one word (default: %(default)s)"
    )
    parser.add_argument("--kv_heads", type=int, help="(default: as many as heads)")
    parser.add_argument("--seq", type=int, nargs="+", default=[256, 512, 1024], help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="rows (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default: %(default)s)")
    parser.add_argument("--plot", help="draw time and memory over length: a .png or .svg file")
    parser.add_argument("--tensorboard", help="folder for TensorBoard scalars")
    parser.add_argument("--wandb", help="Weights & Biases project")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    names = ("width", "heads", "ffn_width", "layers", "vocab_size")
    sizes = {name: getattr(args, name) for name in names} | {"max_positions": max(args.seq)}
    if args.kv_heads is not None:
        sizes["kv_heads"] = args.kv_heads
    points: list[Point] = []
    for seq in args.seq:
        points += worst_rank(
            run_ranks(measure, args.ranks, args.layouts, sizes, seq, args.batch, args.steps, timeout=3600.0)
        )
    if args.json:
        print(json.dumps([asdict(point) for point in points]))
    else:
        widest = max(map(len, args.layouts))
        print(f"  seq  {'layout':<{widest}}  forward s  step s  ratio  activations MiB  weights MiB  peak resident MiB")
        for p in points:
            memory = f"{p.activation_bytes / 2**20:15.1f} {p.weight_bytes / 2**20:12.1f} {p.peak_bytes / 2**20:18.0f}"
            print(f"{p.seq:5}  {p.layout:<{widest}} {p.forward_s:10.3f} {p.step_s:7.3f} {p.ratio:6.3f} {memory}")
    log(points, args.tensorboard, args.wandb)
    if args.plot is not None:
        plot(points, args.plot)
    return 0


if __name__ == "__main__":
    run(main)
