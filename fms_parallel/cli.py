"""What command lines share: flags from dataclass fields, `name=value` words, and one sentence for an error.

It knows text and exit codes, no torch. Only scripts and `python -m` modules use it; nothing else writes to a terminal.
"""

from __future__ import annotations

import argparse
import ast
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import Field
from typing import Any, NoReturn

from fms_parallel.errors import ConfigError, FmsError

LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Timed out", "Broken pipe", "NCCL")
"""How torch's backends say that another rank has gone."""

FOLLOWERS_WAIT = 10.0
WITNESSES_WAIT = 14.0
"""Seconds. The launcher ends all ranks when the first one exits, so who knows most must speak first: rank 0 of ranks
that make the same mistake, and a rank that failed before those that only lost contact with it."""

BOOLEANS = {"true": True, "false": False}

WAYS_OUT = {
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "ask for the right to it, or name another one",
    errno.EPERM: "ask for the right to it, or name another one",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: what it names as a folder is a file",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another one",
}
"""What disk or path did to a command -> what its caller can do; any other OSError is a bug."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as a shell has it."""


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with what `main` returns; an `FmsError` becomes one sentence on stderr and exit code 2, never a traceback.

    Other exceptions are bugs and keep theirs, except that a disk or path that refuses, a lost peer and Ctrl-C are one
    sentence as well.
    """
    try:
        code = main()
    except FmsError as error:
        _say(str(error), wait=FOLLOWERS_WAIT if _rank() else 0.0)
        code = 2
    except BrokenPipeError:
        # Whoever read the output has had enough (`| head`); nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in WAYS_OUT:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror}; {WAYS_OUT[error.errno]}.", wait=FOLLOWERS_WAIT if _rank() else 0.0)
        code = 2
    except KeyboardInterrupt:
        if not _rank():
            _say("interrupted.", wait=0.0)
        code = INTERRUPTED
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_CONTACT):
            raise
        reason = str(error).strip().splitlines()[0]
        _say(f"rank {_rank()} lost contact with another rank, which has failed or hangs: {reason}", wait=WITNESSES_WAIT)
        code = 3
    sys.stdout.flush()
    sys.exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(message: str, wait: float) -> None:
    time.sleep(wait)
    rank = f"[rank {_rank()}] " if _rank() else ""
    sys.stderr.write(f"{rank}error: {message}\n")
    sys.stderr.flush()


def add_fields(parser: argparse._ArgumentGroup | argparse.ArgumentParser, fields: Iterable[Field[Any]]) -> None:
    """One flag per dataclass field; metadata: `help`, and `type` where the default does not show it, `choices`.

    A flag for a bool takes a word, `--name true`.
    """
    for field in fields:
        kind = field.metadata.get("type") or type(field.default)
        shown = "" if field.default is None else " (default: %(default)s)"
        parser.add_argument(
            f"--{field.name}",
            type=_read_bool if kind is bool else kind,
            default=field.default,
            choices=field.metadata.get("choices"),
            metavar=None if "choices" in field.metadata else kind.__name__.upper(),
            help=field.metadata["help"] + shown,
        )


def add_fast_weights(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """`--fast_weights`, of every command that decodes: `copies` (also when nothing follows) or `compiled`."""
    parser.add_argument(
        "--fast_weights",
        nargs="?",
        const="copies",
        choices=("copies", "compiled"),
        help="lay matrices out for decoding first (one more copy of them), or compile kernels for their shapes as well",
    )


def _read_bool(word: str) -> bool:
    if word.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return BOOLEANS[word.lower()]


def assignments(words: Iterable[str], flag: str) -> dict[str, Any]:
    """`["layers=2", "tied=true"]` -> `{"layers": 2, "tied": True}`.

    Python literals, and true and false in any case (a text "false" would count as true); anything else is text.

    Raises:
        ConfigError: a word without `=`, or a name given twice.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{flag} {word!r}: write name=value.")
        if name in values:
            raise ConfigError(f"{flag}: {name} is given twice.")
        values[name] = _read_literal(value)
    return values


def _read_literal(text: str) -> Any:
    if text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # TypeError: `{[]: 1}`
        return text
