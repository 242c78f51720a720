"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783) and the models built like it: variants, module, checkpoint keys.

Single-device code. Every block of parameters below (embedding, norms, attention, feed-forward, head) carries its
tensor-parallel twin in `fms_parallel.modules`; the block's twin at the end of this page says where tokens are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement

from fms_parallel.checkpoint.adapter import Adapter, Drop, GroupQKV, Rename, Stack, Step, Tied
from fms_parallel.errors import ConfigError
from fms_parallel.modules.attention import Attention, AttentionShape
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.embedding import Embedding, Head
from fms_parallel.modules.feedforward import FeedForward
from fms_parallel.modules.norm import RMSNorm
from fms_parallel.modules.positions import Rotary
from fms_parallel.modules.sequences import DropoutKey, KVStore, Sequences
from fms_parallel.modules.tp import TPModule
from fms_parallel.shape import ModelShape

from .hf.config import HFFields
from .llama_meta import config_from_meta, config_to_meta, meta_adapter, meta_files
from .registry import Architecture, register_model


@dataclass(frozen=True)
class LLaMAConfig:
    """Sizes and switches of one LLaMA.

    Attributes:
        vocab_size: V. width: E. layers: L. heads: H. kv_heads: K (None: as many as heads). head_width: D (None: E / H).
        ffn_width: F. max_positions: longest sequence. activation: of the gate.
        tied: the head is the embedding. attention_bias, ffn_bias: biases on every matrix of that kind.
        qk_norm: normalise queries and keys. norm_eps: of every norm.
        rope_base: theta. rope_scaling: kind of `modules.positions.SCALINGS`; rope_options: its numbers.
        rope_original: positions the unscaled model was made for (None: max_positions). rope_partial: part of D rotated.
        dropout: on the embedding and on what each half of a block adds to the residual.
        fused: store query/key/value as one parameter, and gate/up as one.
        std: of the initial weights; matrices that write to the residual start at std / sqrt(2 L).
        bos_id, eos_id, pad_id: token ids, where the tokenizer has them.
    """

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None
    head_width: int | None = None
    ffn_width: int = 11008
    max_positions: int = 4096
    activation: str = "silu"
    tied: bool = False
    attention_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: str = "default"
    rope_options: Mapping[str, Any] = field(default_factory=dict)
    rope_original: int | None = None
    rope_partial: float = 1.0
    dropout: float = 0.0
    fused: bool = False
    std: float = 0.02
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.head_width is None and self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide by {self.heads} heads: set head_width.")
        if self.heads % self.k:
            raise ConfigError(f"{self.heads} heads do not divide by {self.k} kv heads.")

    @property
    def k(self) -> int:
        """K: kv heads."""
        return self.kv_heads or self.heads

    @property
    def d(self) -> int:
        """D: head width."""
        return self.head_width or self.width // self.heads

    @property
    def rotary(self) -> Rotary:
        """The rotary positions that these fields describe."""
        original = self.rope_original or self.max_positions
        return Rotary(self.d, self.rope_base, self.rope_partial, original, self.rope_scaling, self.rope_options)

    def shape(self) -> ModelShape:
        """Sizes for the planner, the layout's validation and the metrics."""
        return ModelShape(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.k,
            head_width=self.d,
            ffn_width=self.ffn_width,
            vocab=self.vocab_size,
            max_positions=self.max_positions,
            tied=self.tied,
            attention_bias=self.attention_bias,
            ffn_bias=self.ffn_bias,
            qk_norm=self.qk_norm,
        )

    def parameters(self) -> int:
        """Unique parameters."""
        return self.shape().parameters()

    def flops_per_token(self, sequence: int) -> int:
        """Forward and backward, see `ModelShape.flops_per_token`."""
        return self.shape().flops_per_token(sequence)

    def activation_bytes(self, batch: int, sequence: int, **cut: Any) -> int:
        """Kept for the backward pass, see `ModelShape.activation_bytes`."""
        return self.shape().activation_bytes(batch, sequence, **cut)


