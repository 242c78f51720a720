"""Ranks are forked from a server: everything that tests import there is loaded once, before the first fork.

Without this each rank of each job would import again what the server lacks: about 0.9 CPU-seconds for a layout, and 2.5
for a transformers model, several times what most of the tests do.
"""

from __future__ import annotations

import multiprocessing.forkserver
import pkgutil

import pytest

import tests.distributed
from fms_parallel.distributed.launch import PRELOAD

FAMILIES = ("bert", "electra", "gpt2", "gpt_neo", "gptj", "llama", "mistral", "mixtral", "opt", "qwen2", "qwen3")
FAMILIES += ("t5", "vit", "whisper")


@pytest.fixture(scope="session", autouse=True)
def loaded_server() -> None:
    """Start the server with the library, every test module of this folder, and transformers' models if installed."""
    here = [f"tests.distributed.{module.name}" for module in pkgutil.iter_modules(tests.distributed.__path__)]
    models = [f"transformers.models.{name}.modeling_{name}" for name in FAMILIES]
    # What cannot be imported is passed over: a test that needs it says so itself.
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, *here, *models])
    multiprocessing.forkserver.ensure_running()
