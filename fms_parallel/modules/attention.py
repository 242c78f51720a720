"""Attention with any number of kv heads (MHA, GQA, MQA), and its tensor-parallel twin.

    H = 8 query heads, K = 2 kv heads, tp = 4: each kv head is copied to the tp / K = 2 ranks whose queries read it

    rank      0        1        2        3
    query    0 1      2 3      4 5      6 7
    key       0        0        1        1       gradients of a copied head are summed over its ranks

The score computation is torch's scaled_dot_product_attention on plain tensors (modules/scores.py), or goes through the
ranks that share a sequence (modules/context_attention.py); this file knows no cache layout and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.modules.context_attention import Rule, context_attention, dropped_context_attention
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.initial import Fill, Init, Normal
from fms_parallel.modules.linear import Input, Multiplies
from fms_parallel.modules.norm import rms_norm
from fms_parallel.modules.positions import rotate_both
from fms_parallel.modules.scores import dropped_scores, scores
from fms_parallel.modules.sequences import Sequences
from fms_parallel.modules.tp import TPModule


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and switches of one attention.

    Attributes:
        width: E. heads: H. kv_heads: K. head_width: D.
        qkv_bias, out_bias: biases of the input and the output matrices.
        fused: store query, key and value as one parameter `[K, H/K + 2, D, E]`, grouped by kv head.
        qk_norm_eps: RMSNorm over D on queries and keys when not None.
        scale: of the scores; None is 1 / sqrt(D).
        causal: without a mask a query attends to itself and what is before it; otherwise to everything.
        dropout: of the attention weights.
        std, out_std: of the initial weights.
    """

    width: int
    heads: int
    kv_heads: int
    head_width: int
    qkv_bias: bool = False
    out_bias: bool = False
    fused: bool = False
    qk_norm_eps: float | None = None
    scale: float | None = None
    causal: bool = True
    dropout: float = 0.0
    std: float = 0.02
    out_std: float = 0.02

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} heads do not divide by {self.kv_heads} kv heads.")

    @property
    def group(self) -> int:
        """Query heads that read one kv head: H / K."""
        return self.heads // self.kv_heads


