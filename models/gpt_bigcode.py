"""GPT-BigCode (SantaCoder: arXiv 2301.03988, StarCoder: arXiv 2305.06161): variants, module, checkpoint keys.

A GPT-2 whose heads may all read one key and value head (multi-query, arXiv 1911.02150). Single-device code; the
embeddings, norms, attention, feed-forward and head have their tensor-parallel twins in `fms_parallel.modules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Placement

from fms_parallel.checkpoint.adapter import Adapter, Drop, GroupQKV, Rename, Step, Tied
from fms_parallel.checkpoint.reshape import Grid, Reversed
from fms_parallel.errors import ConfigError
from fms_parallel.modules.added_embedding import AddedEmbedding
from fms_parallel.modules.attention import Attention, AttentionShape
from fms_parallel.modules.blocks import Blocks
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.embedding import Embedding, Head
from fms_parallel.modules.feedforward import FeedForward
from fms_parallel.modules.norm import LayerNorm
from fms_parallel.modules.sequences import Sequences
from fms_parallel.modules.tp import TPModule
from fms_parallel.shape import ModelShape

from .causal import CausalModel
from .hf.config import HFFields, hf_activation
from .registry import Architecture, register_model
from .sized import Sized


@dataclass(frozen=True)
class GPTBigCodeConfig(Sized):
    """Sizes and switches of one GPT-BigCode.

    Attributes:
        vocab_size: V. width: E. layers: L. heads: H.
        multi_query: one key and value head for all H, instead of H of them.
        ffn_width: F (None: 4 E). max_positions: rows of the table of positions.
        activation: of the feed-forward. tied: the head is the embedding. norm_eps: of every norm.
        scale_scores: divide attention scores by sqrt(D).
        dropout: on what each half of a block adds to the residual. embedding_dropout, attention_dropout: on the sum of
            the embeddings, on the attention weights.
        fused: store query, key and value as one parameter; with multi_query and tp > 1 every rank then holds all of it.
        std: of the initial weights; matrices that write to the residual start at std / sqrt(2 L).
        bos_id, eos_id, pad_id: token ids, where the tokenizer has them. No token is special to the model.
    """

    vocab_size: int = 49152
    width: int = 2048
    layers: int = 24
    heads: int = 16
    multi_query: bool = True
    ffn_width: int | None = None
    max_positions: int = 2048
    activation: str = "gelu_pytorch_tanh"
    tied: bool = True
    norm_eps: float = 1e-5
    scale_scores: bool = True
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    fused: bool = False
    std: float = 0.02
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide by {self.heads} heads.")

    @property
    def k(self) -> int:
        """K: kv heads."""
        return 1 if self.multi_query else self.heads

    @property
    def d(self) -> int:
        """D: head width."""
        return self.width // self.heads

    @property
    def f(self) -> int:
        """F: feed-forward width."""
        return 4 * self.width if self.ffn_width is None else self.ffn_width

    def shape(self) -> ModelShape:
        """Sizes for the planner, the layout's validation and the metrics."""
        return ModelShape(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.k,
            head_width=self.d,
            ffn_width=self.f,
            vocab=self.vocab_size,
            max_positions=self.max_positions,
            gated=False,
            tied=self.tied,
            attention_bias=True,
            ffn_bias=True,
            learned_positions=True,
            norm_bias=True,
        )


class GPTBigCodeBlock(nn.Module):
    """x + attention(norm(x)), then + feed_forward(norm(.))."""

    def __init__(self, config: GPTBigCodeConfig, layer: int) -> None:
        super().__init__()
        out_std = config.std / sqrt(2 * config.layers)
        shape = AttentionShape(
            config.width,
            config.heads,
            config.k,
            config.d,
            qkv_bias=True,
            out_bias=True,
            fused=config.fused,
            scale=None if config.scale_scores else 1.0,
            dropout=config.attention_dropout,
            std=config.std,
            out_std=out_std,
        )
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(shape, layer)
        self.attention_dropout = Dropout(config.dropout, salt=2 * layer + 1)
        self.ffn_norm = LayerNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(
            config.width, config.f, config.activation, gated=False, bias=True, std=config.std, out_std=out_std
        )
        self.ffn_dropout = Dropout(config.dropout, salt=2 * layer + 2)

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), seq), seq)
        return x + self.ffn_dropout(self.feed_forward(self.ffn_norm(x)), seq)


