"""`python -m fms_parallel.simulate`: what a rank of a layout would hold and send, as a table or as JSON.

    python -m fms_parallel.simulate --factory fms_parallel.models:get_model --architecture llama --variant 70b \\
        --distributed pp=8,fsdp=16,tp=8,sp,precision=bf16 --batch_size 128 --seq_len 2048

The factory is named as `module:callable`, so the library imports no model; flags that are not known here are passed to
it. No GPU, no other process and no memory for the model is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from fms_parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from fms_parallel.simulate.run import Simulation

GIB = 2**30


def build_parser() -> argparse.ArgumentParser:
    """Every flag; others go to the factory."""
    parser = argparse.ArgumentParser(
        prog="python -m fms_parallel.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any other `--name value` is passed to the factory.",
        allow_abbrev=False,
    )
    parser.add_argument("--factory", required=True, help="module:callable that makes the model")
    parser.add_argument("--distributed", required=True, help='the layout, such as "pp=8,fsdp=16,tp=8,sp"')
    parser.add_argument("--batch_size", type=int, required=True, help="global rows of a step")
    parser.add_argument("--seq_len", type=int, required=True, help="tokens of a row")
    parser.add_argument("--grad_accum_steps", type=int, default=1, help="micro-batches per rank (default: %(default)s)")
    parser.add_argument("--rank", type=int, action="append", help="which rank; may be given again")
    parser.add_argument(
        "--stages", action="store_true", help="a rank of every pipeline stage (default: of the first and the last)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list, one object per rank")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Simulate the ranks one after the other and print."""
    args, others = build_parser().parse_known_args(words)
    layout = ParallelLayout.parse(args.distributed)

    from fms_parallel.simulate.run import simulate, stage_ranks
    from fms_parallel.verify import factory_arguments, load_factory

    factory, arguments = load_factory(args.factory), factory_arguments(others)
    stages = stage_ranks(layout)
    ranks = args.rank or (stages if args.stages else sorted({stages[0], stages[-1]}))
    numbers = {"batch_size": args.batch_size, "seq_len": args.seq_len, "grad_accum_steps": args.grad_accum_steps}
    found = [simulate(factory, layout, rank=rank, **numbers, **arguments) for rank in ranks]
    if args.json:
        sys.stdout.write(json.dumps([asdict(one) for one in found]) + "\n")
    else:
        sys.stdout.write("\n".join("\n".join(_lines(one)) for one in found) + "\n")
    return 0


def _lines(one: Simulation) -> Iterator[str]:
    place = ", ".join(f"{axis} {index}" for axis, index in one.coordinates.items())
    yield f"{one.layout}: rank {one.rank} ({place})"
    for name in ("parameters", "gradients", "optimizer"):
        yield f"  {name:<16} {_size(getattr(one, name))}  between steps"
    yield f"  {'gathered':<16} {_size(one.gathered)}  at most"
    yield f"  {'gradients':<16} {_size(one.waiting_gradients)}  at most, with those that wait to be reduced"
    yield f"  {'activations':<16} {_size(one.activations)}  at most, working memory included"
    if one.kept_per_block:
        name, size = next(iter(one.kept_per_block.items()))
        yield f"  {'':<16} {_size(size)}  kept by {name} for one backward"
    parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in sorted(one.peak_by_purpose.items()))
    yield f"  {'peak':<16} {_size(one.peak)}  ({parts})"
    yield f"  {'collective':<16} {'axis':<10} {'count':>6} {'MiB':>12}"
    for c in one.collectives:
        yield f"  {c.kind:<16} {c.axis:<10} {c.count:>6} {c.bytes / 2**20:>12.3f}"


def _size(size: int) -> str:
    return f"{size / GIB:>9.3f} GiB"
