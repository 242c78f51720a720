"""The feed: the rows of a step depend on step and seed, never on how they are laid out over shards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fms_parallel.data.feed import Batch, Feed
from fms_parallel.data.packing import PackedRows
from fms_parallel.data.rows import IGNORE
from fms_parallel.errors import ConfigError, DataError
from fms_parallel.phases import Phase, Phases


class Numbered:
    """Row i is [i, i, i]; its labels count i % 4 positions."""

    seq_len = 3

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        labels = torch.full((3,), index)
        labels[index % 4 :] = IGNORE
        return torch.full((3,), index), labels


LAYOUTS = [(shards, micro) for shards in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3, 4) if 12 % (shards * micro) == 0]


@pytest.mark.parametrize(("shards", "micro"), LAYOUTS)
def test_shards_and_micro_batches_end_to_end_are_the_one_process_batch(shards: int, micro: int) -> None:
    dataset = Numbered(29)  # does not divide by 12: steps straddle epochs
    whole = Feed(dataset, global_batch=12, seed=5)
    parts = [
        Feed(dataset, global_batch=12, seed=5, shard=(index, shards), micro_batches=micro) for index in range(shards)
    ]
    for step in range(8):
        wanted = whole.batch(step)
        batches = [part.batch(step) for part in parts]
        pieces = [piece for part in parts for piece in part.pieces(step)]
        assert {len(piece.input_ids) for piece in pieces} == {12 // shards // micro}
        for found in (batches, pieces):
            assert torch.equal(torch.cat([batch.input_ids for batch in found]), wanted.input_ids)
            assert torch.equal(torch.cat([batch.labels for batch in found]), wanted.labels)
            assert sum(batch.tokens for batch in found) == wanted.tokens


@pytest.mark.parametrize("global_batch", [1, 4, 10, 25, 64])
def test_every_epoch_reads_every_row_once(global_batch: int) -> None:
    feed = Feed(Numbered(10), global_batch=global_batch, seed=0)
    rows = [row for step in range(-(-30 // global_batch)) for row in feed.rows(step)]
    epochs = [rows[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_steps_may_be_asked_in_any_order() -> None:
    forward = Feed(Numbered(10), global_batch=4, seed=0)
    wanted = [forward.rows(step) for step in range(12)]
    resumed = Feed(Numbered(10), global_batch=4, seed=0)
    for step in (11, 3, 0, 7, 7, 11, 2):
        assert resumed.rows(step) == wanted[step]


def test_order_is_drawn_from_the_seed_alone() -> None:
    first = Feed(Numbered(1000), global_batch=100, seed=0).rows(0)
    torch.manual_seed(9)
    assert Feed(Numbered(1000), global_batch=100, seed=0).rows(0) == first
    assert Feed(Numbered(1000), global_batch=100, seed=1).rows(0) != first
    assert first != sorted(first)


def test_order_does_not_repeat_between_seed_and_epoch() -> None:
    """Epoch 1 of seed 0 is not epoch 0 of seed 1, as it would be if the two were added."""
    assert Feed(Numbered(50), global_batch=50, seed=0).rows(1) != Feed(Numbered(50), global_batch=50, seed=1).rows(0)


def test_only_the_orders_in_use_are_kept() -> None:
    feed = Feed(Numbered(10), global_batch=4, seed=0)
    for step in range(50):
        feed.rows(step)
        assert len(feed._orders) <= 2


@pytest.mark.parametrize(("rows", "batches"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_batches_per_epoch_read_every_row(rows: int, batches: int) -> None:
    feed = Feed(Numbered(rows), global_batch=4, seed=0)
    assert feed.batches_per_epoch == batches
    read = [row for step in range(batches) for row in feed.rows(step)]
    assert set(read) == set(range(rows)) and len(read) - 4 < rows


def test_batch_is_rows_side_by_side_as_int64() -> None:
    batch = Feed(PackedRows(torch.arange(33, dtype=torch.int32), 8, "test"), global_batch=3, seed=0).batch(0)
    assert batch.input_ids.shape == batch.labels.shape == (3, 8)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.labels, batch.input_ids + 1)


def test_tokens_count_the_labels_that_are_asked() -> None:
    batch = Feed(Numbered(8), global_batch=8, seed=0).batch(0)
    assert batch.tokens == 2 * (0 + 1 + 2 + 3)


def test_batch_splits_into_equal_consecutive_pieces() -> None:
    batch = Batch(torch.arange(12).view(6, 2), torch.arange(12).view(6, 2))
    pieces = list(batch.split(3))
    assert [piece.input_ids.tolist() for piece in pieces] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9], [10, 11]],
    ]
    with pytest.raises(ConfigError, match="6 rows cannot be split into 4"):
        list(batch.split(4))


@pytest.mark.parametrize(
    ("global_batch", "shards", "micro", "message"),
    [
        (10, 4, 1, "global_batch=10 .* 4 shards x 1 micro-batches.*multiple of 4, for example 8 or 12"),
        (10, 2, 2, "2 shards x 2 micro-batches.*multiple of 4, for example 8 or 12"),
        (3, 4, 2, "multiple of 8, for example 8"),
        (0, 1, 1, "global_batch=0 .*example 1"),
        (-4, 2, 1, "global_batch=-4 .*example 2"),
        (4, 1, 0, "micro_batches=0"),
    ],
)
def test_batch_that_does_not_divide_names_the_numbers_that_do(
    global_batch: int, shards: int, micro: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Feed(Numbered(10), global_batch=global_batch, seed=0, shard=(0, shards), micro_batches=micro)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_shard_that_is_none_is_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"shard {shard[0]} of {shard[1]}"):
        Feed(Numbered(10), global_batch=4, seed=0, shard=shard)


def test_dataset_without_rows_and_step_before_the_first_are_refused() -> None:
    with pytest.raises(DataError, match="no rows"):
        Feed(Numbered(0), global_batch=4, seed=0)
    with pytest.raises(ConfigError, match="step -1"):
        Feed(Numbered(4), global_batch=4, seed=0).rows(-1)


def test_phases_read_on_where_the_steps_before_them_ended() -> None:
    phases = Phases([Phase(2, batch_size=6), Phase(4, seq_len=1)], 3, 4)
    feed = Feed(Numbered(26), global_batch=4, seed=0, phases=phases)
    rows = [feed.rows(step) for step in range(5)]
    assert [len(one) for one in rows] == [4, 4, 6, 6, 6]
    assert sorted(row for one in rows for row in one) == list(range(26)) and feed.batches_per_epoch == 5
    halves = [Feed(Numbered(26), global_batch=4, seed=0, shard=(i, 2), phases=phases) for i in range(2)]
    assert [row for half in halves for row in half.rows(3)] == rows[3]
    assert feed.batch(3).input_ids.shape == (6, Numbered(26).seq_len) and feed.batch(4).labels.shape == (6, 1)


def test_phase_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 9 tokens, but the dataset's have"):
        Feed(Numbered(8), global_batch=4, seed=0, phases=Phases([Phase(2, seq_len=9)], 3, 4))
    feed = Feed(Numbered(8), global_batch=4, seed=0, shard=(0, 4), phases=Phases([Phase(2, batch_size=6)], 3, 4))
    assert feed.rows(1) and feed.check(1) is None
    with pytest.raises(ConfigError, match="6 does not divide into 4 shards"):
        feed.rows(2)
