from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fms_parallel.data import IGNORE, Feed, RandomRows
from fms_parallel.data.masked import MaskedRows, Masking
from fms_parallel.data.rows import seeded
from fms_parallel.errors import ConfigError

V, MASK, SPECIAL = 50, 49, (0, 1)
MASKING = Masking(MASK, V, SPECIAL)


@dataclass
class Same:
    """Rows of one run of tokens."""

    tokens: Tensor
    rows: int = 3

    @property
    def seq_len(self) -> int:
        return len(self.tokens)

    def __len__(self) -> int:
        return self.rows

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens, self.tokens


def test_labels_are_the_tokens_that_were_chosen_and_nothing_else_changes() -> None:
    tokens = torch.randint(2, 49, (500,))
    inputs, labels = MASKING.hide(tokens, seeded(0))
    chosen = labels != IGNORE
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])


def test_shares_are_those_of_the_paper() -> None:
    """Within five standard deviations of the binomial."""
    n = 200_000
    tokens = torch.full((n,), 7)
    inputs, labels = MASKING.hide(tokens, seeded(1))
    chosen = labels != IGNORE
    count = int(chosen.sum())
    shares = (
        (count / n, 0.15, n),
        (float((inputs[chosen] == MASK).float().mean()), 0.8, count),
        (float((inputs[chosen] == 7).float().mean()), 0.1 + 0.1 / 47, count),  # one of 47 ordinary tokens is 7
    )
    for found, expected, trials in shares:
        assert abs(found - expected) < 5 * (expected * (1 - expected) / trials) ** 0.5
    replaced = inputs[chosen & (inputs != MASK) & (inputs != 7)]
    assert set(replaced.tolist()) == set(range(2, 49)) - {7}


def test_special_tokens_are_never_chosen_and_one_token_always_is() -> None:
    tokens = torch.tensor([0, 1, 5, MASK, 0])
    for seed in range(50):
        assert MASKING.hide(tokens, seeded(seed))[1].tolist() == [IGNORE, IGNORE, 5, IGNORE, IGNORE]
    inputs, labels = MASKING.hide(torch.tensor([0, 1, 0]), seeded(0))
    assert inputs.tolist() == [0, 1, 0] and set(labels.tolist()) == {IGNORE}


def test_what_is_hidden_depends_on_seed_step_and_row_only() -> None:
    rows = MaskedRows(Same(torch.arange(2, 34)), MASKING, seed=4)
    seen = [rows.at(step).row(index)[0].tolist() for step in range(3) for index in range(3)]
    assert len({tuple(row) for row in seen}) == 9
    other = MaskedRows(Same(torch.arange(2, 34)), MASKING, seed=5)
    assert other.at(1).row(2)[0].tolist() != rows.at(1).row(2)[0].tolist()
    torch.rand(7)  # the global generator is nobody's
    assert rows.at(1).row(2)[0].tolist() == seen[5]
    assert rows.row(2)[0].tolist() == rows.at(0).row(2)[0].tolist()


def test_every_layout_reads_the_same_rows_hidden_alike() -> None:
    data = MaskedRows(RandomRows(seq_len=16, vocab_size=V, rows=10), MASKING, seed=2)
    whole = Feed(data, global_batch=8, seed=3)
    for step in (0, 1, 5):
        expected = whole.batch(step)
        parts = [
            piece
            for index in range(2)
            for piece in Feed(data, global_batch=8, seed=3, shard=(index, 2), micro_batches=2).pieces(step)
        ]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), expected.input_ids)
        assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)
    numbers = [whole.rows(step) for step in range(6)]
    again = next(step for step in range(1, 6) if set(numbers[step]) & set(numbers[0]))
    row = (set(numbers[again]) & set(numbers[0])).pop()
    first, later = (whole.batch(step).input_ids[numbers[step].index(row)] for step in (0, again))
    assert not torch.equal(first, later)  # the same row, hidden anew


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"fraction": 0.0}, "mask fraction 0.0"),
        ({"fraction": 1.0}, "mask fraction 1.0"),
        ({"mask_id": 50}, "mask id 50 is none of 50 tokens"),
        ({"special_ids": range(50)}, "all 50 tokens are special"),
    ],
)
def test_impossible_maskings_are_errors(words: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Masking(**({"mask_id": MASK, "vocab_size": V} | words))  # type: ignore[arg-type]
