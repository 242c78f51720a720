"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783) and the models built like it: variants, module, checkpoint keys.

Single-device code. Every block of parameters below (embedding, norms, attention, feed-forward, head) carries its
tensor-parallel twin in `fms_parallel.modules`; the block's twin at the end of this page says where tokens are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Placement

from fms_parallel.errors import ConfigError
from fms_parallel.modules.attention import Attention, AttentionShape
from fms_parallel.modules.blocks import Blocks
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.embedding import Embedding, Head
from fms_parallel.modules.feedforward import FeedForward
from fms_parallel.modules.norm import RMSNorm
from fms_parallel.modules.positions import Rotary
from fms_parallel.modules.sequences import Sequences
from fms_parallel.modules.tp import TPModule
from fms_parallel.shape import ModelShape

from .causal import CausalModel
from .hf.llama import BIASES, hf_adapter, read_fields, stored_form, written_fields
from .llama_meta import config_from_meta, config_to_meta, meta_adapter, meta_files
from .registry import Architecture, register_model
from .sized import Sized


@dataclass(frozen=True)
class LLaMAConfig(Sized):
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

    @property
    def out_std(self) -> float:
        """Of the initial weights that write to the residual."""
        return self.std / sqrt(2 * self.layers)

    def attention_shape(self) -> AttentionShape:
        """Sizes and switches of every block's attention."""
        return AttentionShape(
            self.width,
            self.heads,
            self.k,
            self.d,
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            fused=self.fused,
            qk_norm_eps=self.norm_eps if self.qk_norm else None,
            std=self.std,
            out_std=self.out_std,
        )


class LLaMABlock(nn.Module):
    """x + attention(norm(x)), then + feed_forward(norm(.))."""

    def __init__(self, config: LLaMAConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config.attention_shape(), layer)
        self.attention_dropout = Dropout(config.dropout, salt=2 * layer + 1)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = self.make_feed_forward(config)
        self.ffn_dropout = Dropout(config.dropout, salt=2 * layer + 2)

    def make_feed_forward(self, config: LLaMAConfig) -> nn.Module:
        """What turns `[B, S, E]` into what the block's second half adds."""
        return FeedForward(
            config.width,
            config.ffn_width,
            config.activation,
            bias=config.ffn_bias,
            fused=config.fused,
            std=config.std,
            out_std=config.out_std,
        )

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


class LLaMA(CausalModel):
    """Embedding, L blocks, norm, head."""

    block: type[LLaMABlock] = LLaMABlock

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = config.rotary
        self.embedding = Embedding(config.vocab_size, config.width, config.std)
        self.embedding_dropout = Dropout(config.dropout)
        self.layers = Blocks(self.block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Head(config.vocab_size, config.width, config.std)
        if config.tied:
            self.head.weight = self.embedding.weight

    def sequences(self, batch: int, length: int, positions: Tensor, first_position: int = 0, **more: Any) -> Sequences:
        """What every block is told; arguments as of `forward`."""
        end = self.end_of(length, first_position, more.get("context"))
        return Sequences(batch, length, self.rotary.tables(positions, end), **more)

    def enter(self, input_ids: Tensor, seq: Sequences) -> Tensor:
        """Ids `[B, S]` -> what the first block reads."""
        return self.embedding_dropout(self.embedding(input_ids), seq)


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

MICRO: dict[str, Any] = {
    **{"vocab_size": 256, "width": 192, "layers": 5, "heads": 4, "ffn_width": 512, "max_positions": 1024},
    **{"bos_id": 2, "eos_id": 3},
}
"""Small enough for any machine, with the token ids of the char tokenizer."""

VARIANTS = {
    "micro": LLaMAConfig(**MICRO),
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


# ---- checkpoints ------------------------------------------------------------------------------------------------


def config_from_hf(raw: Mapping[str, Any]) -> LLaMAConfig:
    """The config that a Hugging Face `config.json` of model type `llama` describes; errors of `read_fields`."""
    return LLaMAConfig(**read_fields(raw, "llama", BIASES))


def config_to_hf(config: LLaMAConfig) -> dict[str, Any]:
    """The `config.json` under which transformers computes what we compute; errors of `written_fields`."""
    return written_fields(config, "llama", "LlamaForCausalLM", BIASES)


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
