"""What a new token costs on several ranks: requests under way at a time, in turn, and one rank alone beside them.

    torchrun --nproc_per_node=2 benchmarks/decode_ranks.py --layout pp=2       1 and 4 requests: tokens per second
    torchrun --nproc_per_node=2 benchmarks/decode_ranks.py --layout tp=2 --requests 1 --alone [--no-sockets]
    torchrun --nproc_per_node=2 benchmarks/decode_ranks.py --layout tp=2 --through sockets shared_memory gloo

Cases run in turn (A B A B ...) and ratios are medians over rounds, so whatever disturbs the machine disturbs all. A
case's clocks start with its first token, so prompts do not count. With `--alone` the first rank also holds the whole
model and runs it while the others sleep; with `--apart` all do at the same time, and share the memory's bandwidth as
ranks of tp do. CPU is that of a whole process, gloo's threads included: of the rank with most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from decode import DTYPES, SIZES, Size

from fms_parallel.cli import run
from fms_parallel.distributed.start import process_group
from fms_parallel.inference import Event, InferenceEngine
from fms_parallel.inference.local import connect
from fms_parallel.models import get_model

KNOWN = {**SIZES, "narrow": Size(64, 12, 4, 192)}
"""Name -> a model. In the narrow one matrices cost next to nothing: what is left is what everything else costs."""


WAYS: dict[str, bool | str] = {"sockets": True, "shared_memory": "shared_memory", "gloo": False}
"""How the ranks of tp sum -> `local_sockets` of an engine."""


def first(args: argparse.Namespace) -> str | None:
    """The way that ratios are of."""
    return args.through[0] if args.through else None


class Stopwatch:
    """Wall and CPU seconds from the first event to the last, and tokens in between."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None
        self.last, self.tokens = (0.0, 0.0), 0

    def __call__(self, event: Event) -> None:
        self.last = time.perf_counter(), time.process_time()
        if self.first is None:
            self.first = self.last
        else:
            self.tokens += len(event.tokens)

    @property
    def per_token(self) -> tuple[float, float]:
        """Wall and CPU seconds."""
        assert self.first is not None
        wall, cpu = (end - start for start, end in zip(self.first, self.last, strict=True))
        return wall / self.tokens, cpu / self.tokens


def one_round(engine: InferenceEngine, requests: int, args: argparse.Namespace) -> tuple[float, float]:
    """Wall and CPU seconds of a token."""
    prompts = [[1 + row, *range(2, args.prompt + 1)] for row in range(requests)]
    watch = Stopwatch()
    engine.generate(prompts, max_new_tokens=args.new_tokens, stream=watch)
    return watch.per_token


def of_all_ranks(pair: tuple[float, float]) -> tuple[float, float]:
    """The most of any rank."""
    numbers = torch.tensor(pair, dtype=torch.float64)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return float(numbers[0]), float(numbers[1])


def measure(args: argparse.Namespace, rank: int) -> dict[str, list[tuple[float, float]]]:
    """Case -> wall and CPU seconds per token of each round."""
    size = KNOWN[args.size]
    sizes = {name: getattr(size, name) for name in ("width", "layers", "heads", "kv_heads", "ffn_width", "vocab_size")}
    options: dict[str, Any] = {"max_batch_size": max(args.requests), "max_seq_len": 512, "share_prefixes": False}
    options["fast_weights"] = "compiled" if args.compiled else not args.stored
    stored = {"data_type": DTYPES[args.dtype][0], "linear_type": "int8" if args.dtype == "int8" else None}
    model = get_model("llama", "7b", distributed_strategy=args.layout, tied=True, **sizes, **stored)
    engine = InferenceEngine(model, local_sockets=False if args.no_sockets or args.through else None, **options)
    whole: Any = None
    if args.apart or (args.alone and rank == 0):
        whole = InferenceEngine(get_model("llama", "7b", tied=True, **sizes, **stored), **options)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.rounds + 1):  # the first warms up
        for requests, way in ((requests, way) for requests in args.requests for way in args.through or [None]):
            if way is not None:
                engine.ranks.use(connect(engine.model, WAYS[way]))
            pair = of_all_ranks(one_round(engine, requests, args))
            if engine.ranks.sockets is not None and way is not None:
                engine.ranks.sockets.close()
                engine.ranks.use(None)
            name = f"{args.layout}, {requests} requests" + ("" if way in (None, first(args)) else f", {way}")
            found.setdefault(name, []).append(pair)
            if way != first(args):
                continue
            if args.apart:
                pair = of_all_ranks(one_round(whole, requests, args))
                found.setdefault(f"each its own, {requests} requests", []).append(pair)
            if args.alone:
                own = one_round(whole, requests, args) if rank == 0 else (0.0, 0.0)
                found.setdefault(f"one rank, {requests} requests", []).append(of_all_ranks(own))
    if whole is not None:
        whole.close()
    engine.close()
    return {name: pairs[1:] for name, pairs in found.items()}


def ratio(these: Sequence[tuple[float, float]], those: Sequence[tuple[float, float]], clock: int) -> float:
    """Median over rounds of one case's seconds over another's; clock: 0 wall, 1 CPU."""
    return statistics.median(a[clock] / b[clock] for a, b in zip(these, those, strict=True))


def tell(args: argparse.Namespace, found: dict[str, list[tuple[float, float]]]) -> None:
    """A line per case; how many times the tokens per second of the first, and its CPU per rank."""
    first = next(iter(found.values()))
    for name, pairs in found.items():
        walls, cpus = zip(*pairs, strict=True)
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        speed = f"{1 / wall:8.1f} tokens/s ({1 / min(walls):6.1f} best), {1 / ratio(pairs, first, 0):5.2f} x first;"
        work = f"CPU per rank {1e3 * cpu:7.2f} ms/token ({1e3 * min(cpus):6.2f} best), {ratio(pairs, first, 1):5.2f} x"
        print(f"{name:24}{speed}  {work}")
    others = [name for name, there in (("one rank", args.alone), ("each its own", args.apart)) if there]
    for requests, other in ((requests, other) for requests in args.requests for other in others):
        mine, theirs = found[f"{args.layout}, {requests} requests"], found[f"{other}, {requests} requests"]
        least = min(c for _, c in mine) / min(c for _, c in theirs)
        print(f"CPU per rank over {other}, {requests} requests: {ratio(mine, theirs, 1):.2f} ({least:.2f} of the best)")


def main() -> int:
    """Measure and print on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", required=True, help="over the ranks that were started, such as pp=2")
    parser.add_argument("--size", default="110m", choices=tuple(KNOWN), help="(default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4], help="at a time (default: 1 4)")
    parser.add_argument("--alone", action="store_true", help="the first rank also by itself, with the whole model")
    parser.add_argument("--apart", action="store_true", help="all ranks also by themselves, at the same time")
    parser.add_argument("--compiled", action="store_true", help="kernels compiled for the weights' shapes as well")
    parser.add_argument("--stored", action="store_true", help="weights as they are stored, not laid out for decoding")
    parser.add_argument("--no-sockets", action="store_true", help="ranks of tp talk over gloo alone")
    parser.add_argument("--through", nargs="+", choices=tuple(WAYS), help="how ranks of tp sum, in turn")
    parser.add_argument("--prompt", type=int, default=16, help="tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with process_group("cpu", 300.0) as launch:
        found = measure(args, launch.rank)
        if launch.rank == 0 and args.json:
            print(json.dumps(found))
        elif launch.rank == 0:
            tell(args, found)
    return 0


if __name__ == "__main__":
    run(main)
