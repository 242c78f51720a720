"""Start-up: what the launcher says, which device a rank gets, and who does what first."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fms_parallel import dynamic
from fms_parallel.auto import parallelize
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.start import Launch, first_rank_first, leave, pick_device, process_group, require_group
from fms_parallel.errors import ConfigError, RankFailed
from fms_parallel.inference import InferenceEngine
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.strategy import compose

# ---- what the launcher says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch(0, 1, 0, 1)),
        ({"WORLD_SIZE": "4"}, Launch(0, 1, 0, 1)),  # left over from something else: no launcher sets it alone
        ({"RANK": "3", "WORLD_SIZE": "4"}, Launch(3, 4, 3, 4)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Launch(5, 8, 1, 4)),
    ],
)
def test_launch_is_what_the_variables_say(variables: dict[str, str], expected: Launch) -> None:
    assert Launch.read(variables) == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "^RANK is set but WORLD_SIZE is not: start the job with torchrun, or unset RANK"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "^RANK='one' is not a number: start the job with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "^LOCAL_RANK='-1' is not a number"),
    ],
)
def test_half_a_launch_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Launch.read(variables)


# ---- devices ----------------------------------------------------------------------------------------------------


def test_every_rank_computes_on_the_cpu() -> None:
    assert pick_device("cpu", Launch(3, 4, 3, 4)) == torch.device("cpu")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e12])
def test_a_timeout_that_is_none_is_refused_before_a_group_starts(seconds: float) -> None:
    with pytest.raises(ConfigError, match="more than 0 seconds"):
        process_group("cpu", seconds).__enter__()


def test_ranks_without_a_group_are_told_how_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever forgets it would train as many models of one process, or hear that one rank was started."""
    require_group()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    model = get_model("llama", "micro", layers=1, width=16, heads=2, ffn_width=16, vocab_size=16)
    for ask in (
        require_group,
        lambda: get_model("llama", "micro", distributed_strategy="tp=2"),
        lambda: parallelize(model, "pp=2", {}),
        lambda: InferenceEngine(model, layout="tp=2"),
        lambda: compose(model, ParallelLayout.parse("tp=2")),
        lambda: dynamic.train(model, None),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=r"2 ranks were started but no process group .*`with process_group\(\):`"):
            ask()


def test_an_unknown_device_type_is_told_the_known_ones() -> None:
    for ask in (lambda: pick_device("gpu", Launch()), lambda: process_group("gpu").__enter__()):
        with pytest.raises(ConfigError, match=r"unknown device type 'gpu'.* Known: cpu, cuda"):
            ask()


def test_cuda_without_cuda_is_refused_before_a_group_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="no CUDA device; use --device_type cpu"), process_group("cuda"):
        pass
    assert not dist.is_initialized()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    with pytest.raises(ConfigError, match=r"local rank 2 has no GPU: .* the node has 2; start with --nproc_per_node=2"):
        pick_device("cuda", Launch(6, 8, 2, 4))
    assert pick_device("cuda", Launch(5, 8, 1, 4)) == torch.device("cuda", 1) == made_current[0]


# ---- the group --------------------------------------------------------------------------------------------------


def test_one_process_gets_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with process_group() as launch:
        assert launch == Launch() and not dist.is_initialized()
    leave()  # nothing to leave
    with pytest.raises(KeyError, match="mine"), process_group():
        raise KeyError("mine")


def nested_group() -> tuple[Launch, bool]:
    """`process_group` inside a group that is there already."""
    with process_group() as launch:
        dist.barrier()
    return launch, dist.is_initialized()


def test_a_group_that_is_there_already_is_kept() -> None:
    assert run_ranks(nested_group, 2) == [(Launch(0, 2, 0, 2), True), (Launch(1, 2, 1, 2), True)]


def own_group(port: int, failing: bool) -> list[Any]:
    """A group as a launched script makes it, in place of the one that `run_ranks` made."""
    leave()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with process_group(timeout_seconds=30) as launch:
            words: list[Any] = [launch, dist.get_backend(), dist.get_rank(), dist.get_world_size()]
            if failing and launch.rank == 0:
                raise ArithmeticError("two and two")
            dist.barrier()
    except ArithmeticError:
        words = ["failed"]
    except RuntimeError as error:
        words = ["lost contact" if "closed by peer" in str(error) or "reset by peer" in str(error) else str(error)]
    return [*words, dist.is_initialized()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_launched_job_gets_a_group_and_leaves_it() -> None:
    first, second = run_ranks(own_group, 2, free_port(), False)
    assert first == [Launch(0, 2, 0, 2), "gloo", 0, 2, False]
    assert second == [Launch(1, 2, 1, 2), "gloo", 1, 2, False]


def test_a_failing_rank_leaves_at_once_and_its_peers_hear_of_it() -> None:
    """Within the limit of `run_ranks`, before the collective itself would time out."""
    assert run_ranks(own_group, 2, free_port(), True, timeout=20.0) == [["failed", False], ["lost contact", False]]


# ---- first rank first -------------------------------------------------------------------------------------------


def make_once(folder: str) -> float:
    """When this rank's body began."""
    path = Path(folder) / "made"
    with first_rank_first(Launch.read()):
        began = time.monotonic()
        if not path.exists():
            time.sleep(0.2)
            path.write_text(str(dist.get_rank()))
        assert path.read_text() == "0"
    return began


def test_the_first_rank_is_done_before_the_others_begin(tmp_path: Path) -> None:
    first, *others = run_ranks(make_once, 3, str(tmp_path))
    # `first_rank_first` lets everybody go when the body of the first is done; its clock is the machine's.
    assert all(began >= first + 0.2 for began in others)


def fail_first() -> str:
    reached = "not reached"
    try:
        with first_rank_first(Launch.read()):
            reached = "reached"
            raise ConfigError("no such corpus.")
    except Exception as error:
        return f"{type(error).__name__}: {error} ({reached})"
    return "no error"


def test_a_failure_of_the_first_rank_is_raised_on_every_rank() -> None:
    assert run_ranks(fail_first, 3) == [
        "ConfigError: no such corpus. (reached)",
        "ConfigError: rank 0 failed: no such corpus. (not reached)",
        "ConfigError: rank 0 failed: no such corpus. (not reached)",
    ]


def fail_on_second_node() -> str:
    """Two nodes of one rank each: both are first, the second fails."""
    rank = dist.get_rank()
    try:
        with first_rank_first(Launch(rank, 2, 0, 1)):
            if rank == 1:
                raise OSError("disk is full")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_failure_on_another_node_is_raised_on_every_rank() -> None:
    assert run_ranks(fail_on_second_node, 2) == ["ConfigError: rank 1 failed: disk is full", "OSError: disk is full"]


def fail_later() -> None:
    with first_rank_first(Launch.read()):
        if dist.get_rank() == 1:
            raise ConfigError("mine alone.")


def test_a_failure_of_another_rank_is_its_own() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed:.*ConfigError: mine alone\."):
        run_ranks(fail_later, 2)


def test_one_process_is_its_own_first_rank() -> None:
    with first_rank_first(Launch()):
        reached = True
    assert reached
    with pytest.raises(OSError, match="disk"), first_rank_first(Launch()):
        raise OSError("disk is full")
