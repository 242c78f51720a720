"""Tiny random models of many architectures, each as transformers has it, to compare layouts with one process.

The table in `docs/any_model.md` and the tests are made from this list. It knows transformers' names; everything is
drawn from a seed, nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError, unknown

VOCABULARY, LENGTH = 96, 12
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_WIDE = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48},
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 64, **_IDS},
}
_UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_GPT = {
    **{"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, **_IDS},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
_ENCODER_DECODER = {"decoder_start_token_id": 1, "vocab_size": VOCABULARY, **_IDS}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config, model: class names of transformers. fields: of the config. kind: of its batches, `text`, `spoken`,
            `picture` or `translated`. exact: it computes in the precision it is given; some cast to fp32 inside.
        plan: transformers has a tensor plan that is complete for it.
    """

    config: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    kind: str = "text"
    exact: bool = True
    plan: bool = False


FAMILIES = {
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", _GPT),
    "gpt_neo": Family(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            **{"hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 48, "window_size": 4},
            **{"attention_types": [[["global", "local"], 2]], "vocab_size": VOCABULARY, "max_position_embeddings": 64},
            **{"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, **_IDS},
        },
        exact=False,
    ),
    "gptj": Family("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}, exact=False),
    "bert": Family("BertConfig", "BertForMaskedLM", {**_WIDE, **_UNDROPPED}),
    "electra": Family("ElectraConfig", "ElectraForMaskedLM", {**_WIDE, **_UNDROPPED, "embedding_size": 16}),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        {
            **{"hidden_size": 32, "num_hidden_layers": 4, "ffn_dim": 48, "num_attention_heads": 4, "dropout": 0.0},
            **{"vocab_size": VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_IDS},
        },
    ),
    "llama": Family("LlamaConfig", "LlamaForCausalLM", _GROUPED, plan=True),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}, plan=True),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}, plan=True),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 5}, plan=True),
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 4, "output_router_logits": True, "experts_implementation": "eager"},
        exact=False,
    ),
    "whisper": Family(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "max_source_positions": 12},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48},
            **{"decoder_ffn_dim": 48, "max_target_positions": 32, "dropout": 0.0, **_ENCODER_DECODER},
        },
        kind="spoken",
    ),
    "vit": Family(
        "ViTConfig",
        "ViTForImageClassification",
        {
            **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48},
            **{"image_size": 16, "patch_size": 4, "num_labels": 5, **_UNDROPPED},
        },
        kind="picture",
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
            **{"dropout_rate": 0.0, **_ENCODER_DECODER, "decoder_start_token_id": 0},
        },
        kind="translated",
        exact=False,
    ),
}
"""Name -> what it is."""


def two_blocks(name: str) -> dict[str, Any]:
    """Config fields that leave two blocks of each list, for layouts without stages."""
    found: dict[str, Any] = {key: 2 for key in ("n_layer", "num_layers", "num_hidden_layers") if key in _fields(name)}
    if name == "gpt_neo":
        found["attention_types"] = [[["global", "local"], 1]]
    return found


def _fields(name: str) -> dict[str, Any]:
    if name not in FAMILIES:
        raise ConfigError(unknown("architecture", name, FAMILIES))
    return FAMILIES[name].fields


def tiny_config(name: str, **fields: Any) -> Any:
    """A tiny transformers config of an architecture.

    Raises:
        ConfigError: an unknown name, or transformers is not installed.
    """
    fields = {**_fields(name), **fields}
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers models need transformers: pip install 'fms_parallel[hf]'.") from None
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**fields)
    config.architectures = [family.model]
    return config


def tiny_model(name: str, seed: int = 0, **fields: Any) -> nn.Module:
    """A tiny random model none of whose parameters is constant: zero biases and unit norms hide mistakes."""
    config = tiny_config(name, **fields)
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, FAMILIES[name].model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tiny_batch(name: str, rows: int = 4, seed: int = 1, length: int = LENGTH) -> dict[str, Tensor]:
    """A random batch with labels: some do not count, and rows of text are of unequal length."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=generator)

    kind = FAMILIES[name].kind
    if kind == "picture":
        labels = torch.randint(0, 5, (rows,), generator=generator)
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator), "labels": labels}
    labels = numbers(rows, length)
    if kind == "spoken":
        labels[0, -3:] = -100
        return {"input_features": torch.randn(rows, 8, 24, generator=generator), "labels": labels}
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, -3:] = 0
    mask[-1, -1:] = 0
    labels = labels.masked_fill(mask == 0, -100)
    return {"input_ids": numbers(rows, length), "attention_mask": mask, "labels": labels}
