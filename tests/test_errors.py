"""Errors: one base that scripts catch, and sentences that name the nearest word."""

from __future__ import annotations

import pytest

import fms_parallel
from fms_parallel import errors
from fms_parallel.errors import FmsError, suggest, unknown

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FmsError)]


def test_every_error_of_a_caller_is_caught_by_the_base() -> None:
    assert {kind.__name__ for kind in KINDS} >= {"LayoutError", "ConfigError", "CheckpointError", "DataError"}
    for kind in KINDS:
        assert issubclass(kind, ValueError)
        assert getattr(fms_parallel, kind.__name__) is kind


@pytest.mark.parametrize(
    ("word", "known", "sentence"),
    [
        ("lama", ["llama", "gpt"], " Did you mean 'llama'?"),
        ("LLAMA", ["llama", "gpt"], " Did you mean 'llama'?"),
        ("ddp", ["DDP", "fsdp"], " Did you mean 'DDP'?"),
        ("zebra", ["llama", "gpt"], ""),
        ("llama", [], ""),
    ],
)
def test_only_a_close_word_is_suggested(word: str, known: list[str], sentence: str) -> None:
    assert suggest(word, known) == sentence


def test_an_unknown_word_is_told_the_nearest_and_all_known_ones_in_order() -> None:
    assert unknown("fruit", "aple", ["pear", "apple"]) == (
        "unknown fruit 'aple'. Did you mean 'apple'? Known: apple, pear."
    )
    assert unknown("fruit", "stone", iter(["pear"])) == "unknown fruit 'stone'. Known: pear."
    assert unknown("fruit", "apple", []) == "unknown fruit 'apple'. Known: none."
