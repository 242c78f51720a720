"""Tables and bars as text, and the line that starts a run. It knows estimates; it computes none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

from fms_parallel.planner.api import Estimate, Result

BAR = 40


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Left-aligned last column, right-aligned numbers before it."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def bars(parts: Mapping[str, float], unit: str) -> str:
    """One bar per part that is there, scaled to the whole."""
    whole = sum(parts.values()) or 1.0
    lines = []
    for name, value in sorted(parts.items(), key=lambda item: -item[1]):
        if value > 0.0005 * whole:
            lines.append(
                f"  {name:12} {'#' * max(round(BAR * value / whole), 1):{BAR}} {value:9.3f} {unit} {value / whole:6.1%}"
            )
    return "\n".join(lines)


def ranked(result: Result) -> str:
    """The ranked table of a search."""
    header = ("", "step s", "tokens/s/GPU", "MFU", "GiB", "free", "$/1000 steps", "micro", "layout")
    rows = [
        (
            str(rank),
            f"{e.step_time_s:.3f}",
            f"{e.tokens_per_s_per_gpu:.0f}",
            f"{e.mfu:.1%}",
            f"{e.memory_gb:.1f}",
            f"{e.margin:.0%}",
            f"{e.dollars_per_hour * e.step_time_s / 3.6:.2f}",
            f"{e.micro_batch}x{e.micro_batches}",
            str(e.layout) or "one process",
        )
        for rank, e in enumerate(result.results, 1)
    ]
    return table(rows, header)


def rejected(result: Result) -> str:
    """Why layouts were rejected, most frequent reason first, each with one of them."""
    lines = [f"{result.considered} layouts looked at, {result.feasible} would run; rejected:"]
    for reason, count in sorted(result.rejected.items(), key=lambda item: -item[1]):
        lines.append(f"  {count:8}  {reason}   (e.g. {result.examples[reason]})")
    return "\n".join(lines)


def launch(result: Result, estimate: Estimate) -> str:
    """The command that runs an estimate with this repository's training script."""
    per_node = result.cluster.device.per_node
    nodes, local = (1, result.cluster.gpus)
    if result.cluster.gpus > per_node:
        local = gcd(result.cluster.gpus, per_node)
        nodes = result.cluster.gpus // local
    where = f"--nnodes={nodes} --nproc_per_node={local}"
    rendezvous = " --rdzv_backend=c10d --rdzv_endpoint=$HEAD_NODE:29500" if nodes > 1 else ""
    accumulation = f" --grad_accum_steps {estimate.micro_batches}" if estimate.layout.pp == 1 else ""
    architecture, _, variant = result.model.name.partition(":")
    model = f" --architecture {architecture} --variant {variant}" if variant else ""
    batch = f"--batch_size {result.workload.global_batch} --seq_len {result.workload.sequence}{accumulation}"
    layout = f'--distributed "{estimate.layout}"'
    compiled = " --compile" if estimate.layout.recompute_budget is not None else ""
    return f"torchrun {where}{rendezvous} scripts/train_causal.py{model} {layout} {batch}{compiled} --device_type cuda"
