"""Uninitialised memory made visible: inside `poisoned_memory`, memory that nobody has written reads as NaN.

The fixture `poison` does this for one test; ranks of a multi-rank test call it themselves, because they are processes
of their own. It knows torch's switches only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty`, `empty_like`, `new_empty`, `to_empty`, `resize_` give NaN (integers their largest value)."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    # torch fills only while deterministic algorithms are on; warn_only, so that no operation is refused for it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