class TPGPTBigCodeBlock(TPModule, GPTBigCodeBlock):
    """The same sum on this rank's tokens: with sp the residual stays `[T/tp, E]` from the embedding to the head.

        x [T/tp, E] -- norm --> attention: gather [T, E], H/tp heads, reduce-scatter --> + x [T/tp, E]
                    -- norm --> feed-forward: gather [T, E], F/tp, reduce-scatter    --> + x [T/tp, E]

    It holds no parameter of its own and changes nothing: norms, attention, feed-forward and dropout are twins.
    """

    def placements(self) -> dict[str, Placement]:
        return {}


class GPTBigCode(CausalModel):
    """Embedding of tokens plus that of positions, L blocks, norm, head."""

    def __init__(self, config: GPTBigCodeConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, config.std)
        self.position_embedding = AddedEmbedding(config.max_positions, config.width, config.std)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.layers = Blocks(GPTBigCodeBlock(config, layer) for layer in range(config.layers))
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.head = Head(config.vocab_size, config.width, config.std)
        if config.tied:
            self.head.weight = self.embedding.weight

    def sequences(self, batch: int, length: int, positions: Tensor, first_position: int = 0, **more: Any) -> Sequences:
        """What every block is told; arguments as of `forward`."""
        self.end_of(length, first_position, more.get("context"))
        return Sequences(batch, length, positions=positions, **more)

    def enter(self, input_ids: Tensor, seq: Sequences) -> Tensor:
        """Ids `[B, S]` -> what the first block reads."""
        assert seq.positions is not None
        return self.embedding_dropout(self.position_embedding(self.embedding(input_ids), seq.positions, seq), seq)


# ---- variants ---------------------------------------------------------------------------------------------------

_DROPPED: dict[str, Any] = {"dropout": 0.1, "embedding_dropout": 0.1}
_STARCODER: dict[str, Any] = {
    **{"width": 6144, "layers": 40, "heads": 48, "max_positions": 8192, "activation": "gelu"},
    **{**_DROPPED, "attention_dropout": 0.1, "bos_id": 0, "eos_id": 0},
}

VARIANTS = {
    "micro": GPTBigCodeConfig(vocab_size=256, width=192, layers=5, heads=4, max_positions=1024, bos_id=2, eos_id=3),
    "santacoder": GPTBigCodeConfig(vocab_size=49280, **_DROPPED, bos_id=49152, eos_id=49152),
    "starcoder": GPTBigCodeConfig(**_STARCODER),
    "ibm.3b": GPTBigCodeConfig(width=3072, layers=32, heads=32, activation="gelu", bos_id=0, eos_id=0, pad_id=0),
    "ibm.13b": GPTBigCodeConfig(
        vocab_size=50304, width=5632, layers=40, heads=44, max_positions=8192, **_DROPPED, pad_id=50280
    ),
    "ibm.20b": GPTBigCodeConfig(
        width=6144, layers=52, heads=48, max_positions=8192, **_DROPPED, bos_id=0, eos_id=0, pad_id=0
    ),
}


# ---- Hugging Face keys and config -------------------------------------------------------------------------------

HF_NAMES = (
    ("transformer.wte.weight", "embedding.weight"),
    ("transformer.wpe.weight", "position_embedding.weight"),
    ("transformer.ln_f.{kind}", "norm.{kind}"),
    ("lm_head.weight", "head.weight"),
    ("transformer.h.{n}.ln_1.{kind}", "layers.{n}.attention_norm.{kind}"),
    ("transformer.h.{n}.ln_2.{kind}", "layers.{n}.ffn_norm.{kind}"),
    ("transformer.h.{n}.attn.c_attn.{kind}", "layers.{n}.attention.qkv.{kind}"),
    ("transformer.h.{n}.attn.c_proj.{kind}", "layers.{n}.attention.out.{kind}"),
    ("transformer.h.{n}.mlp.c_fc.{kind}", "layers.{n}.feed_forward.up.{kind}"),
    ("transformer.h.{n}.mlp.c_proj.{kind}", "layers.{n}.feed_forward.down.{kind}"),
)
"""Unlike GPT-2's, these matrices are `[out, in]` on both sides: nothing is transposed."""