class Attention(Multiplies):
    """softmax(q k^T * scale) v between two linear maps (arXiv 1706.03762; GQA: arXiv 2305.13245)."""

    def __init__(self, shape: AttentionShape, layer: int = 0) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        q, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        if shape.fused:
            self.qkv = FusedQKV(shape)
        else:
            self.query = nn.Linear(shape.width, q, bias=shape.qkv_bias)
            self.key = nn.Linear(shape.width, kv, bias=shape.qkv_bias)
            self.value = nn.Linear(shape.width, kv, bias=shape.qkv_bias)
        if shape.qk_norm_eps is not None:
            self.query_norm = nn.Parameter(torch.empty(shape.head_width))
            self.key_norm = nn.Parameter(torch.empty(shape.head_width))
        self.out = nn.Linear(q, shape.width, bias=shape.out_bias)
        self.score_dropout = Dropout(shape.dropout, salt=~layer)  # negative: blocks use the others

    def initial(self) -> dict[str, Init]:
        """How the parameters below start."""
        normal, zero = Normal(self.shape.std), Fill(0.0)
        names = ("qkv",) if self.shape.fused else ("query", "key", "value")
        weights = {f"{name}.weight": normal for name in names} | {"out.weight": Normal(self.shape.out_std)}
        biases = {f"{name}.bias": zero for name in (*names, "out")}
        return {**weights, **biases, "query_norm": Fill(1.0), "key_norm": Fill(1.0)}

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        return self.multiply("output", self.attend(x, seq))[0]

    def groups(self) -> dict[str, tuple[str, ...]]:
        """What reads the tokens, and what reads the heads."""
        return {"input": ("qkv",) if self.shape.fused else ("query", "key", "value"), "output": ("out",)}

    def attend(self, x: Input, seq: Sequences) -> Tensor:
        """`[..., E]` -> the heads' outputs side by side, `[B, S, (this rank's heads) * D]`."""
        q, k, v = self.project(x, seq)
        if self.shape.qk_norm_eps is not None:
            q = rms_norm(q, self.head_parameter(self.query_norm, q), self.shape.qk_norm_eps)
            k = rms_norm(k, self.head_parameter(self.key_norm, k), self.shape.qk_norm_eps)
        if seq.rope is not None:
            q, k = rotate_both(q, k, *seq.rope)
        if (rows := seq.ragged) is not None:
            return rows.attend(self.layer, q, k, v, self.shape.scale, seq.window).flatten(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if seq.cache is not None:
            k, v = seq.cache.append(self.layer, k, v)  # type: ignore[union-attr]
        return self.mix(q.transpose(1, 2), k, v, seq).transpose(1, 2).flatten(2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequences) -> Tensor:
        """`q [B, h, S, D]`, `k, v [B, k, T, D]` -> `[B, h, S, D]`."""
        rule, context = Rule(seq.mask, self.shape.scale, self.shape.causal), seq.context
        if not self.score_dropout.active:
            return scores(q, k, v, *rule) if context is None else context_attention(q, k, v, context, rule)
        keys = k.shape[2] if context is None else context.length
        factors = self.score_dropout.factors(q.shape[1], self.first_head(), keys, seq, q)
        if context is None:
            return dropped_scores(q, k, v, *rule, factors)
        return dropped_context_attention(q, k, v, context, rule, factors)

    def first_head(self) -> int:
        """Index of the first query head held here."""
        return 0

    def project(self, x: Input, seq: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., E]` -> q `[B, S, h, D]`, k and v `[B, S, k, D]` for the h query and k kv heads held here."""
        split = self.split_fused if self.shape.fused else self.split_apart
        return split(self.multiply("input", x), seq)

    def split_apart(self, projected: tuple[Tensor, ...], seq: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Three results -> heads."""
        q, k, v = (y.view(seq.batch, seq.length, -1, self.shape.head_width) for y in projected)
        return q, k, v

    def split_fused(self, projected: tuple[Tensor, ...], seq: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """One result, grouped by kv head -> heads."""
        group = self.group_held()
        grouped = projected[0].view(seq.batch, seq.length, -1, group + 2, self.shape.head_width)
        return grouped[..., :group, :].flatten(2, 3), grouped[..., group, :], grouped[..., group + 1, :]

    def group_held(self) -> int:
        """Query heads held here per kv head held here."""
        return self.shape.group

    def head_parameter(self, parameter: Tensor, like: Tensor) -> Tensor:
        """A parameter that every head uses."""
        return parameter.to(like.dtype)


class FusedQKV(nn.Module):
    """Query, key and value in one parameter, grouped so that cutting dim 0 cuts whole groups.

    group g: [ q_0 .. q_{H/K-1} | k | v ], each D rows of width E
    """

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        grouped = (shape.kv_heads, shape.group + 2, shape.head_width)
        self.weight = nn.Parameter(torch.empty(*grouped, shape.width))
        self.bias = nn.Parameter(torch.empty(*grouped)) if shape.qkv_bias else None


class TPAttention(TPModule, Attention):
    """Each rank holds H/tp query heads and the kv heads they read; the output matrix is cut along its input.

    When K < tp, key and value parameters are stored whole on every rank and each uses the one head it needs; the
    gradient, a partial sum, is added over the axis.
    """

    bias_after = frozenset(("output",))

    def placements(self) -> dict[str, Placement]:
        kv: Placement = Replicate() if self.kv_copied else Shard(0)
        names: dict[str, Placement] = {"query": Shard(0), "key": kv, "value": kv, "qkv": kv}
        cut = {f"{name}.{kind}": placement for name, placement in names.items() for kind in ("weight", "bias")}
        # A row-parallel bias is added once, after the sum, so every rank holds it.
        whole = dict.fromkeys(("out.bias", "query_norm", "key_norm"), Replicate())
        return cut | whole | {"out.weight": Shard(1)}

    @property
    def kv_copied(self) -> bool:
        """Whether there are fewer kv heads than ranks."""
        return self.shape.kv_heads < self.axis.size

    def adopted(self) -> None:
        heads, kv, tp = self.shape.heads, self.shape.kv_heads, self.axis.size
        if heads % tp or (kv % tp and tp % kv):
            raise LayoutError(
                f"tp={tp} cannot cut {heads} heads with {kv} kv heads: tp must divide the heads, and kv heads and tp "
                "one another."
            )

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]`, or `[T/tp, E]` with sp, in the same form back."""
        heads = self.attend(self.read(x, seq.tokens), seq)
        return self.leave(self.multiply("output", heads)[0], self.out.bias)

    def piece(self, owner: str, parameter: Tensor, like: Tensor) -> Tensor:
        """Own rows or columns; of copied kv heads the rows that are used here."""
        take = self._copied[owner] if self.kv_copied and owner in self._copied else self.shard
        return take(parameter, like)

    @property
    def _copied(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return {"key": self._copied_head, "value": self._copied_head, "qkv": self._group_piece}

    def _copied_head(self, parameter: Tensor, like: Tensor) -> Tensor:
        """The rows of the one kv head that this rank's queries read."""
        head = self.axis.rank * self.shape.kv_heads // self.axis.size
        rows = self.shape.head_width
        return self.summed(parameter, like)[head * rows : (head + 1) * rows]

    def _group_piece(self, parameter: Tensor, like: Tensor) -> Tensor:
        """This rank's query heads of its group, with the group's key and value: `[1, H/tp + 2, D, ...]`."""
        whole, held = self.summed(parameter, like), self.group_held()
        group, place = divmod(self.axis.rank, self.axis.size // self.shape.kv_heads)
        return torch.cat([whole[group, place * held : (place + 1) * held], whole[group, -2:]]).unsqueeze(0)

    def first_head(self) -> int:
        return self.axis.rank * self.shape.heads // self.axis.size

    def group_held(self) -> int:
        return self.shape.heads // self.axis.size if self.kv_copied else self.shape.group

    def head_parameter(self, parameter: Tensor, like: Tensor) -> Tensor:
        return self.summed(parameter, like)
