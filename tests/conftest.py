"""What every test starts from: one thread, a fixed seed, and no slow test unless asked for."""

from __future__ import annotations

import os

# Before torch is imported: it reads this once. Ranks that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import multiprocessing.forkserver
import random
import sys
from collections.abc import Iterator

import pytest
import torch

from fms_parallel.distributed.launch import PRELOAD
from tests.poison import poisoned_memory

torch.set_num_threads(1)

FAMILIES = ("bert", "electra", "gpt2", "gpt_neo", "gptj", "llama", "mistral", "mixtral", "opt", "qwen2", "qwen3")
FAMILIES += ("t5", "vit", "whisper")
WRITERS = ("torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg")
"""What the first rank of a run writes with."""

LONGEST = ("test_auto", "test_scripts", "test_drawn_layouts", "test_pipeline", "test_elastic", "test_context")
LONGEST += ("test_relayout", "test_memory_oracle", "test_simulate", "test_offload", "test_layouts", "test_train_masked")
LONGEST += ("test_engine", "test_exit", "test_families", "test_gpt_bigcode", "test_plan", "test_roberta")
"""Files that come first: with several workers, one that starts late would keep them waiting at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--drawn", type=int, default=12, help="layouts that test_drawn_layouts.py draws (default: %(default)s)"
    )
    parser.addoption(
        "--capture-signatures", action="store_true", help="write the models' signatures anew instead of comparing"
    )


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would begin with the files that have most tests, however short they are.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = dict(zip(LONGEST, range(len(LONGEST)), strict=True))
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; `pytest --slow` runs it"))


@pytest.fixture(scope="session", autouse=True)
def server_of_ranks(request: pytest.FixtureRequest) -> None:
    """Load what ranks of any test import once, in the server that they are forked from.

    Each rank would do it again: about 0.9 CPU-seconds for a layout, 2.5 for a transformers model, more than most tests.
    """
    gc.freeze()  # what all tests share is nobody's garbage: looking through it takes a third of a second each time
    if any(hasattr(item.module, "run_ranks") for item in request.session.items if isinstance(item, pytest.Function)):
        ours = [name for name in sorted(sys.modules) if name.startswith("fms_parallel.")]
        models = [f"transformers.models.{name}.modeling_{name}" for name in FAMILIES]
        # What cannot be imported is passed over: a test that needs it says so itself.
        names = [*PRELOAD, "pytest", "hypothesis", *WRITERS, *ours, *models]
        multiprocessing.get_context("forkserver").set_forkserver_preload(names)
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that random numbers start from in every test, whatever ran before."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody has written reads as NaN (see `tests/poison.py`)."""
    with poisoned_memory():
        yield
