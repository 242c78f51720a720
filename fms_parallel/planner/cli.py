"""`fms-plan`: the commands, each in a file of its own under `commands/`, loaded when it is called.

It knows names and one-line descriptions only, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fms_parallel.cli import run
from fms_parallel.errors import ConfigError, unknown

COMMANDS = {
    "search": "rank the layouts of a model on a cluster",
    "explain": "why layout A beats layout B, by where time and memory go",
    "simulate": "the timeline of a layout: drawing and Chrome trace",
    "validate": "predicted against measured step times",
    "calibrate": "measure the machine at hand, for --devices",
    "report": "a search as one HTML file",
    "serve": "an inference engine: time to the first token, tokens per second, KV memory",
    "sweep": "systems, bandwidths and capacities, as transformer-perf-estimates sweeps them",
    "make-profile": "measure module times on the machine at hand, in FASOP's form",
    "show-profile": "measured module times, in FASOP's form",
    "pareto-plot": "plot cost against throughput again from a table",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return _run_command(words[0], words[1:])
    parser = argparse.ArgumentParser(
        prog="fms-plan",
        description="Find the best parallel layout for a model on a cluster, explain it, launch it. Needs no GPU.",
        epilog="commands:\n" + "\n".join(f"  {name:14} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below; `command --help`")
    parser.parse_args(words[:1])
    return 2  # parse_args has said what is wrong; nothing else comes here


COMPAT = {"tpe": "search_tpe", "fasop": "search_fasop"}
"""`search --compat WORD` speaks another planner's flags: a command of its own."""


def _run_command(name: str, words: list[str]) -> int:
    if name == "search" and "--compat" in words:
        at = words.index("--compat")
        word = words[at + 1] if at + 1 < len(words) else ""
        if word not in COMPAT:
            raise ConfigError(unknown("--compat", word, COMPAT))
        name, words = COMPAT[word], words[:at] + words[at + 2 :]
    module = import_module(f"fms_parallel.planner.commands.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"fms-plan {name.replace('_', ' --compat ')}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(words))
    return code


def console() -> NoReturn:
    """The console script: an error that the caller can mend is one sentence and exit code 2."""
    run(main)
