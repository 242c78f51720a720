"""Rows without a file, and views of other rows."""

from __future__ import annotations

import pytest
import torch

from fms_parallel.data.packing import PackedRows
from fms_parallel.data.rows import RandomRows, train_validation_split
from fms_parallel.errors import ConfigError, DataError


def test_random_row_is_a_function_of_seed_and_number() -> None:
    rows = RandomRows(16, 100, seed=1)
    again = RandomRows(16, 100, seed=1)
    torch.rand(3)  # the global generator plays no part
    assert all(torch.equal(rows.row(index)[0], again.row(index)[0]) for index in (5, 0, 5))
    assert not torch.equal(rows.row(0)[0], rows.row(1)[0])
    assert not torch.equal(rows.row(0)[0], RandomRows(16, 100, seed=2).row(0)[0])


def test_random_rows_are_shifted_by_one_and_use_the_whole_vocabulary() -> None:
    rows = RandomRows(64, 5, rows=20)
    seen: set[int] = set()
    for index in range(len(rows)):
        input_ids, labels = rows.row(index)
        assert torch.equal(input_ids[1:], labels[:-1]) and input_ids.dtype == labels.dtype == torch.int64
        seen |= set(input_ids.tolist())
    assert seen == set(range(5))


@pytest.mark.parametrize(("vocab", "rows", "message"), [(0, 1, "vocab_size=0"), (5, 0, "rows=0")])
def test_random_rows_of_nothing_are_refused(vocab: int, rows: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RandomRows(4, vocab, rows)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_split_shares_no_row_and_loses_none(fraction: float) -> None:
    dataset = PackedRows(torch.arange(101), 1, "test")
    train, validation = train_validation_split(dataset, fraction, seed=3)
    firsts = [[int(view.row(index)[0]) for index in range(len(view))] for view in (train, validation)]
    assert sorted(firsts[0] + firsts[1]) == list(range(100))
    assert len(firsts[1]) == min(max(round(100 * fraction), 1), 99)
    assert train.seq_len == validation.seq_len == 1


def test_split_is_drawn_from_the_seed() -> None:
    dataset = RandomRows(4, 10, rows=1000)
    same = [train_validation_split(dataset, 0.1, seed)[1].indices for seed in (0, 0, 1)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    assert same[0].float().mean().sub(500).abs() < 100  # from everywhere, not one end


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5, float("nan")])
def test_split_refuses_a_fraction_that_is_none(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        train_validation_split(RandomRows(4, 10), fraction, seed=0)


def test_split_refuses_a_single_row() -> None:
    with pytest.raises(DataError, match="1 row"):
        train_validation_split(RandomRows(4, 10, rows=1), 0.5, seed=0)
