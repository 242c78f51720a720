"""Greedy tokens against transformers' `generate`, from the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fms_parallel.inference import generate
from fms_parallel.models.hf.llama import HF_NAMES
from fms_parallel.models.llama import LLaMA, LLaMAConfig
from tests.inference.models import PROMPTS

transformers = pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")

SIZES = {"vocab_size": 37, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
PAD = 0


def reference(kv_heads: int) -> Any:
    """A small LlamaForCausalLM with large random weights, so that tokens are well apart."""
    config = transformers.LlamaConfig(
        **SIZES,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": kv_heads, "initializer_range": 0.4, "tie_word_embeddings": False},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD},
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def copied(source: Any, kv_heads: int) -> LLaMA:
    """Ours with the same weights, copied by name."""
    config = LLaMAConfig(vocab_size=37, width=32, layers=2, heads=4, kv_heads=kv_heads, ffn_width=48, max_positions=64)
    model, theirs = LLaMA(config), source.state_dict()
    names = {
        their.format(n=n, kind="weight"): our.format(n=n, kind="weight") for their, our in HF_NAMES for n in range(2)
    }
    model.load_state_dict({our: theirs.pop(their) for their, our in names.items() if their in theirs})
    assert not theirs
    return model


def their_tokens(source: Any, eos_id: int | None) -> list[list[int]]:
    """Left-padded greedy generation; what follows a row's eos is padding, and is dropped."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    out = source.generate(ids, attention_mask=seen, max_new_tokens=16, do_sample=False, eos_token_id=eos_id)
    rows = out[:, width:].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_greedy_tokens_of_unequal_prompts_equal_theirs(kv_heads: int) -> None:
    source = reference(kv_heads)
    model = copied(source, kv_heads)
    free = generate(model, PROMPTS, max_new_tokens=16)
    assert free == their_tokens(source, None)
    eos = free[1][4]
    ended = generate(model, PROMPTS, max_new_tokens=16, eos_id=eos)
    assert ended == their_tokens(source, eos)
    assert len(ended[1]) < 16
