"""The engine's tokens against transformers' `generate`: four families, greedy and beams, ours and theirs, fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.inference import InferenceEngine, PromptLookup
from fms_parallel.inference.transformers_stages import spread
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model

transformers = pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")

PROMPTS = [[5, 9, 2, 7, 11, 3], [8, 1], [4], [30, 31, 30, 31, 30]]
TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **{"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.4},
    **{"max_position_embeddings": 64, "tie_word_embeddings": False},
}
GATED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
BIGCODE: dict[str, Any] = {
    **{"vocab_size": 37, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GATED),
    "gpt_bigcode": ("GPTBigCode", BIGCODE),
    "qwen3": ("Qwen3", GATED | {"head_dim": 8}),
    "mistral": ("Mistral", GATED | {"sliding_window": 7, "head_dim": 8}),
}
WAYS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "two, in chunks": {"max_batch_size": 2, "max_step_tokens": 4},
    "manager": {"cache": "manager"},
    "internal": {"cache": "internal"},
    "none": {"cache": "none"},
    "prompt lookup": {"speculative": PromptLookup(4)},
}
NEW = 20


@pytest.fixture(scope="module", params=list(FAMILIES))
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Theirs, and ours read from its folder."""
    name, sizes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **TOKENS)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    folder = Path(tmp_path_factory.mktemp(request.param))
    theirs.save_pretrained(folder)
    return theirs, get_model("hf_pretrained", model_path=folder, data_type="fp64")


def their_tokens(theirs: Any, prompt: list[int], **options: Any) -> list[int]:
    found = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, **options)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_theirs(both: tuple[Any, Any], way: str) -> None:
    theirs, ours = both
    options: dict[str, Any] = {"block_size": 4} if "cache" not in WAYS[way] else {}
    with InferenceEngine(ours, **options, **WAYS[way]) as engine:
        found = [list(one.tokens) for one in engine.generate(PROMPTS, max_new_tokens=NEW)]
    assert found == [their_tokens(theirs, prompt) for prompt in PROMPTS]
    assert len({token for row in found for token in row}) > 5


def test_repetition_penalty_gives_their_tokens(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    with InferenceEngine(ours) as engine:
        found = [list(one.tokens) for one in engine.generate(PROMPTS, max_new_tokens=NEW, repetition_penalty=1.5)]
    assert found == [their_tokens(theirs, prompt, repetition_penalty=1.5) for prompt in PROMPTS]


@pytest.mark.parametrize("cache", ["paged", "manager", "none"])
@pytest.mark.parametrize(
    "rules", [(4, 1.0, False), (3, 0.0, True), (2, 2.0, False), (5, -1.0, False)], ids=["4", "early", "long", "short"]
)
def test_beams_are_theirs(both: tuple[Any, Any], rules: tuple[int, float, bool], cache: str) -> None:
    theirs, ours = both
    beams, penalty, early = rules
    with InferenceEngine(ours, cache=cache) as engine:
        for prompt in PROMPTS[:2]:
            eos = their_tokens(theirs, prompt)[6]
            options: dict[str, Any] = {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
            wanted = theirs.generate(
                torch.tensor([prompt]),
                **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "num_return_sequences": beams},
                **{"output_scores": True, "return_dict_in_generate": True},
                **options,
            )
            found = engine.beam_search(
                prompt,
                **{"beams": beams, "max_new_tokens": NEW, "length_penalty": penalty, "early_stopping": early},
                **{"eos_id": eos, "returned": beams},
            )
            rows = [row[len(prompt) :].tolist() for row in wanted.sequences]
            rows = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
            assert [list(one.tokens) for one in found] == rows
            assert [one.score for one in found] == pytest.approx(wanted.sequences_scores.tolist(), rel=1e-6)  # fp32
        assert engine.memory_report().used == 0


# ---- their own modules, our cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["two, in chunks", "manager", "prompt lookup"])
def test_their_modules_give_their_tokens_in_the_engine(both: tuple[Any, Any], way: str) -> None:
    theirs, _ = both
    if not theirs._supports_attention_backend:  # GPT-BigCode before transformers 5
        with pytest.raises(ConfigError, match="cannot be replaced"):
            InferenceEngine(theirs, **WAYS[way])
        return
    before = theirs.config._attn_implementation
    with InferenceEngine(theirs, **WAYS[way]) as engine:
        found = [list(one.tokens) for one in engine.generate(PROMPTS, max_new_tokens=NEW)]
        assert engine.memory_report().weights == sum(p.numel() for p in theirs.parameters()) * 8
    assert found == [their_tokens(theirs, prompt) for prompt in PROMPTS]
    assert theirs.config._attn_implementation == before
    assert not any("fms_rows" in vars(module) for module in theirs.modules())


def test_ours_behind_their_words_is_ours_again(both: tuple[Any, Any]) -> None:
    from fms_parallel.models.hf.api import to_hf_api

    _, ours = both
    assert InferenceEngine(to_hf_api(ours)).model is ours


def other_model(name: str, sizes: dict[str, Any]) -> Any:
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**sizes, **TOKENS)
    ).double()


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("Gemma2", GATED | {"head_dim": 8}, "softcap"),
        ("Bloom", {"vocab_size": 37, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "cannot be replaced"),
        ("Mamba", {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2}, "linear_attention|cannot be replaced"),
    ],
)
def test_models_whose_attention_is_another_are_refused(name: str, sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        InferenceEngine(other_model(name, sizes), max_seq_len=32)


def test_a_model_that_mixes_tokens_elsewhere_is_refused() -> None:
    theirs = other_model("Llama", GATED)
    theirs.model.layers[0].mlp.register_forward_hook(lambda module, inputs, x: x + 0.1 * x.roll(1, 1))
    with pytest.raises(ConfigError, match=r"mixes tokens elsewhere than in attention"):
        InferenceEngine(theirs)
    assert theirs.training  # as it was found


def test_layouts_of_their_modules_are_refused_but_tp_and_pp() -> None:
    with pytest.raises(LayoutError, match="over tp and pp only"):
        spread(other_model("Llama", GATED), ParallelLayout(fsdp=2))
