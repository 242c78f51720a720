"""`fms-plan`: the commands, each in a file of its own under `commands/`, loaded when it is called.

It knows names and one-line descriptions only, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
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


WRITTEN = ("html", "trace", "plot", "out", "csv", "make_pareto", "parsing_file", "log_file")
"""Flags of any command that name a file which it writes."""

PICTURES = (".png", ".svg", ".pdf")


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
    parser.add_argument("command", metavar="command", help="one of those below; `command --help`")
    parser.parse_args(words[:1])
    raise ConfigError(unknown("command", words[0], COMMANDS))


COMPAT = {"tpe": "search_tpe", "fasop": "search_fasop"}
"""`search --compat WORD` speaks another planner's flags: a command of its own."""


def _run_command(name: str, words: list[str]) -> int:
    if name == "search":
        name, words = _whose_search(words)
    module = import_module(f"fms_parallel.planner.commands.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"fms-plan {name.replace('_', ' --compat ')}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(words)
    if name != "make-profile":
        _check_files(vars(args), positional=name == "pareto-plot")
    try:
        code: int = module.run(args)
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigError(f"{error.filename}: cannot be used: {error.strerror}. Give another path.") from None
    return code


def _whose_search(words: list[str]) -> tuple[str, list[str]]:
    """The search that `--compat WORD` or `--compat=WORD` names, and the other words."""
    at = next((i for i, word in enumerate(words) if word == "--compat" or word.startswith("--compat=")), None)
    if at is None:
        return "search", words
    _, joined, word = words[at].partition("=")
    rest = words[at + 1 :]
    if not joined and rest:
        word, rest = rest[0], rest[1:]
    if word not in COMPAT:
        raise ConfigError(unknown("--compat", word, COMPAT))
    return COMPAT[word], words[:at] + rest


def _check_files(flags: Mapping[str, object], positional: bool) -> None:
    """Raises ConfigError for a file that cannot be written where a flag puts it; before anything is computed."""
    for name in WRITTEN:
        path = flags.get(name)
        if isinstance(path, str) and path:
            folder = os.path.dirname(path) or "."
            shown = path if positional else f"--{name.replace('_', '-')} {path}"
            if not os.path.isdir(folder):
                raise ConfigError(f"{shown}: there is no folder {folder}: make it first, or give another path.")
            if os.path.isdir(path):
                raise ConfigError(f"{shown}: is a folder: give the name of a file in it.")
            if name in ("plot", "make_pareto") and not path.endswith(PICTURES):
                raise ConfigError(f"{shown}: a picture's name ends with one of {', '.join(PICTURES)}.")


def console() -> NoReturn:
    """The console script: an error that the caller can mend is one sentence and exit code 2."""
    run(main)
