"""A run that succeeded ends with exit code 0, every time (see `exit_race.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rounds", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_a_job_that_succeeded_exits_with_0_every_time(rounds: int) -> None:
    """About one in ten did not, where ranks closed their connections without waiting for each other."""
    command = [sys.executable, "-m", "tests.distributed.exit_race", str(rounds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{rounds} rounds\n"
