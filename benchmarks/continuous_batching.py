"""Tokens per second of mixed requests: rows that join and leave between steps, beside batches that wait for their last.

    python benchmarks/continuous_batching.py
    python benchmarks/continuous_batching.py --rows 4 --scale 8 --rounds 3
    python benchmarks/continuous_batching.py --json

Requests: 32 of the 19366 of Azure's LLM inference trace of 2023 (conversation), every 605th, in their order: prompt and
generated tokens, divided by `--scale` to suit a small model. Patel et al., Splitwise, ISCA 2024 (arXiv 2311.18677);
AzurePublicDataset, CC-BY.

    continuous   the engine: prompts in chunks beside decodes, a free row is filled at once
    static       `generate` on groups of as many requests: all rows are computed until the last of the group has ended
    leaving      the engine, which fills a batch only when the one before it has ended; rows that end leave it

Contestants run in turn in one process. CPU seconds of one thread are compared, since wall time depends on who else uses
the cores. Tokens of continuous and leaving must be the same, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fms_parallel.cli import run
from fms_parallel.errors import ConfigError
from fms_parallel.inference import InferenceEngine, generate

TRACE = (
    *((2522, 62), (2436, 83), (986, 441), (1053, 408), (1316, 203), (944, 548), (961, 429), (1092, 393), (998, 411)),
    *((902, 95), (402, 98), (369, 65), (408, 103), (2234, 33), (4146, 69), (4082, 38), (392, 91), (1112, 423)),
    *((1025, 396), (395, 95), (120, 12), (235, 133), (410, 93), (1152, 503), (407, 90), (5936, 63), (977, 429)),
    *((1064, 397), (2894, 77), (2453, 130), (1094, 396), (30, 215)),
)
"""(prompt tokens, generated tokens)."""

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "layers": 2, "heads": 4, "ffn_width": 160, "vocab_size": 512},
    "15m": {"width": 288, "layers": 6, "heads": 6, "ffn_width": 768, "vocab_size": 32000, "tied": True},
    "110m": {"width": 768, "layers": 12, "heads": 12, "ffn_width": 2048, "vocab_size": 32000, "tied": True},
}
Requests = list[tuple[list[int], int]]


def main() -> int:
    """Run the contestants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="15m", choices=SIZES)
    parser.add_argument("--rows", type=int, default=8, help="running at a time (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=4, help="divides the trace's lengths (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one step (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if min(args.rows, args.scale, args.rounds) < 1:
        raise ConfigError("--rows, --scale and --rounds must be >= 1.")
    torch.set_num_threads(1)
    model, requests = build(args.size, args.scale), make_requests(args.scale, SIZES[args.size]["vocab_size"])
    contestants: dict[str, Callable[[], tuple[int, Any]]] = {
        "continuous": lambda: by_engine(model, requests, args.rows, args.chunk, static=False),
        "static": lambda: by_generate(model, requests, args.rows),
        "leaving": lambda: by_engine(model, requests, args.rows, args.chunk, static=True),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    answers: dict[str, tuple[int, Any]] = {}
    for _ in range(args.rounds):
        for name, contestant in contestants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            answers[name] = contestant()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    if answers["continuous"][1] != answers["leaving"][1]:
        raise ConfigError("continuous and leaving gave different tokens.")
    report(args, requests, seconds, {name: steps for name, (steps, _) in answers.items()})
    return 0


def build(size: str, scale: int) -> nn.Module:
    """A LLaMA with drawn weights."""
    from fms_parallel.models import get_model

    longest = (max(prompt for prompt, _ in TRACE) + max(new for _, new in TRACE)) // scale + 2
    return get_model("llama", "micro", max_positions=longest, **SIZES[size]).eval()


def make_requests(scale: int, vocab: int) -> Requests:
    """The trace's lengths, with drawn tokens."""
    draw = random.Random(0)
    return [
        ([draw.randrange(vocab) for _ in range(max(1, prompt // scale))], max(1, new // scale)) for prompt, new in TRACE
    ]


def by_engine(model: nn.Module, requests: Requests, rows: int, chunk: int, static: bool) -> tuple[int, Any]:
    """Steps and tokens of the engine."""
    with InferenceEngine(model, max_batch_size=rows, max_step_tokens=chunk, static_batches=static) as engine:
        handles = [engine.submit(prompt, max_new_tokens=new) for prompt, new in requests]
        tokens = [handle.result().tokens for handle in handles]
        return engine.counts().steps, tokens


def by_generate(model: nn.Module, requests: Requests, rows: int) -> tuple[int, Any]:
    """Steps of `generate`, and its tokens up to what each request wanted."""
    steps, tokens = 0, []
    for start in range(0, len(requests), rows):
        group = requests[start : start + rows]
        most = max(new for _, new in group)
        found = generate(model, [prompt for prompt, _ in group], max_new_tokens=most)
        tokens += [tuple(row[:new]) for row, (_, new) in zip(found, group, strict=True)]
        steps += most
    return steps, tokens


def report(
    args: argparse.Namespace,
    requests: Requests,
    seconds: dict[str, list[tuple[float, float]]],
    steps: dict[str, int],
) -> None:
    """The table, or one JSON object."""
    new = sum(count for _, count in requests)
    rows = []
    for name, found in seconds.items():
        cpu, wall = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(b[0] / a[0] for a, b in zip(found, seconds["static"], strict=True))
        rows.append({"name": name, "steps": steps[name], "cpu_s": cpu, "wall_s": wall, "tokens_per_cpu_s": new / cpu})
        rows[-1]["against_static"] = ratio
    if args.json:
        print(json.dumps({"size": args.size, "rows": args.rows, "scale": args.scale, "new_tokens": new, "found": rows}))
        return
    prompts = sum(len(prompt) for prompt, _ in requests)
    print(f"{args.size}: {len(requests)} requests, {prompts} prompt and {new} new tokens, {args.rows} rows\n")
    print(f"{'':12}{'steps':>8}{'CPU s':>10}{'wall s':>10}{'tokens/CPU s':>14}{'to static':>12}")
    for row in rows:
        print(
            f"{row['name']:12}{row['steps']:8}{row['cpu_s']:10.2f}{row['wall_s']:10.2f}{row['tokens_per_cpu_s']:14.1f}"
            f"{row['against_static']:11.2f}x"
        )


if __name__ == "__main__":
    run(main)