class LLaMABlock(nn.Module):
    """x + attention(norm(x)), then + feed_forward(norm(.))."""

    def __init__(self, config: LLaMAConfig, layer: int) -> None:
        super().__init__()
        out_std = config.std / sqrt(2 * config.layers)
        shape = AttentionShape(
            config.width,
            config.heads,
            config.k,
            config.d,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            fused=config.fused,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            std=config.std,
            out_std=out_std,
        )
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(shape, layer)
        self.attention_dropout = Dropout(config.dropout, salt=2 * layer + 1)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(
            config.width,
            config.ffn_width,
            config.activation,
            bias=config.ffn_bias,
            fused=config.fused,
            std=config.std,
            out_std=out_std,
        )
        self.ffn_dropout = Dropout(config.dropout, salt=2 * layer + 2)

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), seq), seq)
        return x + self.ffn_dropout(self.feed_forward(self.ffn_norm(x)), seq)


class TPLLaMABlock(TPModule, LLaMABlock):
    """The same sum on this rank's tokens: with sp the residual stays `[T/tp, E]` from the embedding to the head.

        x [T/tp, E] -- norm --> attention: gather [T, E], H/tp heads, reduce-scatter --> + x [T/tp, E]
                    -- norm --> feed-forward: gather [T, E], F/tp, reduce-scatter    --> + x [T/tp, E]

    It holds no parameter of its own and changes nothing: norms, attention, feed-forward and dropout are twins.
    """

    def placements(self) -> dict[str, Placement]:
        return {}


class LLaMA(nn.Module):
    """Embedding, L blocks, norm, head."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = config.rotary
        self.embedding = Embedding(config.vocab_size, config.width, config.std)
        self.embedding_dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(LLaMABlock(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Head(config.vocab_size, config.width, config.std)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        first_position: int = 0,
        mask: Tensor | None = None,
        cache: KVStore | None = None,
        dropout: DropoutKey | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Logits, or the summed loss.

        Args:
            input_ids: `[B, S]`. labels: `[B, S]`, the token wanted *at* each position (already shifted), -100 for none.
            positions: `[B, S]` when rows differ; otherwise they are first_position .. first_position + S.
            mask: bool `[B, 1, S, T]`, True where a query may attend; None is causal. cache: earlier keys and values.
            dropout: names this forward's random bits; needed in training when the config drops anything.
            last: only the logits of the last so many positions.
        Returns:
            logits `[B, S or last, V]`, or with labels the cross-entropy summed over tokens, in fp32.
        Raises:
            ConfigError: more positions than `max_positions`.
        """
        batch, length = input_ids.shape
        if positions is None:
            positions = torch.arange(first_position, first_position + length, device=input_ids.device)
        seq = self.sequences(batch, length, positions, first_position, mask=mask, cache=cache, dropout=dropout)
        x = self.enter(input_ids, seq)
        for block in self.layers:
            x = block(x, seq)
        return self.leave(x, seq, labels, last)

    # The parts of a forward, which a pipeline stage runs one by one.

    def sequences(self, batch: int, length: int, positions: Tensor, first_position: int = 0, **more: Any) -> Sequences:
        """What every block is told; arguments as of `forward`."""
        end = first_position + length
        if end > self.config.max_positions:
            raise ConfigError(f"position {end} is beyond max_positions={self.config.max_positions} of this model.")
        return Sequences(batch, length, self.rotary.tables(positions, end), **more)

    def enter(self, input_ids: Tensor, seq: Sequences) -> Tensor:
        """Ids `[B, S]` -> what the first block reads."""
        return self.embedding_dropout(self.embedding(input_ids), seq)

    def leave(self, x: Tensor, seq: Sequences, labels: Tensor | None = None, last: int | None = None) -> Tensor:
        """What the last block made -> logits or loss."""
        return self.head(self.norm(x), seq, labels, last)


