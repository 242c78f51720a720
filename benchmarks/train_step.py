"""What a training step costs: this library beside transformers (and accelerate's FSDP2), the same model and numbers.

    make bench                                        the small model, one rank and two
    python benchmarks/train_step.py --size large      134 M parameters; minutes
    python benchmarks/train_step.py --json

Every contestant of a row lives in the same ranks and takes its steps in turn (A B C A B C ...), so whatever disturbs
the machine disturbs all of them; in a row of two ranks, a library's one-rank step is taken by rank 0 while rank 1
waits. A step is forward, backward, clipping and AdamW(fused). CPU seconds are summed over
ranks; they are the figure to compare, wall time depends on who else uses the cores. Memory is measured in runs of its
own.
Losses must agree, or the benchmark fails: nobody is faster by computing something else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.cli import run
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError

Step = Callable[[Tensor, Tensor], float]
"""(input_ids, labels shifted already) of this rank's rows -> mean loss over the global batch."""


@dataclass(frozen=True)
class Size:
    """A LLaMA and what it is fed."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    seq: int = 256
    batch: int = 8


SIZES = {
    "tiny": Size(1024, 128, 4, 4, 2, 352, 64, 8),
    "small": Size(8192, 384, 8, 6, 2, 1024),
    "large": Size(32000, 768, 12, 12, 12, 2048),
}

ROWS: dict[str, tuple[int, tuple[str, ...]]] = {  # row -> (ranks, contestants)
    "one rank": (1, ("ours", "transformers")),
    "fsdp": (2, ("ours", "ours fsdp=2", "transformers", "transformers fsdp", "accelerate fsdp2")),
    "tp": (2, ("ours", "ours tp=2", "ours tp=2,sp", "transformers", "transformers tp")),
    "dp": (2, ("ours", "ours dp=2", "transformers", "transformers ddp")),
    "pp": (2, ("ours", "ours pp=2,microbatches=4", "ours pp=2,schedule=gpipe,microbatches=4")),
    "cp": (2, ("ours", "ours cp=2", "ours cp=2,cp_method=allgather", "ours cp=2,cp_method=ulysses")),
}
ALONE = ("ours", "transformers")
"""Contestants that need one rank."""


# ---- contestants ------------------------------------------------------------------------------------------------


def make_step(name: str, size: Size, folder: str) -> Step:
    """The contestant `name`, with the weights that lie in `folder` as a Hugging Face model."""
    if name in ALONE and dist.is_initialized() and dist.get_rank():
        return lambda ids, labels: 0.0
    if name.startswith("ours"):
        return _ours(name.removeprefix("ours").strip(), size, folder)
    return _PEERS[name](folder)


def _ours(layout: str, size: Size, folder: str) -> Step:
    from fms_parallel.data.feed import Batch
    from fms_parallel.models import get_model
    from fms_parallel.training.optimizer import make_optimizer
    from fms_parallel.training.options import TrainOptions
    from fms_parallel.training.step import train_step

    fields: dict[str, Any] = {name: value for name, value in asdict(size).items() if name not in ("seq", "batch")}
    fields |= {"max_positions": size.seq, "norm_eps": 1e-5}
    model = get_model("llama", "micro", folder, "hf", distributed_strategy=layout or None, **fields)
    optimizer = make_optimizer(model, TrainOptions())
    return lambda ids, labels: train_step(model, optimizer, [Batch(ids, labels)], max_grad_norm=1.0).loss


def _transformers(folder: str, **options: Any) -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.train()


def _peer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks_differ: bool = False,
    clip: Callable[..., Any] = torch.nn.utils.clip_grad_norm_,
) -> Step:
    def step(ids: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        # shift_labels: labels that are shifted already, as every row here has them.
        loss = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach()
        if ranks_differ:
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        return float(mean)

    return step


def _adamw(model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)


def _alone(folder: str) -> Step:
    model = _transformers(folder)
    return _peer_step(model, _adamw(model))


def _fsdp(folder: str) -> Step:
    """torch's FSDP2 as its tutorial wraps a model: each block, then the root."""
    from torch.distributed.fsdp import fully_shard

    model = _transformers(folder)
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return _peer_step(model, _adamw(model), ranks_differ=True)


