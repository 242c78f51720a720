"""The cache against concatenation, which is what it replaces."""

from __future__ import annotations

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.inference.cache import KVCache


@pytest.mark.parametrize("steps", [[5, 1, 1, 1], [1, 3, 4], [8]])
def test_append_returns_what_concatenation_would(steps: list[int], poison: None) -> None:
    cache = KVCache(capacity=8)
    for layer in (0, 3):
        pieces = [(torch.randn(2, 3, size, 4), torch.randn(2, 3, size, 4)) for size in steps]
        for count, (keys, values) in enumerate(pieces, start=1):
            all_keys, all_values = cache.append(layer, keys, values)
            assert torch.equal(all_keys, torch.cat([k for k, _ in pieces[:count]], dim=2))
            assert torch.equal(all_values, torch.cat([v for _, v in pieces[:count]], dim=2))


def test_appends_write_into_one_allocation() -> None:
    cache = KVCache(capacity=4)
    new = torch.randn(1, 1, 1, 2)
    results = [cache.append(0, new, new)[0] for _ in range(4)]
    assert len({result.untyped_storage().data_ptr() for result in results}) == 1
    assert [result.shape[2] for result in results] == [1, 2, 3, 4]


def test_memory_is_counted_in_bytes_of_whole_capacity() -> None:
    cache = KVCache(capacity=10)
    assert cache.memory_bytes == 0
    for layer in range(3):
        new = torch.randn(2, 4, 1, 8, dtype=torch.bfloat16)
        cache.append(layer, new, new)
    assert cache.memory_bytes == 3 * 2 * (2 * 4 * 10 * 8) * 2  # layers, keys and values, elements, bytes each


def test_one_token_too_many_names_the_capacity() -> None:
    cache = KVCache(capacity=3)
    cache.append(0, torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    with pytest.raises(ConfigError, match=r"token 4 does not fit a KVCache of 3 tokens: make it with capacity=4"):
        cache.append(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


def test_another_batch_is_refused() -> None:
    cache = KVCache(capacity=3)
    cache.append(0, torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    with pytest.raises(ConfigError, match=r"holds 2 rows of 1 kv heads of width 4 and was given 1 rows"):
        cache.append(0, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
