"""Measuring the machine at hand: matrix products, memory, small kernels, collectives, one transformer block.

It runs on gloo ranks or on one process, all at once, so that what they share (cores, memory) is shared while it is
measured. torch is imported inside the functions; everything else of the planner works without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fms_parallel.planner.columns import Columns
from fms_parallel.planner.cost import CostModel
from fms_parallel.planner.efficiency import DEFAULT, Constants
from fms_parallel.planner.hardware import Device, Link
from fms_parallel.planner.operators import Workload
from fms_parallel.planner.software import load_software
from fms_parallel.shape import ModelShape

MATMULS = ((64, 192, 192), (256, 192, 512), (256, 512, 512), (512, 512, 512), (512, 1024, 1024), (1024, 1024, 1024))
COLLECTIVES = (1 << 12, 1 << 16, 1 << 20, 1 << 22)
"""Bytes of the whole tensor."""
STREAM = 1 << 24
BLOCK = ModelShape(layers=1, width=256, heads=4, kv_heads=4, head_width=64, ffn_width=704, vocab=256, max_positions=256)
BLOCK_TOKENS = (4, 128)
"""Sequences and tokens of the block's step."""


def measure_rank(repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Seconds of everything on this rank, while the other ranks do the same, by `clock`.

    The lower quartile of `repeats`: what else runs on the machine only ever makes a measurement longer.
    """
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def timed(work: Callable[[], Any]) -> float:
        work()
        found = []
        for _ in range(repeats):
            if ranks > 1:
                dist.barrier()
            began = clock()
            work()
            found.append(clock() - began)
        return float(np.quantile(found, 0.25))

    a, small = torch.empty(STREAM // 4), torch.zeros(16)
    products = [(torch.randn(m, k), torch.randn(k, n)) for m, n, k in MATMULS]
    seconds: dict[str, Any] = {
        "matmuls": [timed(lambda x=x, y=y: x @ y) for x, y in products],  # type: ignore[misc]
        "stream": timed(lambda: a.add_(1.0)),
        "small": timed(lambda: [small.add_(1.0) for _ in range(200)]) / 200,
        "block": timed(_block_step(torch)),
        "allgather": {},
        "allreduce": {},
    }
    for size in COLLECTIVES if ranks > 1 else ():
        part = torch.zeros(max(size // 4 // ranks, 1))
        whole = [torch.zeros_like(part) for _ in range(ranks)]
        full = torch.zeros(size // 4)
        seconds["allgather"][size] = timed(lambda w=whole, p=part: dist.all_gather(w, p))  # type: ignore[misc]
        seconds["allreduce"][size] = timed(lambda x=full: dist.all_reduce(x))  # type: ignore[misc]
    return seconds


def _block_step(torch: Any) -> Callable[[], None]:
    """Forward and backward of one transformer block in plain torch."""
    s, (batch, tokens) = BLOCK, BLOCK_TOKENS
    weights = [
        torch.randn(*shape, requires_grad=True)
        for shape in ((3 * s.width, s.width), (s.width, s.width), (2 * s.ffn_width, s.width), (s.width, s.ffn_width))
    ]
    functional = torch.nn.functional

    def step() -> None:
        x = torch.randn(batch, tokens, s.width, requires_grad=True)
        q, k, v = functional.linear(functional.rms_norm(x, (s.width,)), weights[0]).chunk(3, -1)
        heads = (y.view(batch, tokens, s.heads, s.head_width).transpose(1, 2) for y in (q, k, v))
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        y = x + functional.linear(mixed, weights[1])
        gate, up = functional.linear(functional.rms_norm(y, (s.width,)), weights[2]).chunk(2, -1)
        (y + functional.linear(functional.silu(gate) * up, weights[3])).sum().backward()

    return step


def device_of(name: str, seconds: list[dict[str, Any]], memory_gb: float, cores: int | None = None) -> Device:
    """A device whose constants explain what the ranks measured; the slowest rank counts.

    Args:
        cores: that the ranks share; None when each has its own. With half a core each, a rank that waits in a pipeline
            loses nothing: the others run faster.
    """
    slowest = {key: np.max([rank[key] for rank in seconds], axis=0) for key in ("matmuls", "stream", "small", "block")}
    ranks = len(seconds)
    peak, best, half = _fit_matmuls(np.asarray(slowest["matmuls"]))
    link = _fit_link(seconds, ranks) if ranks > 1 else Link(1.0, 1.0, 1.0, (1.0,))
    bandwidth = 2 * STREAM / float(slowest["stream"]) / 1e9
    host = float(slowest["small"]) * 1e6
    constants = {
        "best": best,
        "half": half,
        "wave": 0.0,
        "stream": 1.0,
        "attention": best / 2,
        "kernel_us": host,
        "host_us": host,
    }
    # Its processors move the bytes of collectives, too: nothing hides behind computation.
    constants |= {"host_backward": 1.0, "step_us": 1000.0, "overlap": 0.0}
    if cores is not None:
        constants["idle"] = min(max(2.0 - ranks / cores, 0.0), 1.0)
    device = Device(
        name=name,
        memory_gb=memory_gb,
        tflops={"fp32": peak, "bf16": peak},
        vector_tflops=peak / 8,
        memory_gb_s=bandwidth,
        intra=link,
        inter=link,
        per_node=ranks,
        constants=constants,
    )
    return _with_block(device, float(slowest["block"]))


def _fit_matmuls(seconds: Any) -> tuple[float, float, float]:
    """TFLOP/s, the part of it that is reached at best, and the size at which half of that is."""
    sizes = np.array(MATMULS, dtype=float)
    rates = 2 * sizes.prod(axis=1) / seconds
    halves = np.geomspace(0.5, 256, 60)
    shares = sizes[None, :, 2] / (sizes[None, :, 2] + halves[:, None])
    scales = np.exp(np.mean(np.log(rates[None] / shares), axis=1))
    errors = np.std(np.log(rates[None] / shares), axis=1)
    pick = int(np.argmin(errors))
    peak = float(max(scales[pick], rates.max()) * 1.05)
    return peak / 1e12, float(scales[pick] / peak), float(halves[pick])


def _fit_link(seconds: list[dict[str, Any]], ranks: int) -> Link:
    """Latency of a ring's hop and bandwidth from all-gathers, latency of a tree from small all-reduces."""
    sizes = np.array(COLLECTIVES, dtype=float)
    gather = np.max([[rank["allgather"][size] for size in COLLECTIVES] for rank in seconds], axis=0)
    reduce = np.max([[rank["allreduce"][size] for size in COLLECTIVES] for rank in seconds], axis=0)
    moved = sizes * (ranks - 1) / ranks
    # Relative least squares of latency * hops + moved / bandwidth, for all-gather and half an all-reduce.
    rows = np.stack([np.full_like(sizes, ranks - 1.0), moved], axis=1)
    rows = np.concatenate([rows / gather[:, None], rows / (reduce / 2)[:, None]])
    hop, slope = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    hop = hop if hop > 0 else float(gather[0]) / (ranks - 1)
    slope = slope if slope > 0 else float(gather[-1] / moved[-1])
    return Link(
        gb_s=1 / slope / 1e9, latency_us=hop * 1e6, tree_us=float(reduce[0]) / 2 / (ranks - 1) * 1e6, efficiency=(1.0,)
    )


def _with_block(device: Device, measured: float) -> Device:
    """Slow arithmetic and memory down alike until the block takes as long as it did: its kernels are its own."""
    constants = dict(device.constants)
    for _ in range(20):
        ratio = predicted_block(replace(device, constants=constants)) / measured
        if 0.99 < ratio < 1.01:
            break
        for name in ("best", "attention", "stream"):
            constants[name] = min(constants[name] * ratio, device.constants[name])
    return replace(device, constants=constants)


def predicted_block(device: Device) -> float:
    """Seconds of the block's forward and backward pass as the cost model has it."""
    batch, tokens = BLOCK_TOKENS
    constants: Constants = DEFAULT.having(device.constants)
    software = load_software("native").with_precision("fp32")
    model = CostModel(BLOCK, device, Workload(batch, tokens, "fp32"), software, constants)
    found = model.time_source.total(model.block_operators(Columns.of([{"micro": batch}])))
    return float(np.max(found.forward + found.backward))