def _accelerate(folder: str) -> Step:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # It takes the plugin up on GPUs only; told by hand, its FSDP2 path runs on the CPU as well.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    plugin.set_auto_wrap_policy(model := _transformers(folder))
    model, optimizer = accelerator.prepare(model, _adamw(model))
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError("accelerate did not shard the model.")
    return _peer_step(model, optimizer, ranks_differ=True)


def _tensor_parallel(folder: str) -> Step:
    from transformers.distributed import DistributedConfig

    model = _transformers(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    # Some of its parameters are plain tensors, which neither fused AdamW nor torch's clipping takes beside DTensors.
    return _peer_step(model, _adamw(model, fused=False), clip=_clip_kinds_apart)


def _clip_kinds_apart(parameters: Iterable[nn.Parameter], limit: float) -> None:
    kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds[isinstance(parameter.grad, DTensor)].append(parameter)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds.values() if kind]  # type: ignore[misc]
    full = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(full))
    for kind in kinds.values():
        torch.nn.utils.clip_grads_with_norm_(kind, limit, total)


def _ddp(folder: str) -> Step:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_transformers(folder))
    return _peer_step(model, _adamw(model), ranks_differ=True)


_PEERS = {
    "transformers": _alone,
    "transformers fsdp": _fsdp,
    "accelerate fsdp2": _accelerate,
    "transformers tp": _tensor_parallel,
    "transformers ddp": _ddp,
}


# ---- one row ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one contestant on one rank, per step: CPU and wall seconds, losses in order, peak resident bytes."""

    cpu: list[float]
    wall: list[float]
    losses: list[float]
    peak: int


def measure(names: tuple[str, ...], size: Size, folder: str, steps: int) -> dict[str, Cost | str]:
    """On one rank: every contestant takes its steps in turn. A contestant that cannot run gives its reason instead."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    ready: dict[str, Step] = {}
    costs: dict[str, Cost | str] = {}
    for name in names:
        try:
            ready[name] = make_step(name, size, folder)
            costs[name] = Cost([], [], [], 0)
        except Exception as error:
            costs[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for number in range(steps + 1):
        for name, step in ready.items():
            shared = name in ALONE or any(axis in name for axis in ("tp", "pp", "cp"))
            ids, labels = rows_of(number, size, rank, world, shared)
            if dist.is_initialized():
                dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            loss = step(ids, labels)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            cost = costs[name]
            assert isinstance(cost, Cost)
            cost.losses.append(loss)
            if number:  # the first step allocates
                cost.cpu.append(cpu)
                cost.wall.append(wall)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {n: Cost(c.cpu, c.wall, c.losses, peak) if isinstance(c, Cost) else c for n, c in costs.items()}


def rows_of(step: int, size: Size, rank: int, world: int, shared: bool) -> tuple[Tensor, Tensor]:
    """Input ids and labels of this rank: all rows, or its share of them."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(size.vocab_size, (size.batch, size.seq + 1), generator=generator)
    mine = tokens if shared else tokens.chunk(world)[rank]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


def one_row(names: tuple[str, ...], ranks: int, size: Size, folder: str, steps: int) -> dict[str, list[Cost] | str]:
    """Every contestant's costs, per rank."""
    answers = run_ranks(measure, ranks, names, size, folder, steps, timeout=3600.0)
    row: dict[str, list[Cost] | str] = {}
    for name in names:
        costs = [answer[name] for answer in answers]
        failed = next((cost for cost in costs if isinstance(cost, str)), None)
        row[name] = failed if failed is not None else costs
    return row


