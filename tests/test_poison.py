"""The poison shows what it promises to show, on the memory that a meta model materialises into, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.poison import poisoned_memory

MAKERS: dict[str, Callable[[], torch.Tensor]] = {
    "empty": lambda: torch.empty(64),
    "empty_bf16": lambda: torch.empty(64, dtype=torch.bfloat16),
    "empty_like": lambda: torch.empty_like(torch.ones(64)),
    "new_empty": lambda: torch.ones(1).new_empty(64),
    "empty_strided": lambda: torch.empty_strided((8, 8), (1, 8)),
    "resize_": lambda: torch.empty(0).resize_(64),
    "to_empty": lambda: torch.nn.Linear(8, 8, device="meta").to_empty(device="cpu").weight,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_unwritten_memory_reads_as_nan(maker: str, poison: None) -> None:
    assert MAKERS[maker]().isnan().all()


def test_written_memory_is_left_alone(poison: None) -> None:
    assert torch.equal(torch.arange(3.0).clone(), torch.tensor([0.0, 1.0, 2.0]))


def test_settings_are_as_before_afterwards_also_after_an_error() -> None:
    def settings() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    before = settings()
    with pytest.raises(KeyError), poisoned_memory():
        assert settings() == (True, True)
        raise KeyError
    assert settings() == before