def hf_adapter(config: GPTBigCodeConfig) -> Adapter:
    """Between Hugging Face's keys and ours.

    Rows of c_attn: with one kv head [q of all heads | k | v], with H of them [q k v] head by head. Both are our fused
    grouping by kv head, flat.
    """
    attention = "layers.{n}.attention."
    grouped = f"{attention}qkv.{{kind}}"
    steps: list[Step] = [
        Drop(("*.attn.bias", "*.attn.masked_bias", "transformer.bias")),  # causal masks of older files
        Rename(HF_NAMES),
        Grid((grouped,), (config.k, config.heads // config.k + 2, config.d)),
    ]
    if not config.fused:
        q, k, v = (f"{attention}{name}.{{kind}}" for name in ("query", "key", "value"))
        steps.append(Reversed(GroupQKV(q, k, v, grouped, config.heads, config.k, config.d)))
    if config.tied:
        steps.append(Tied("head.weight", "embedding.weight"))
    return Adapter("hf", tuple(steps))


_HF_FIELDS = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
}
_HF_DEFAULTS: dict[str, tuple[str, Any]] = {  # ours -> theirs, and what transformers takes when it is not written
    "multi_query": ("multi_query", True),
    "ffn_width": ("n_inner", None),
    "activation": ("activation_function", "gelu_pytorch_tanh"),
    "tied": ("tie_word_embeddings", True),
    "scale_scores": ("scale_attn_weights", True),
    "dropout": ("resid_pdrop", 0.1),
    "embedding_dropout": ("embd_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "std": ("initializer_range", 0.02),
}
_HF_SOFTMAX = ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
"""Softmax in fp32 is the only one we have."""

_HF_RUNNER = (
    *("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache"),
    *("validate_runner_input", "num_key_value_heads", "n_ctx", "summary_activation", "summary_first_dropout"),
    *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
)
"""Of an inference runner that BigCode once had, of GPT-2's other heads, or derived from other fields."""


def config_from_hf(raw: Mapping[str, Any]) -> GPTBigCodeConfig:
    """The config that a Hugging Face `config.json` of model type `gpt_bigcode` describes.

    Raises:
        ConfigError: another model type, a field that is missing, or one that is not supported.
    """
    if raw.get("model_type") != "gpt_bigcode":
        raise ConfigError(f"config.json is of model_type {raw.get('model_type')!r}, not 'gpt_bigcode'.")
    fields = HFFields(raw)
    config = GPTBigCodeConfig(
        **{ours: fields.take(theirs) for ours, theirs in _HF_FIELDS.items()},
        **{ours: fields.take(theirs, default) for ours, (theirs, default) in _HF_DEFAULTS.items()},
        bos_id=fields.token_id("bos_token_id"),
        eos_id=fields.token_id("eos_token_id"),
        pad_id=fields.token_id("pad_token_id"),
    )
    for name in _HF_SOFTMAX:
        if fields.take(name, True) is not True:
            raise ConfigError(f"config.json says {name}=false: softmax is computed in fp32 here. Remove the field.")
    for name in _HF_RUNNER:
        fields.take(name, None)
    fields.finish()
    return config


def config_to_hf(config: GPTBigCodeConfig) -> dict[str, Any]:
    """The `config.json` under which transformers computes what we compute."""
    return {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        **{theirs: getattr(config, ours) for ours, theirs in _HF_FIELDS.items()},
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _HF_DEFAULTS.items()},
        "activation_function": hf_activation(config.activation),
        **dict.fromkeys(_HF_SOFTMAX, True),
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


register_model(
    Architecture(
        name="gpt_bigcode",
        build=GPTBigCode,
        variants=VARIANTS,
        adapters={"hf": hf_adapter},
        from_hf=config_from_hf,
        to_hf=config_to_hf,
        hf_classes=("GPTBigCodeForCausalLM",),
    )
)