# ---- variants ---------------------------------------------------------------------------------------------------

_LLAMA3 = LLaMAConfig(
    vocab_size=128256, kv_heads=8, ffn_width=14336, max_positions=8192, rope_base=500000.0, bos_id=128000, eos_id=128001
)
_ROPE31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA31 = replace(_LLAMA3, max_positions=131072, rope_scaling="llama3", rope_options=_ROPE31)
_LLAMA32 = replace(_LLAMA31, rope_options=_ROPE31 | {"factor": 32.0}, tied=True)
_13B: dict[str, Any] = {"width": 5120, "layers": 40, "heads": 40, "ffn_width": 13824}
_70B: dict[str, Any] = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ffn_width": 28672}
_GRANITE_CODE = LLaMAConfig(
    vocab_size=49152, attention_bias=True, ffn_bias=True, tied=True, dropout=0.1, bos_id=0, eos_id=0, pad_id=0
)

VARIANTS = {
    "micro": LLaMAConfig(
        vocab_size=256, width=192, layers=5, heads=4, ffn_width=512, max_positions=1024, bos_id=2, eos_id=3
    ),
    "7b": LLaMAConfig(),
    "13b": LLaMAConfig(**_13B),
    "70b": LLaMAConfig(**_70B),
    "2-7b": LLaMAConfig(),
    "2-13b": LLaMAConfig(**_13B),
    "2-70b": LLaMAConfig(**_70B),
    "3-8b": _LLAMA3,
    "3-70b": replace(_LLAMA3, **_70B),
    "3.1-8b": _LLAMA31,
    "3.1-70b": replace(_LLAMA31, **_70B),
    "3.1-405b": replace(_LLAMA31, width=16384, layers=126, heads=128, ffn_width=53248),
    "3.2-1b": replace(_LLAMA32, width=2048, layers=16, ffn_width=8192, head_width=64),
    "3.2-3b": replace(_LLAMA32, width=3072, layers=28, heads=24, ffn_width=8192, head_width=128),
    "3.3-70b": replace(_LLAMA31, **_70B),
    "granite-7b": LLaMAConfig(vocab_size=32008),
    "granite.code-3b": replace(_GRANITE_CODE, width=2560, ffn_width=10240, max_positions=2048),
    "granite.code-8b": replace(_GRANITE_CODE, layers=36, kv_heads=8, ffn_width=14336),
}


# ---- Hugging Face keys and config -------------------------------------------------------------------------------

HF_NAMES = (
    ("model.embed_tokens.weight", "embedding.weight"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "head.weight"),
    ("model.layers.{n}.input_layernorm.weight", "layers.{n}.attention_norm.weight"),
    ("model.layers.{n}.post_attention_layernorm.weight", "layers.{n}.ffn_norm.weight"),
    ("model.layers.{n}.self_attn.q_proj.{kind}", "layers.{n}.attention.query.{kind}"),
    ("model.layers.{n}.self_attn.k_proj.{kind}", "layers.{n}.attention.key.{kind}"),
    ("model.layers.{n}.self_attn.v_proj.{kind}", "layers.{n}.attention.value.{kind}"),
    ("model.layers.{n}.self_attn.o_proj.{kind}", "layers.{n}.attention.out.{kind}"),
    ("model.layers.{n}.self_attn.q_norm.weight", "layers.{n}.attention.query_norm"),
    ("model.layers.{n}.self_attn.k_norm.weight", "layers.{n}.attention.key_norm"),
    ("model.layers.{n}.mlp.gate_proj.{kind}", "layers.{n}.feed_forward.gate.{kind}"),
    ("model.layers.{n}.mlp.up_proj.{kind}", "layers.{n}.feed_forward.up.{kind}"),
    ("model.layers.{n}.mlp.down_proj.{kind}", "layers.{n}.feed_forward.down.{kind}"),
)
"""Both keep rotary pairs half-split, so nothing is permuted."""


