"""Measuring the machine at hand: matrix products, memory, collectives, a transformer block, an optimizer's step.

It runs on gloo ranks or on one process. What ranks share (cores, caches, memory) must be shared during the whole of a
measurement: each is a window in which every rank repeats the same work until all are done. A single short piece of work
would often find the other ranks asleep. torch is imported inside the functions; all else of the planner needs none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np

from fms_parallel.planner.columns import Columns
from fms_parallel.planner.cost import CostModel
from fms_parallel.planner.efficiency import DEFAULT
from fms_parallel.planner.hardware import Device, Link, load_devices
from fms_parallel.planner.operators import Op, Workload
from fms_parallel.planner.software import load_software
from fms_parallel.shape import ModelShape

MATMULS = ((64, 192, 192), (256, 192, 512), (256, 512, 512), (512, 512, 512), (512, 1024, 1024), (1024, 1024, 1024))
BETWEEN = ("allgather", "reducescatter", "allreduce", "pair")
COLLECTIVES = (1 << 12, 1 << 18, 1 << 22)
"""Bytes of the whole tensor."""
TURNS = 8
"""Tensors that a collective's measurement takes in turn."""
BETWEEN_COLLECTIVES = 512
"""Edge of a square matrix product: what ranks do between two collectives while these are measured."""
STREAM = 1 << 24
UPDATED = 1 << 22
"""Parameters of the optimizer's step: more than caches hold."""
WINDOW = 0.04
"""Seconds of one measurement: many time slices of a processor's scheduler."""
BLOCK = ModelShape(layers=1, width=256, heads=4, kv_heads=4, head_width=64, ffn_width=704, vocab=256, max_positions=256)
BLOCK_TOKENS = (4, 128)
"""Sequences and tokens of the block's step."""
TINY = replace(BLOCK, width=16, heads=2, kv_heads=2, head_width=8, ffn_width=32)
"""A block that computes next to nothing: what it takes is the host's time."""


def measure_rank(repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Seconds of everything on this rank, while the other ranks do the same, by `clock`.

    The lower quartile of `repeats` windows: what else runs on the machine only ever makes a measurement longer.
    """
    import torch

    timed = Windows(repeats, clock)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    a, small = torch.empty(STREAM // 4), torch.zeros(16)
    products = [(torch.randn(m, k), torch.randn(k, n)) for m, n, k in MATMULS]
    seconds: dict[str, Any] = {
        "matmuls": [timed(lambda x=x, y=y: x @ y) for x, y in products],  # type: ignore[misc]
        "stream": timed(lambda: a.add_(1.0)),
        "small": timed(lambda: small.add_(1.0)),
        "host": timed(_block_step(torch, TINY, (1, 4))),
        "block": timed(_block_step(torch, BLOCK, BLOCK_TOKENS)),
        "passes": timed(_passes_step(torch)),
        "update": timed(_update(torch)),
        "copy": timed(lambda: torch.cat([a, a])),
    }
    return seconds | _collectives(torch, timed)


@dataclass(frozen=True)
class Windows:
    """Times work that all ranks repeat together."""

    repeats: int
    clock: Callable[[], float]

    @property
    def ranks(self) -> int:
        """Ranks that measure together."""
        import torch.distributed as dist

        return dist.get_world_size() if dist.is_initialized() else 1

    def __call__(self, work: Callable[[], Any]) -> float:
        """Seconds of one `work`, by all ranks at once."""
        import torch
        import torch.distributed as dist

        def together() -> None:
            if self.ranks > 1:
                dist.barrier()

        work()
        tried = []
        for _ in range(3):
            together()
            began = time.perf_counter()
            work()
            tried.append(time.perf_counter() - began)
        times = torch.tensor([max(int(WINDOW / min(tried)), 1)])
        if self.ranks > 1:
            dist.all_reduce(times, op=dist.ReduceOp.MIN)
        found = []
        for _ in range(self.repeats):
            together()
            start = self.clock()
            for _ in range(int(times)):
                work()
            together()  # nobody stops before all are done: the cores are full to the end
            found.append((self.clock() - start) / int(times))
        return float(np.quantile(found, 0.25))


def _collectives(torch: Any, timed: Windows) -> dict[str, dict[int, float]]:
    """Seconds by size, as this library does them over gloo; `pair`: two ranks hand each other so many bytes.

    Each among work of all ranks, as in a step: ranks that share cores do not come to it at once, and what they compute
    has passed through the caches since the last one. Never less than what it takes alone.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in BETWEEN}
    if timed.ranks == 1:
        return found
    a = torch.randn(BETWEEN_COLLECTIVES, BETWEEN_COLLECTIVES)
    between = timed(lambda: a @ a)
    for size in COLLECTIVES:
        for name, collective in _each_collective(torch, size, timed.ranks).items():
            alone, among = timed(collective), timed(lambda c=collective: (a @ a, c()))  # type: ignore[misc]
            found[name][size] = max(alone, among - between)
    return found