# ---- the table --------------------------------------------------------------------------------------------------


def summary(costs: list[Cost]) -> dict[str, float]:
    """Of one contestant: CPU seconds per step summed over ranks (median), wall, first and last loss."""
    cpu = [sum(parts) for parts in zip(*(cost.cpu for cost in costs), strict=True)]
    wall = [max(parts) for parts in zip(*(cost.wall for cost in costs), strict=True)]
    median = statistics.median
    losses = costs[0].losses
    return {"cpu_s": median(cpu), "wall_s": median(wall), "first_loss": losses[0], "last_loss": losses[-1]}


def check_losses(found: dict[str, dict[str, float]]) -> None:
    """All contestants of a row saw the same rows and weights.

    Raises:
        ConfigError: their losses differ by more than 2e-4.
    """
    for key in ("first_loss", "last_loss"):
        values = [numbers[key] for numbers in found.values()]
        if max(values) - min(values) > 2e-4:
            raise ConfigError(f"contestants disagree on {key}: { {name: n[key] for name, n in found.items()} }")


@contextmanager
def weights_for(size: Size) -> Any:
    """A folder with the same drawn weights for everybody."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.ffn_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.seq,
        rms_norm_eps=1e-5,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        yield folder


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="(default: %(default)s)")
    parser.add_argument("--row", action="append", choices=tuple(ROWS), help="only these rows")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each contestant (default: %(default)s)")
    parser.add_argument("--no_memory", action="store_true", help="leave out the runs that measure memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    size, table = SIZES[args.size], {}
    with weights_for(size) as folder:
        for row in args.row or ROWS:
            table[row] = measure_row(row, size, folder, args.steps, memory=not args.no_memory)
            if not args.json:
                print_row(row, table[row])
    if args.json:
        print(json.dumps({"size": asdict(size), "steps": args.steps, "rows": table}))
    return 0


def measure_row(row: str, size: Size, folder: str, steps: int, memory: bool) -> dict[str, Any]:
    """Every contestant's figures, or why it did not run."""
    ranks, names = ROWS[row]
    costs = one_row(names, ranks, size, folder, steps)
    found = {name: summary(cost) for name, cost in costs.items() if not isinstance(cost, str)}
    check_losses(found)
    if memory:
        for name, numbers in found.items():
            if name in ALONE and ranks > 1:
                continue
            alone = one_row((name,), ranks, size, folder, 2)[name]
            assert not isinstance(alone, str)
            numbers["peak_MiB"] = max(cost.peak for cost in alone) / 2**20
    return {name: found.get(name, cost) for name, cost in costs.items()}


def print_row(row: str, numbers: dict[str, Any]) -> None:
    """A few lines, with the ratio to the first peer of the row and to the same library's one rank."""
    peers = [n for name, n in numbers.items() if not name.startswith("ours") and isinstance(n, dict)]
    parallel = [n for name, n in numbers.items() if n in peers and name not in ALONE]
    peer = next(iter(parallel or peers), None)
    print(f"{row:<42} CPU s    wall s   to peer   to own one rank")
    for name, found in numbers.items():
        if isinstance(found, str):
            print(f"  {name:<36} did not run: {found}")
            continue
        alone = numbers.get("ours" if name.startswith("ours") else "transformers")
        to_peer = f"{found['cpu_s'] / peer['cpu_s']:.2f} x" if peer else ""
        to_own = f"{found['cpu_s'] / alone['cpu_s']:.2f} x" if isinstance(alone, dict) else ""
        peak = f"{found['peak_MiB']:.0f} MiB/rank" if "peak_MiB" in found else ""
        times = f"{found['cpu_s']:9.3f} {found['wall_s']:9.3f}"
        print(f"  {name:<36}{times} {to_peer:>9} {to_own:>9}   {peak:>14}", flush=True)


if __name__ == "__main__":
    run(main)
