"""Unchanged models of transformers in the engine over tp and pp: the tokens of their own `generate`, fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.inference import InferenceEngine, PromptLookup

transformers = pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")

PROMPTS = [[5, 9, 2, 7, 11, 3], [8, 1], [4], [30, 31, 30, 31, 30]]
TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.4}
WIDE: dict[str, Any] = {
    **{"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False},
}
GPT2: dict[str, Any] = {
    **{"vocab_size": 37, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", WIDE),
    "gpt2": ("GPT2LMHead", GPT2),  # a table of positions, and a head that is the embedding
    "mistral": ("Mistral", WIDE | {"sliding_window": 7, "head_dim": 8}),
    "qwen2": ("Qwen2", WIDE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
}
CASES = {
    2: [("llama", "pp=2"), ("gpt2", "pp=2"), ("mistral", "pp=2"), ("qwen2", "pp=2"), ("qwen2", "tp=2")],
    4: [("llama", "pp=2,tp=2")],
}
"""World size -> models and layouts."""
WINDOWS: dict[str, list[int | None]] = {"mistral": [7], "qwen2": [None, 7]}
"""Of the kinds of layers; on every rank, whichever of them it has."""
NEW = 12


def model_of(name: str) -> Any:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind.removesuffix('LMHead')}Config")(**sizes, **TOKENS)
    model = getattr(transformers, kind + ("Model" if kind.endswith("LMHead") else "ForCausalLM"))(config)
    return model.double().eval()


def served(name: str, layout: str) -> list[list[list[int]]]:
    """Together and one after the other, chunked, preempted, and drafted."""
    found = []
    for options in (
        {},
        {"max_batch_size": 2, "max_step_tokens": 4, "block_size": 4, "cache_tokens": 40},
        {"max_batch_size": 2, "cache": "none"},
        {"speculative": PromptLookup(3)},
    ):
        with InferenceEngine(model_of(name), layout=layout, **options) as engine:
            found.append([list(one.tokens) for one in engine.generate(PROMPTS, max_new_tokens=NEW)])
            kinds = engine.memory_report().kinds
            assert not kinds or [kind.window for kind in kinds] == WINDOWS.get(name, [None])
            assert not any(kind.used for kind in kinds)
    return found


def crossing() -> str:
    """A model that hands a second tensor from block to block."""
    model = model_of("llama")
    first, last = model.model.layers[0], model.model.layers[2]
    first.mlp.register_forward_hook(lambda module, inputs, out: vars(model).__setitem__("kept", out))
    last.register_forward_hook(lambda module, inputs, out: out + model.kept)
    try:
        InferenceEngine(model, layout="pp=2")
    except (ConfigError, LayoutError) as error:
        return str(error)
    return "accepted"


def run_world(world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {case: served(*case) for case in CASES[world]}
    return found | ({"crossing": crossing()} if world == 2 else {})


@pytest.mark.parametrize("world", CASES)
def test_tokens_are_those_of_their_own_generate(world: int) -> None:
    ranks = run_ranks(run_world, world, world, timeout=300)
    for name, layout in CASES[world]:
        model, wanted = model_of(name), []
        for prompt in PROMPTS:
            row = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
            wanted.append(row[0, len(prompt) :].tolist())
        assert len({token for row in wanted for token in row}) > 5
        for found in ranks:
            assert found[name, layout] == [wanted] * 4, (name, layout)
    if world == 2:
        for found in ranks:  # on every rank, though one of them has no such cut
            assert "[1, 61, 32] of model.layers.0, [1, 61, 32] of model.layers.1 crosses a cut" in found["crossing"]
