"""Who sees which message: nobody unless asked, then rank 0 everything and the others what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from fms_parallel.log import get_logger, log_to_stderr


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[logging.Logger]:
    """The library's logger without handlers, and as it was afterwards."""
    logger = logging.getLogger("fms_parallel")
    torch_logger = logging.getLogger("torch.distributed.tensor._redistribute")
    before = logger.handlers[:], logger.level, torch_logger.level
    logger.handlers.clear()
    yield logger
    logger.handlers[:] = before[0]
    logger.setLevel(before[1])
    torch_logger.setLevel(before[2])


def test_every_logger_is_a_child_of_the_library() -> None:
    assert get_logger("fms_parallel.training.loop").name == "fms_parallel.training.loop"
    assert get_logger("my_script").name == "fms_parallel.my_script"


def test_nothing_but_warnings_is_written_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("room").info("hello")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "seen"), [(0, ["INFO", "WARNING"]), (3, ["WARNING"])])
def test_rank_zero_sees_all_and_others_what_is_wrong(
    capsys: pytest.CaptureFixture[str], rank: int, seen: list[str]
) -> None:
    log_to_stderr(logging.INFO, rank)
    log_to_stderr(logging.INFO, rank)  # a second call does not double the lines
    logger = get_logger("room")
    logger.debug("hello")
    logger.info("hello")
    logger.warning("hello")
    written = capsys.readouterr()
    assert written.err.splitlines() == [f"[rank {rank}] {level} fms_parallel.room: hello" for level in seen]
    assert written.out == ""


def test_a_higher_level_is_kept_on_every_rank(fresh_logger: logging.Logger) -> None:
    for rank in (0, 1):
        log_to_stderr(logging.ERROR, rank)
        assert fresh_logger.level == logging.ERROR
