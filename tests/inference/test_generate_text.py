"""Text in, text out: what is encoded before the loop and cut after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fms_parallel.errors import DataError
from fms_parallel.inference import generate_text
from fms_parallel.tokenizers import CharTokenizer
from tests.inference.models import Counting


class Recording(Counting):
    """Counts, and keeps what it was first given."""

    first: list[list[int]] | None = None

    def forward(self, input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        self.first = self.first or input_ids.tolist()
        return super().forward(input_ids, **others)


def test_text_is_the_continuation_alone() -> None:
    model = Recording(vocab=256)
    assert generate_text(model, CharTokenizer(), ["abc", "x"], max_new_tokens=3) == ["def", "yz{"]
    assert model.first == [[2, 97, 98, 99], [0, 0, 2, 120]]  # bos before each
    assert generate_text(model, CharTokenizer(), "abc", max_new_tokens=3) == ["def"]


def test_text_is_without_what_ended_it() -> None:
    model, tokenizer = Counting(vocab=256), CharTokenizer()
    assert generate_text(model, tokenizer, "a", max_new_tokens=9, stop=[[101, 102], [102]]) == ["bcd"]
    assert generate_text(model, tokenizer, "a", max_new_tokens=9, eos_id=101) == ["bcd"]


def test_text_ends_at_the_tokenizers_eos_unless_told_otherwise() -> None:
    model, tokenizer = Counting(vocab=256), CharTokenizer()
    # After the byte 0 come 1, bos (2), eos (3) and 4; special ids are no text.
    assert generate_text(model, tokenizer, "\x00", max_new_tokens=4) == ["\x01"]
    assert generate_text(model, tokenizer, "\x00", max_new_tokens=4, eos_id=None) == ["\x01\x04"]


class LeadingSpaceDropped(CharTokenizer):
    """Decodes as sentencepiece does: a space at the start of a text is not there."""

    def _decode(self, ids: list[int]) -> str:
        return super()._decode(ids).removeprefix(" ")


def test_text_keeps_its_leading_space() -> None:
    assert generate_text(Counting(vocab=256), LeadingSpaceDropped(), "a\x1f", max_new_tokens=2) == [" !"]


def test_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    with pytest.raises(DataError, match=r"256 tokens but the model's vocabulary is 50"):
        generate_text(Counting(vocab=50), CharTokenizer(), "a", max_new_tokens=1)