def hf_adapter(config: LLaMAConfig) -> Adapter:
    """Between Hugging Face's keys and ours."""
    return Adapter("hf", (Drop(("*.rotary_emb.inv_freq",)), Rename(HF_NAMES), *stored_form(config)))


def stored_form(config: LLaMAConfig, tied_once: bool = True) -> tuple[Step, ...]:
    """From separate tensors to those that the module holds; a format writes tied ones once, or under both names."""
    attention, ffn = "layers.{n}.attention.", "layers.{n}.feed_forward."
    steps: list[Step] = []
    if config.fused:
        q, k, v = (f"{attention}{name}.{{kind}}" for name in ("query", "key", "value"))
        steps.append(GroupQKV(q, k, v, f"{attention}qkv.{{kind}}", config.heads, config.k, config.d))
        steps.append(Stack((f"{ffn}gate.{{kind}}", f"{ffn}up.{{kind}}"), f"{ffn}gate_up.{{kind}}"))
    if config.tied:
        steps.append(Tied("head.weight", "embedding.weight", tied_once))
    return tuple(steps)


_HF_FIELDS = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
}


def config_from_hf(raw: Mapping[str, Any]) -> LLaMAConfig:
    """The config that a Hugging Face `config.json` of model type `llama` describes.

    Raises:
        ConfigError: another model type, a field that is missing, or one that is not supported.
    """
    if raw.get("model_type") != "llama":
        raise ConfigError(f"config.json is of model_type {raw.get('model_type')!r}, not 'llama'.")
    fields = HFFields(raw)
    rope = fields.rope()
    config = LLaMAConfig(
        **{ours: fields.take(theirs) for ours, theirs in _HF_FIELDS.items()},
        kv_heads=fields.take("num_key_value_heads", None),
        head_width=fields.take("head_dim", None),
        tied=fields.take("tie_word_embeddings", False),
        attention_bias=fields.take("attention_bias", False),
        ffn_bias=fields.take("mlp_bias", False),
        rope_base=rope.base,
        rope_scaling=rope.kind,
        rope_options=rope.options,
        rope_partial=rope.partial,
        std=fields.take("initializer_range", 0.02),
        bos_id=fields.token_id("bos_token_id"),
        eos_id=fields.token_id("eos_token_id"),
        pad_id=fields.token_id("pad_token_id"),
    )
    fields.finish()
    return config


def config_to_hf(config: LLaMAConfig) -> dict[str, Any]:
    """The `config.json` under which transformers computes what we compute; rotary positions in both spellings.

    Raises:
        ConfigError: a field that transformers' LLaMA cannot express.
    """
    inexpressible = {
        "qk_norm": config.qk_norm,
        "rope_scaling=ntk": config.rope_scaling == "ntk",
        "rope_original": config.rope_original not in (None, config.max_positions),
        "rope_partial": config.rope_partial != 1.0,
    }
    if words := [word for word, used in inexpressible.items() if used]:
        raise ConfigError(f"transformers' LLaMA has no {', '.join(words)}: save as native weights instead.")
    scaling = None if config.rope_scaling == "default" else {"rope_type": config.rope_scaling, **config.rope_options}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _HF_FIELDS.items()},
        "num_key_value_heads": config.k,
        "head_dim": config.d,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.ffn_bias,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_base, **(scaling or {"rope_type": "default"})},
        "initializer_range": config.std,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


register_model(
    Architecture(
        name="llama",
        build=LLaMA,
        variants=VARIANTS,
        adapters={"hf": hf_adapter, "meta": lambda config: meta_adapter(config, stored_form(config, tied_once=False))},
        files={"meta": meta_files},
        from_hf=config_from_hf,
        to_hf=config_to_hf,
        from_meta=config_from_meta,
        to_meta=config_to_meta,
    )
)
