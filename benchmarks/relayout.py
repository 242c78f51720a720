"""Changing the layout of a running job, against saving a checkpoint in memory and loading it in the new layout.

    python benchmarks/relayout.py                          59 M parameters, AdamW, fp32, 4 ranks, three times round
    python benchmarks/relayout.py --width 256 --repeats 1
    python benchmarks/relayout.py --no_shared_memory       pieces go over gloo, as between hosts

For each change: bytes between ranks and the least there could be; seconds of the live change without building the model
(which both ways need), with it, and of torch.distributed.checkpoint's save + load through --folder (/dev/shm: no disk).
Both are measured one after the other on the same state, and must give bitwise the same.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from fms_parallel.checkpoint.named import named_state, named_weights
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.dynamic.relayout import Relayout
from fms_parallel.dynamic.state import TrainingState
from fms_parallel.models import get_model
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions

CHAIN = (
    "fsdp=2,tp=2",
    "pp=2,tp=2",
    "tp=4",
    "pp=2,fsdp=2",
    "pp=4,stage_split=4,4,5,3",
    "dp=2,fsdp=2",
    "fsdp=4",
)
START = CHAIN[-1]


def tensors_of(state: TrainingState) -> dict[str, Tensor]:
    assert state.optimizer is not None
    return {**named_weights(state.model), **named_state(state.model, state.optimizer)[0]}


def run(sizes: dict[str, Any], folder: str, repeats: int, more: dict[str, Any]) -> list[dict[str, Any]]:
    """One rank of the whole benchmark."""
    warnings.filterwarnings("ignore")
    options = TrainOptions(lr=1e-3)

    def build(layout: Any, **how: Any) -> nn.Module:
        return get_model("llama", "micro", distributed_strategy=layout, **sizes, **how)

    model = build(START)
    state = TrainingState(model, make_optimizer(model, options))
    ids = torch.randint(0, sizes["vocab_size"], (4, 32), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).backward()
    state.optimizer.step()  # type: ignore[union-attr]
    model.zero_grad()
    relayout = Relayout(build, lambda model: make_optimizer(model, options), **more)
    found = []
    for _ in range(repeats):
        for layout in CHAIN:
            before = str(state.layout)
            place = Path(folder) / "change"
            dist.barrier()
            start = time.perf_counter()
            dcp.save(tensors_of(state), storage_writer=dcp.FileSystemWriter(place))  # type: ignore[arg-type]
            dist.barrier()
            saved = time.perf_counter() - start
            state = relayout(state, layout)
            report = relayout.last
            assert report is not None
            live = {key: local_tensor(tensor).clone() for key, tensor in tensors_of(state).items()}
            target = tensors_of(state)
            for tensor in target.values():
                local_tensor(tensor).zero_()
            dist.barrier()
            start = time.perf_counter()
            dcp.load(target, storage_reader=dcp.FileSystemReader(place))  # type: ignore[arg-type]
            dist.barrier()
            loaded = time.perf_counter() - start
            equal = all(torch.equal(live[key], local_tensor(tensor)) for key, tensor in target.items())
            if dist.get_rank() == 0:
                shutil.rmtree(place)
            seconds = report.seconds
            found.append(
                {
                    "change": f"{before} -> {layout}",
                    "moved": report.moved,
                    "bound": report.lower_bound,
                    "build": seconds["build"],
                    "all": seconds["all"],
                    "save": saved,
                    "load": loaded,
                    "equal": equal,
                }
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--round_mb", type=int, default=64, help="memory of a round (default: %(default)s)")
    parser.add_argument("--no_verify", action="store_true", help="what fingerprints cost: without them")
    parser.add_argument("--no_shared_memory", action="store_true", help="what ranks of other hosts have: gloo alone")
    parser.add_argument(
        "--folder", default="/dev/shm/fms_parallel_relayout", help="for the checkpoints of the comparison"
    )
    args = parser.parse_args()
    shape = {"heads": 8, "kv_heads": 8, "ffn_width": args.width * 8 // 3, "vocab_size": 8192, "max_positions": 64}
    sizes: dict[str, Any] = {"width": args.width, "layers": args.layers, **shape}
    more: dict[str, Any] = {"round_bytes": args.round_mb << 20, "verify": not args.no_verify}
    more["shared_memory"] = False if args.no_shared_memory else None
    ranks = run_ranks(run, 4, sizes, args.folder, args.repeats, more, timeout=1800)
    assert all(one["equal"] for rank in ranks for one in rank), "the two ways differ"
    with torch.device("meta"):
        count = sum(p.numel() for p in get_model("llama", "micro", fill=lambda model: None, **sizes).parameters())
    print(f"{count / 1e6:.1f} M parameters, {3 * count * 4 / 1e6:.0f} MB of fp32 state, 4 ranks, {args.repeats} times")
    print(f"{'change':52} {'MB moved':>9} {'= least':>8} {'live s':>7} {'+ build':>8} {'DCP s':>6} {'ratio':>6}")
    ratios = []
    for index in range(len(CHAIN)):
        rounds = [[rank[index + len(CHAIN) * n] for rank in ranks] for n in range(args.repeats)]
        worst = [{key: max(rank[key] for rank in one) for key in ("build", "all", "save", "load")} for one in rounds]
        move = statistics.median(one["all"] - one["build"] for one in worst)
        whole = statistics.median(one["all"] for one in worst)
        disk = statistics.median(one["save"] + one["load"] for one in worst)
        first = rounds[0][0]
        ratios.append(disk / move)
        exact = "yes" if first["moved"] == first["bound"] else "NO"
        print(
            f"{first['change']:52} {first['moved'] / 1e6:9.2f} {exact:>8} {move:7.2f} {whole:8.2f} {disk:6.2f} "
            f"{ratios[-1]:6.1f}"
        )
    print(f"median ratio {statistics.median(ratios):.1f}, least {min(ratios):.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
