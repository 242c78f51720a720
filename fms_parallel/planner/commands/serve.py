"""Plan an inference engine: time to the first token, tokens per second and KV memory of every tp x pp.

fms-plan serve --model llama:3.1-70b --gpus h100:8 --global-batch 32 --prompt 1024 --generate 256
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan serve`."""
    common.add_job(parser)
    parser.add_argument(
        "--prompt", type=int, default=1024, help="tokens before the first new one (default: %(default)s)"
    )
    parser.add_argument("--generate", type=int, default=256, help="new tokens (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plan and show."""
    from dataclasses import asdict

    from fms_parallel.errors import ConfigError
    from fms_parallel.planner import render
    from fms_parallel.planner.inference import serving

    if min(args.prompt, args.generate) < 1:
        raise ConfigError("--prompt and --generate: need whole numbers >= 1.")
    args.seq = args.prompt
    found = serving(common.read_planner(args), args.global_batch, args.prompt, args.generate)
    if args.json:
        common.say_json({"results": [{**asdict(s), "layout": str(s.layout)} for s in found]})
        return 0
    rows = [
        (f"{s.ttft_s:.3f}", f"{s.token_s * 1e3:.2f}", f"{s.tokens_per_s:.0f}", f"{s.weights_gb:.1f}", f"{s.kv_gb:.1f}",
         str(s.max_batch), str(s.layout))
        for s in found
    ]  # fmt: skip
    common.say(render.table(rows, ("TTFT s", "ms/token", "tokens/s", "weights GiB", "KV GiB", "max batch", "layout")))
    return 0
