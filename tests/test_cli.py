"""What a person at a terminal gets: exit codes, one sentence for an error, and flags that read what was meant."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from fms_parallel import cli
from fms_parallel.cli import add_fields, assignments, run
from fms_parallel.errors import ConfigError, LayoutError


def raiser(error: BaseException) -> Callable[[], int]:
    """A `main` that fails."""

    def main() -> int:
        raise error

    return main


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `run` would have waited before it spoke."""
    seconds: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", seconds.append)
    monkeypatch.delenv("RANK", raising=False)
    return seconds


def end_of(main: Callable[[], int]) -> Any:
    """The exit code of `run(main)`."""
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code


# ---- run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_exit_code_is_what_main_returns(capsys: pytest.CaptureFixture[str], code: int) -> None:
    assert end_of(lambda: code) == code
    assert capsys.readouterr() == ("", "")


def test_an_error_of_the_caller_is_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    assert end_of(raiser(LayoutError("tp=3 does not divide 8 heads."))) == 2
    assert capsys.readouterr() == ("", "error: tp=3 does not divide 8 heads.\n")
    assert waits == [0.0]


def test_ranks_that_make_the_same_mistake_let_rank_0_speak_first(
    capsys: pytest.CaptureFixture[str], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert end_of(raiser(ConfigError("no such file."))) == 2
    assert capsys.readouterr().err == "[rank 3] error: no such file.\n"
    assert waits == [cli.FOLLOWERS_WAIT] and waits[0] > 0


@pytest.mark.parametrize("words", cli.LOST_CONTACT)
def test_a_lost_peer_is_one_sentence_after_the_rank_that_failed_has_spoken(
    capsys: pytest.CaptureFixture[str], waits: list[float], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert end_of(raiser(RuntimeError(f"[pair.cc:537] {words} [127.0.0.1]\nframe #0: somewhere"))) == 3
    assert capsys.readouterr().err == (
        "[rank 1] error: rank 1 lost contact with another rank, which has failed or hangs: "
        f"[pair.cc:537] {words} [127.0.0.1]\n"
    )
    assert waits == [cli.WITNESSES_WAIT] and waits[0] > cli.FOLLOWERS_WAIT


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room there"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only file system; name a place"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "a: No such file or directory; check"),
    ],
)
def test_a_disk_or_path_that_refuses_is_one_sentence_with_a_way_out(
    capsys: pytest.CaptureFixture[str], waits: list[float], error: OSError, said: str
) -> None:
    assert end_of(raiser(error)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}") and err.count("\n") == 1


def test_ctrl_c_is_one_word_of_the_first_rank(
    capsys: pytest.CaptureFixture[str], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert end_of(raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "error: interrupted.\n")
    monkeypatch.setenv("RANK", "1")
    assert end_of(raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


BUGS = [RuntimeError("shapes cannot be multiplied"), KeyError("x"), ValueError("bad"), OSError(errno.EBADF, "closed")]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_not_caught(bug: Exception, waits: list[float]) -> None:
    with pytest.raises(type(bug)) as caught:
        run(raiser(bug))
    assert caught.value is bug and waits == []


def test_a_bug_keeps_its_traceback_and_a_mistake_has_none() -> None:
    """In processes of their own, as a person sees it."""
    script = "from fms_parallel.cli import run\nfrom fms_parallel.errors import ConfigError\ndef main(): {}\nrun(main)"

    def ended(body: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script.format(body)], capture_output=True, text=True)

    bug, mistake = ended("1 / 0"), ended("raise ConfigError('no such file.')")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr and "ZeroDivisionError" in bug.stderr and "in main" in bug.stderr
    assert (mistake.returncode, mistake.stderr) == (2, "error: no such file.\n")


# ---- flags ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """One field of every kind."""

    steps: int = field(default=3, metadata={"help": "how many"})
    rate: float = field(default=0.5, metadata={"help": "how fast"})
    path: str | None = field(default=None, metadata={"help": "where", "type": str})
    kind: str = field(default="a", metadata={"help": "which", "choices": ("a", "b")})
    loud: bool = field(default=False, metadata={"help": "how loud"})


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_fields(made, fields(Options))
    return made


def test_flags_give_the_defaults_of_the_fields(parser: argparse.ArgumentParser) -> None:
    assert Options(**vars(parser.parse_args([]))) == Options()


def test_flags_are_read_as_the_fields_types(parser: argparse.ArgumentParser) -> None:
    words = ["--steps", "5", "--rate", "1e-3", "--path", "7", "--kind", "b", "--loud", "True"]
    assert Options(**vars(parser.parse_args(words))) == Options(5, 1e-3, "7", "b", True)
    assert parser.parse_args(["--loud", "false"]).loud is False


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--steps two", "argument --steps: invalid int value: 'two'"),
        ("--kind c", "argument --kind: invalid choice: 'c'"),
        ("--loud maybe", "argument --loud: 'maybe' is neither true nor false"),
    ],
)
def test_a_word_of_another_type_is_refused(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], words: str, sentence: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words.split())
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_help_names_defaults_but_not_none(parser: argparse.ArgumentParser) -> None:
    text = " ".join(parser.format_help().split())
    assert "--steps INT how many (default: 3)" in text
    assert "--path STR where --kind" in text
    assert "--kind {a,b} which (default: a)" in text
    assert "--loud BOOL how loud (default: False)" in text


# ---- name=value -------------------------------------------------------------------------------------------------


def test_assignments_are_python_literals_or_text() -> None:
    words = ["layers=2", "rate=1e-4", "tied=True", "fused=false", "k=None", "name=silu", "rope={'factor': 2.0}"]
    words += ["path=/a=b", "empty=", "odd={[]: 1}", "open=[1,", "cut=(1, 2)"]
    assert assignments(words, "--override") == {
        "layers": 2,
        "rate": 1e-4,
        "tied": True,
        "fused": False,
        "k": None,
        "name": "silu",
        "rope": {"factor": 2.0},
        "path": "/a=b",
        "empty": "",
        "odd": "{[]: 1}",
        "open": "[1,",
        "cut": (1, 2),
    }
    assert assignments([], "--override") == {}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["layers"], "--override 'layers': write name=value."),
        (["=2"], "--override '=2': write name=value."),
        (["layers=2", "layers=3"], "--override: layers is given twice."),
    ],
)
def test_a_word_that_assigns_nothing_or_twice_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assignments(words, "--override")
    assert str(caught.value) == sentence
