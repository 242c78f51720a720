"""Rows of any lengths in one forward, against a plain forward of each row alone (fp64)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from fms_parallel.inference.kv_manager import CacheSize, KVCacheManager
from fms_parallel.inference.paged import Where
from fms_parallel.inference.ragged import MOST_RUNS, Piece, RaggedBatch
from fms_parallel.models import get_model

BLOCK = 4
SMALL: dict[str, Any] = {"vocab_size": 37, "width": 32, "layers": 2, "heads": 4, "max_positions": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2, "ffn_width": 48},
    "mistral": {"kv_heads": 2, "ffn_width": 48, "window": 6},
    "gpt_bigcode": {},
    "qwen3": {"kv_heads": 1, "ffn_width": 48, "head_width": 8},
    "mixtral": {"kv_heads": 4, "ffn_width": 48},
    "granite": {"kv_heads": 4, "ffn_width": 48, "attention_multiplier": 0.3},
}


def model_of(family: str) -> nn.Module:
    return get_model(family, "micro", data_type="fp64", **SMALL, **MODELS[family]).eval()


def storage_of(model: nn.Module, tokens: int) -> KVCacheManager:
    return KVCacheManager(CacheSize.of(model), 1, tokens, torch.device("cpu"))


def run(model: nn.Module, pieces: list[Piece], storage: KVCacheManager | None) -> torch.Tensor:
    batch = RaggedBatch(pieces, storage, torch.device("cpu"))
    found: torch.Tensor = model(
        batch.input_ids,
        positions=batch.positions,
        first_position=batch.first_position,
        mask=None,
        cache=batch,
        last=batch.wanted,
    )
    return found[0]


class Scattered:
    """A row whose blocks lie where they were drawn."""

    def __init__(self, tokens: list[int], blocks: list[int]) -> None:
        self.tokens, self.blocks, self.done = tokens, blocks, 0

    def piece(self, count: int, wanted: int) -> Piece:
        start, stop = self.done, self.done + count
        self.done = stop
        place = [self.blocks[n // BLOCK] * BLOCK + n % BLOCK for n in range(stop)]
        runs: list[tuple[int, int]] = []
        for one in place:
            if runs and sum(runs[-1]) == one:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((one, 1))
        return Piece(self.tokens[start:stop], start, wanted, [Where(place[start:], runs)])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("family", MODELS)
@torch.inference_mode()
def test_pieces_of_scattered_rows_have_the_logits_of_each_row_alone(family: str) -> None:
    draw, model = random.Random(1), model_of(family)
    lengths = [23, 1, 9, 4 * (MOST_RUNS + 3), 30]
    blocks = list(range(sum(-(-n // BLOCK) for n in lengths) + 5))
    draw.shuffle(blocks)
    storage = storage_of(model, len(blocks) * BLOCK)
    rows = []
    for number, length in enumerate(lengths):
        count = -(-length // BLOCK)
        mine, blocks = blocks[:count], blocks[count:]
        tokens = [draw.randrange(37) for _ in range(length)]
        rows.append(Scattered(tokens, sorted(mine) if number == 4 else mine))
    whole = [model(torch.tensor([row.tokens]))[0] for row in rows]
    while left := [n for n, row in enumerate(rows) if row.done < len(row.tokens)]:
        counts = [min(draw.choice([1, 1, 2, 7, 13]), len(rows[n].tokens) - rows[n].done) for n in left]
        wanted = [draw.randrange(count + 1) for count in counts]
        found = run(model, [rows[n].piece(*pair) for n, *pair in zip(left, counts, wanted, strict=True)], storage)
        expected = [whole[n][rows[n].done - w : rows[n].done] for n, w in zip(left, wanted, strict=True)]
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", MODELS)
@torch.inference_mode()
def test_without_memory_a_piece_is_a_whole_row(family: str) -> None:
    model = model_of(family)
    rows = [torch.randint(37, (n,)).tolist() for n in (11, 3, 1)]
    found = run(model, [Piece(row, 0) for row in rows], None)
    wanted = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_more_tokens_than_positions_may_be_in_flight_but_no_row_has_more() -> None:
    model = model_of("llama")
    rows = [torch.randint(37, (100,)).tolist() for _ in range(3)]
    assert run(model, [Piece(row, 0) for row in rows], None).shape == (3, 37)
    with pytest.raises(ValueError, match="position 129 is beyond max_positions=128"):
        run(model, [Piece([1] * 129, 0)], None)
