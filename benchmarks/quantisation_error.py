"""How far int8 weights move a model's logits, on weights drawn at random.

    python benchmarks/quantisation_error.py                                   LLaMA and Mixtral, E 288, L 6
    python benchmarks/quantisation_error.py --architecture llama --width 768 --layers 12

Every line compares with the same model in fp32, over `--positions` random tokens: the largest error over the largest
logit, the root mean square error over the root mean square, the divergence (KL, nats a token), and how often the
likeliest token is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fms_parallel.cli import run

STORED: dict[str, dict[str, Any]] = {
    "bf16": {"data_type": "bf16"},
    "int8, fp32": {"linear_type": "int8"},
    "int8, bf16": {"data_type": "bf16", "linear_type": "int8"},
}
"""Weights, activations -> arguments of `get_model`."""


def errors(found: Tensor, wanted: Tensor) -> tuple[float, float, float, float]:
    """Largest, root mean square, divergence, share of equal tokens; logits `[S, V]`."""
    gap = found - wanted
    divergence = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return (
        float(gap.abs().max() / wanted.abs().max()),
        float(gap.norm() / wanted.norm()),
        float(divergence),
        float(same),
    )


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    from fms_parallel.models import get_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", help="may be repeated (default: llama, mixtral)")
    parser.add_argument("--width", type=int, default=288, help="E (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="L (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=32000, help="V (default: %(default)s)")
    parser.add_argument("--positions", type=int, default=256, help="tokens of the row (default: %(default)s)")
    args = parser.parse_args(words)
    ids = torch.randint(args.vocab, (1, args.positions), generator=torch.Generator().manual_seed(0))
    heads = max(args.width // 48, 1)
    sizes = {"width": args.width, "layers": args.layers, "heads": heads, "kv_heads": heads, "vocab_size": args.vocab}
    sizes |= {"ffn_width": args.width * 8 // 3, "max_positions": args.positions}
    for architecture in args.architecture or ("llama", "mixtral"):
        with torch.no_grad():
            wanted = get_model(architecture, "micro", **sizes).eval()(ids)[0]
            for stored, options in STORED.items():
                found = get_model(architecture, "micro", **sizes, **options).eval()(ids)[0].float()
                largest, rms, divergence, same = errors(found, wanted)
                print(
                    f"{architecture:<10} {stored:<12} largest {largest:6.2%}  rms {rms:6.2%}  "
                    f"divergence {divergence:.1e}  same token {same:.0%}"
                )
    return 0


if __name__ == "__main__":
    run(main)
