"""A search as one HTML file that opens without a network.

fms-plan report --model llama:3.1-70b --gpus h100:64 --global-batch 1024 --seq 8192 --html plan.html
"""

from __future__ import annotations

import argparse

from fms_parallel.planner.commands import common, search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fms-plan search`."""
    search.add_arguments(parser)
    parser.set_defaults(html="plan.html")


def run(args: argparse.Namespace) -> int:
    """Search, and write the file that `--html` names."""
    code = search.run(args)
    if not args.json:
        common.say(f"\nwritten to {args.html}")
    return code
