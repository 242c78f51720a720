"""Text that grows: whole characters, stop texts, nothing shown that is taken back."""

from __future__ import annotations

import pytest

from fms_parallel.inference.text import GrowingText
from fms_parallel.tokenizers import get_tokenizer

CHAR = get_tokenizer("char")


def shown(text: str, stops: tuple[str, ...] = (), prompt: str = "") -> tuple[list[str], GrowingText]:
    growing = GrowingText(CHAR, CHAR.encode(prompt), stops)
    pieces = []
    for token in CHAR.encode(text):
        pieces.append(growing.push(token))
        if growing.stopped:
            break
    return [*pieces, growing.finish()], growing


@pytest.mark.parametrize("text", ["plain", "héllo, 日本語 🎉", "", "a\x02b\x03"])
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, growing = shown(text, prompt="é")
    assert "".join(pieces) == growing.text == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_half_a_character_waits_and_is_shown_at_the_end() -> None:
    growing = GrowingText(CHAR, [], ())
    assert growing.push(0xE6) == ""
    assert growing.finish() == "\ufffd"


def test_prompt_that_ends_in_half_a_character() -> None:
    growing = GrowingText(CHAR, CHAR.encode("aé")[:-1], ())
    assert growing.push(CHAR.encode("é")[-1]) + growing.push(ord("b")) + growing.finish() == "éb"


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("one EN", ("END",), "one EN"),
        ("aab", ("ab",), "a"),
        ("xaaab", ("aab",), "xa"),
        ("first second", ("second", "st se"), "fir"),
        ("END", ("END",), ""),
    ],
)
def test_stop_text_ends_it_and_is_never_shown(text: str, stops: tuple[str, ...], left: str) -> None:
    pieces, growing = shown(text, stops)
    assert "".join(pieces) == growing.text == left
    assert growing.stopped == (left != text)


def test_what_may_begin_a_stop_text_is_held_back_until_it_does_not() -> None:
    pieces, _ = shown("a\n\nb", ("\n\n\n",))
    assert pieces == ["a", "", "", "\n\nb", ""]
