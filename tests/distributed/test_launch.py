"""`run_ranks`: what comes back, and what is said of each way in which a rank can fail."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.start import Launch
from fms_parallel.errors import RankFailed


def describe(*arguments: Any) -> Any:
    return dist.get_rank(), dist.get_world_size(), Launch.read(), torch.get_num_threads(), arguments


@pytest.mark.parametrize("world_size", [1, 3])
def test_answers_come_in_rank_order_and_ranks_see_what_torchrun_would_say(world_size: int) -> None:
    arguments = ("word", {"k": [1, 2]}, torch.arange(3))
    answers = run_ranks(describe, world_size, *arguments)
    for rank, (number, count, launch, threads, received) in enumerate(answers):
        assert (number, count, threads) == (rank, world_size, 1)
        assert launch == Launch(rank, world_size, rank, world_size)
        assert received[:2] == arguments[:2] and received[2].equal(arguments[2])
    assert len(answers) == world_size


def test_the_collector_of_a_rank_leaves_alone_what_the_server_has_loaded() -> None:
    """Else each rank looks through all of torch when it ends, which takes longer than most jobs."""
    assert min(run_ranks(gc.get_freeze_count, 2)) > 50_000


def big_tensor() -> torch.Tensor:
    return torch.full((1 << 20,), float(dist.get_rank()))


def test_tensors_outlive_the_rank_that_made_them() -> None:
    zeros, ones = run_ranks(big_tensor, 2)
    assert zeros.eq(0).all() and ones.eq(1).all()


def fail_on_rank_1(how: str) -> None:
    """Rank 0 waits in a collective that rank 1 never joins."""
    if dist.get_rank() == 1:
        FAILURES[how]()
    dist.barrier()


def raise_error() -> None:
    raise ArithmeticError("two and two")


def exit_silently() -> None:
    os._exit(7)


def exit_politely() -> None:
    raise SystemExit("enough")


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAILURES = {"raise": raise_error, "os._exit": exit_silently, "sys.exit": exit_politely, "SIGKILL": kill_itself}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", r"(?s)^rank 1 of 2 failed:\nTraceback .*in raise_error.*ArithmeticError: two and two"),
        ("sys.exit", r"(?s)^rank 1 of 2 failed:\nTraceback .*SystemExit: enough"),
        ("os._exit", r"^rank 1 of 2 died without a word, exit code 7\.$"),
        ("SIGKILL", r"^rank 1 of 2 died without a word, exit code -9\.$"),
    ],
)
def test_the_first_rank_that_fails_is_named_with_its_reason(how: str, words: str) -> None:
    with pytest.raises(RankFailed, match=words) as caught:
        run_ranks(fail_on_rank_1, 2, how, timeout=30.0)
    assert "rank 0" not in str(caught.value)


def fail_in_turn() -> None:
    """Rank 1 first, rank 0 a little later."""
    time.sleep(0.0 if dist.get_rank() == 1 else 0.3)
    raise ArithmeticError(f"rank {dist.get_rank()}")


def test_of_several_failures_the_earliest_is_named() -> None:
    with pytest.raises(RankFailed, match=r"(?s)^rank 1 of 2 failed:.*ArithmeticError: rank 1$"):
        run_ranks(fail_in_turn, 2)


def hang_on_rank_2() -> int:
    if dist.get_rank() == 2:
        threading.Event().wait()
    return dist.get_rank()


def test_a_rank_that_hangs_ends_the_job_at_its_timeout() -> None:
    """Nobody leaves before everybody is done, so all ranks are silent."""
    with pytest.raises(RankFailed, match=r"^ranks 0, 1, 2 of 3 did not answer within 3 s: one of them hangs"):
        run_ranks(hang_on_rank_2, 3, timeout=3.0)


def process_id() -> int:
    return os.getpid()


def report_process_ids_and_hang(folder: str) -> None:
    with open(os.path.join(folder, str(os.getpid())), "w"):
        threading.Event().wait()


def test_no_rank_survives_the_job(tmp_path: Any) -> None:
    with pytest.raises(RankFailed):
        run_ranks(report_process_ids_and_hang, 2, str(tmp_path), timeout=1.0)
    pids = [int(name) for name in os.listdir(tmp_path)]
    assert len(pids) == 2
    for pid in [*pids, *run_ranks(process_id, 2)]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def die_after_the_answer(code: int) -> str:
    """As a background thread does that aborts while the process ends."""
    if dist.get_rank() == 1:
        from multiprocessing import util

        util.Finalize(None, os._exit, args=(code,), exitpriority=100)
    return "done"


def test_a_rank_that_dies_after_its_answer_fails_the_job() -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 answered, then died with exit code 6"):
        run_ranks(die_after_the_answer, 2, 6)
    assert run_ranks(die_after_the_answer, 2, 0) == ["done", "done"]


def return_a_lock() -> Any:
    return threading.Lock()


def test_an_answer_that_cannot_travel_is_an_error_of_the_rank() -> None:
    with pytest.raises(RankFailed, match=r"(?s)^rank \d of 2 failed:.*cannot pickle"):
        run_ranks(return_a_lock, 2)
