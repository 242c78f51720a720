"""Options: what is refused, and how words are read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.inference.options import Options, read_prompt

BAD: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1.0}, "unknown sampling option 'temprature'. Did you mean 'temperature'?"),
    ({"temperature": math.nan}, "temperature=nan: must be a number >= 0"),
    ({"temperature": "hot"}, "temperature='hot': must be a number"),
    ({"temperature": -1}, "temperature=-1"),
    ({"top_k": 0, "temperature": 1.0}, "top_k=0"),
    ({"top_k": 1.5, "temperature": 1.0}, "top_k=1.5: must be a whole number"),
    ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0"),
    ({"top_p": "x", "temperature": 1.0}, "top_p='x': must be a number in (0, 1]"),
    ({"ignore_eos": "no"}, "ignore_eos='no': must be True or False"),
    ({"logit_bias": [1, 2]}, "logit_bias=[1, 2]: must be a dict"),
    ({"logit_bias": {3: "x"}}, "logit_bias={3: 'x'}: must be a dict"),
    ({"stop": 5}, "stop=5: must be a text, or a list"),
    ({"top_p": 0.9}, "top_p=0.9 with temperature=0"),
    ({"min_p": 0.1}, "min_p=0.1 with temperature=0"),
    ({"min_p": 2.0, "temperature": 1.0}, "min_p=2.0: must be in [0, 1]"),
    ({"max_new_tokens": 0}, "max_new_tokens=0: must be >= 1 (0 with prompt_logprobs)"),
    ({"max_new_tokens": -1, "prompt_logprobs": 0}, "max_new_tokens=-1: must be >= 1"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9: must be in 0..max_new_tokens=8"),
    ({"min_new_tokens": -1}, "min_new_tokens=-1"),
    ({"prompt_logprobs": 65}, "prompt_logprobs=65: must be 0..64"),
    ({"prompt_logprobs": True}, "prompt_logprobs=True: must be a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens=True: must be a whole number"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ({"presence_penalty": math.inf}, "presence_penalty=inf"),
    ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 is nan"),
    ({"logprobs": 65}, "logprobs=65: must be 0..64"),
    ({"stop": ""}, "stop has an empty text"),
    ({"stop": [1, 2]}, "a sequence of tokens is written [[1, 2]]"),
    ({"stop": [[]]}, "stop sequence 0 is empty"),
    ({"priority": 0.5}, "priority=0.5: must be a whole number"),
    ({"seed": "x"}, "seed='x': must be a whole number"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD)
def test_impossible_option_is_refused_by_name(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Options.read(words)
    assert sentence in str(error.value)


def test_words_are_read() -> None:
    read = Options.read(
        {"stop": ["end", [4, 5]], "eos_id": [3, 2], "logit_bias": {7: 1, 2: -1.5}, "temperature": 0.5, "top_k": 3}
    )
    assert (read.stop_text, read.endings.stop, read.endings.eos) == (("end",), ((4, 5),), (2, 3))
    assert read.logit_bias == ((2, -1.5), (7, 1.0))
    assert (read.sampling.temperature, read.sampling.top_k) == (0.5, 3)


def test_eos_is_the_tokenizers_unless_another_or_none_is_given() -> None:
    assert Options.read({}, 9).endings.eos == (9,)
    assert Options.read({"eos_id": 4}, 9).endings.eos == (4,)
    assert Options.read({"eos_id": None}, 9).endings.eos == ()
    assert Options.read({"ignore_eos": True}, 9).endings.eos == ()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"eos_id": 11}, "eos_id has token 11, but this model's tokens are 0..9"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has token -1"),
        ({"stop": [[3, 10]]}, "stop sequence 0 has token 10"),
        ({"top_k": 11, "temperature": 1.0}, "top_k=11 of a vocabulary of 10"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Options.read(words).check_vocabulary(10)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "it is empty"),
        ([1.5], "no whole number"),
        (7, "not a list of token ids"),
        ("text", "texts need a tokenizer"),
        ({1, 2}, "not a list of token ids"),  # in no order
        (torch.zeros(2, 2), "one prompt is [S]"),
    ],
)
def test_prompt_that_is_none_is_refused(prompt: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_prompt("it", prompt)
    assert sentence in str(error.value)


def test_prompt_may_be_a_tensor() -> None:
    assert read_prompt("it", torch.tensor([3, 4])) == (3, 4)