def _each_collective(torch: Any, size: int, ranks: int) -> dict[str, Callable[[], Any]]:
    """Every kind of collective over `size` bytes, of other tensors each time."""
    import torch.distributed as dist

    from fms_parallel.distributed.collectives import Axis, all_gather, reduce_scatter, summed

    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    axis = Axis(group, ranks, rank, dist.get_backend())
    wholes = cycle([torch.zeros(size // 4 // ranks * ranks) for _ in range(TURNS)])

    def exchange() -> None:
        sent = next(wholes)
        for work in (dist.isend(sent, rank ^ 1), dist.irecv(torch.empty_like(sent), rank ^ 1)):
            if work is not None:
                work.wait()

    pair = {"pair": exchange} if ranks % 2 == 0 else {}
    return {
        "allgather": lambda: all_gather(next(wholes).chunk(ranks)[0], axis),
        "reducescatter": lambda: reduce_scatter(next(wholes), axis),
        "allreduce": lambda: summed(next(wholes), axis),
        **pair,
    }


def _passes_step(torch: Any) -> Callable[[], None]:
    """Forward and backward of what a block does between its products: norms, residual sums, gated activation."""
    s, tokens, functional = BLOCK, BLOCK_TOKENS[0] * BLOCK_TOKENS[1], torch.nn.functional
    x, y = (torch.randn(tokens, s.width, requires_grad=True) for _ in range(2))
    gate, up = (torch.randn(tokens, s.ffn_width, requires_grad=True) for _ in range(2))
    ones = torch.ones(tokens, s.width), torch.ones(tokens, s.ffn_width)

    def step() -> None:
        again = x + functional.rms_norm(y, (s.width,))
        again = again + functional.rms_norm(again, (s.width,))
        torch.autograd.backward([again, functional.silu(gate) * up], list(ones))

    return step


def _update(torch: Any) -> Callable[[], None]:
    """What a step does besides forward and backward: new gradients, their norm, clipping, AdamW."""
    parameters = [torch.zeros(UPDATED // 8, requires_grad=True) for _ in range(8)]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        for p in parameters:
            p.grad = torch.zeros_like(p)
        norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
        torch._foreach_mul_([p.grad for p in parameters], float(1 / (norm + 1)))
        optimizer.step()

    return step


def _block_step(torch: Any, shape: ModelShape, size: tuple[int, int]) -> Callable[[], None]:
    """Forward and backward of one transformer block in plain torch."""
    s, (batch, tokens) = shape, size
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
    slowest = {key: np.max([rank[key] for rank in seconds], axis=0) for key in seconds[0] if key not in BETWEEN}
    ranks = len(seconds)
    peak, best, half = _fit_matmuls(np.asarray(slowest["matmuls"]))
    link = _fit_link(seconds, ranks) if ranks > 1 else Link(1.0, 1.0, 1.0, (1.0,))
    constants = {"best": best, "half": half, "wave": 0.0, "stream": 1.0, "attention": best / 2}
    # A processor does itself what a GPU leaves to its host: nothing hides behind kernels, and it moves the bytes of
    # collectives, too.
    launches = sum(sum(op.kernels) for op in _operators_of_block())
    constants |= {"kernel_us": 0.0, "host_us": float(slowest["host"]) / launches * 1e6, "host_backward": 1.0}
    constants |= {"hidden": 0.0, "step_us": 1000.0, "overlap": 0.0}
    constants["stream"] = _share_of_bandwidth(slowest, constants["host_us"])
    constants["copy_ns"] = float(slowest["copy"]) / (2 * STREAM) * 1e9
    if cores is not None:
        constants["idle"] = min(max(2.0 - ranks / cores, 0.0), 1.0)
    device = Device(
        name=name,
        memory_gb=memory_gb,
        tflops={"fp32": peak, "bf16": peak},
        vector_tflops=peak / 8,
        memory_gb_s=2 * STREAM / float(slowest["stream"]) / 1e9,
        intra=link,
        inter=link,
        per_node=ranks,
        constants=constants,
    )
    return _with_update(_with_block(device, float(slowest["block"])), float(slowest["update"]))


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
    """Latency of a ring's hop and bandwidth from all collectives, latency of a tree from small all-reduces."""
    sizes = np.array(COLLECTIVES, dtype=float)
    ring = (ranks - 1.0, (ranks - 1) / ranks)
    # Hops, and what of the whole tensor one member sends.
    ways = {"allgather": ring, "reducescatter": ring, "allreduce": (2 * ring[0], 2 * ring[1]), "pair": (1.0, 1.0)}
    found = {n: np.max([[rank[n][s] for s in COLLECTIVES] for rank in seconds], axis=0) for n in ways if seconds[0][n]}
    # Relative least squares of latency * hops + moved / bandwidth.
    rows = [
        np.stack([np.full_like(sizes, ways[n][0]), ways[n][1] * sizes], axis=1) / t[:, None] for n, t in found.items()
    ]
    whole = np.concatenate(rows)
    hop, slope = np.linalg.lstsq(whole, np.ones(len(whole)), rcond=None)[0]
    gather, reduce = found["allgather"], float(found["allreduce"][0])
    hop = hop if hop > 0 else float(gather[0]) / ring[0]
    slope = slope if slope > 0 else float(gather[-1] / (ring[1] * sizes[-1]))
    wire = {"gb_s": float(1 / slope / 1e9), "latency_us": float(hop * 1e6), "tree_us": reduce / 2 / ring[0] * 1e6}
    return Link(**wire, efficiency=(1.0,))


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


def _share_of_bandwidth(slowest: Mapping[str, Any], host_us: float) -> float:
    """Part of the bandwidth of one long pass that a block's own passes reach."""
    ops = [op for op in _operators_of_block() if op.name in ("norms", "residuals", "activation")]
    size = sum(float(np.max(op.bytes)) * (1 + op.backward[1]) for op in ops)
    own = float(slowest["passes"]) - sum(sum(op.kernels) for op in ops) * host_us * 1e-6
    best = size / (2 * STREAM / float(slowest["stream"]))
    return float(np.clip(best / max(own, float(slowest["passes"]) / 5), 0.02, 1.0))


def _with_update(device: Device, measured: float) -> Device:
    """What a step does besides forward and backward, as a multiple of reading and writing its bytes once."""
    software = load_software("native")
    size = 2 * (software.gradient_bytes + software.parameter_bytes + software.optimizer_bytes)
    once = UPDATED * size / (device.memory_gb_s * 1e9 * device.constants["stream"])
    return replace(device, constants={**device.constants, "update": measured / once})


def _operators_of_block() -> list[Op]:
    """The block's operators as plain torch runs them."""
    return _model_of_block(load_devices()["cpu"]).block_operators(Columns.of([{"micro": BLOCK_TOKENS[0]}]))


def _model_of_block(device: Device) -> CostModel:
    software = replace(load_software("native").with_precision("fp32"), host=1.0)
    work = Workload(*BLOCK_TOKENS, "fp32")
    return CostModel(BLOCK, device, work, software, DEFAULT.having(device.constants))


def predicted_block(device: Device) -> float:
    """Seconds of the block's forward and backward pass as the cost model has it."""
    found = _model_of_block(device).time_source.total(_operators_of_block())
    return float(np.max(found.forward + found.backward))
