"""Token embedding and language-model head, and their twins that cut the vocabulary.

    V = 7, tp = 2:   rank 0 holds rows 0..3, rank 1 rows 4..6; a look-up elsewhere gives zero, the sum the row

Every row is trained unless `padding_id` names one (a padding id of -1, which would freeze the last, is refused).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from fms_parallel.compat import assert_on_device
from fms_parallel.distributed.collectives import TokenRun, gather_last
from fms_parallel.errors import ConfigError
from fms_parallel.modules.initial import Fill, Init, Normal
from fms_parallel.modules.linear import Multiplies
from fms_parallel.modules.linear_types import refuse_quantised
from fms_parallel.modules.loss import VocabularyShard, linear_cross_entropy
from fms_parallel.modules.sequences import Sequences, Wanted
from fms_parallel.modules.tp import TPModule


class Embedding(nn.Module):
    """A row of `weight [V, E]` per token id.

    Attributes:
        padding_id: a token whose row is read but gets no gradient here (torch's `padding_idx`); None: all are trained.
        compute_dtype: dtype of what comes out, and so of all activations; None is the weight's own.
    """

    def __init__(self, vocab: int, width: int, std: float = 0.02, *, padding_id: int | None = None) -> None:
        super().__init__()
        if padding_id is not None and not 0 <= padding_id < vocab:
            raise ConfigError(f"padding id {padding_id} is none of {vocab} tokens: use None for no padding.")
        self.vocab, self.std, self.padding_id = vocab, std, padding_id
        self.compute_dtype: torch.dtype | None = None
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def initial(self) -> dict[str, Init]:
        """How own parameters start."""
        return {"weight": Normal(self.std)}

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, S]` -> `[B, S, E]`."""
        return F.embedding(ids, self.weight, self.padding_id).to(self.compute_dtype or self.weight.dtype)


class TPEmbedding(TPModule, Embedding):
    """Each rank holds a run of the vocabulary."""

    def placements(self) -> dict[str, Placement]:
        return {"weight": Shard(0)}

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, S]` -> `[B, S, E]`, or `[T/tp, E]` with sp.

        Raises:
            RuntimeError: an id that is no token: no rank would have its row, and their sum would be zero.
        """
        assert_on_device(((ids >= 0) & (ids < self.vocab)).all(), f"a token id is not in [0, {self.vocab}).")
        start, stop = self.axis.chunk(self.vocab)
        weight = self.shard(self.weight, self.weight)
        if start == stop:  # more ranks than rows: this one adds nothing, but its (empty) weight stays in the graph
            partial = weight.new_zeros(*ids.shape, weight.shape[-1]) + weight.sum()
        else:
            here = (ids >= start) & (ids < stop)
            mine = self.padding_id is not None and start <= self.padding_id < stop
            padding = self.padding_id - start if mine else None  # type: ignore[operator]
            rows = F.embedding((ids - start).where(here, 0), weight, padding)
            partial = rows * here.unsqueeze(-1).to(rows.dtype)
        return self.leave(partial.to(self.compute_dtype or partial.dtype))


class Head(Multiplies):
    """Logits of a token, or their cross-entropy. `weight [V, E]` may be the embedding's own parameter."""

    def __init__(self, vocab: int, width: int, std: float = 0.02, *, bias: bool = False) -> None:
        super().__init__()
        self.vocab, self.std = vocab, std
        self.weight = nn.Parameter(torch.empty(vocab, width))
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None

    def initial(self) -> dict[str, Init]:
        """How own parameters start."""
        return {"weight": Normal(self.std), "bias": Fill(0.0)}

    def forward(
        self, x: Tensor, seq: Sequences, labels: Tensor | None = None, last: int | Wanted | None = None
    ) -> Tensor:
        """Logits or loss of `x [B, S, E]`.

        Args:
            labels: `[B, S]`, the token wanted at each position, -100 for none.
            last: only the last so many positions, or those that it names.
        Returns:
            without labels the logits `[B, S or last, V]`; with labels the summed cross-entropy, a scalar.
        """
        return self.logits(x, seq, last) if labels is None else self.loss(x, labels, seq)

    def logits(self, x: Tensor, seq: Sequences, last: int | Wanted | None = None) -> Tensor:
        """`[B, S, E]` -> `[B, S, V]`."""
        return self.multiply("logits", positions_wanted(x, last))[0]

    def groups(self) -> dict[str, tuple[str, ...]]:
        """The head's own matrix."""
        return {"logits": ("",)}

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for a loss on `x`, which makes the logits chunk by chunk."""
        (weight,), (bias,) = self.matrices("logits", x)
        if isinstance(weight, Tensor):
            return weight, bias
        if torch.is_grad_enabled():
            refuse_quantised(self)
        return weight.dense(x.dtype), bias

    def loss(self, x: Tensor, labels: Tensor, seq: Sequences) -> Tensor:
        """Summed cross-entropy."""
        whole = VocabularyShard(None, 0, self.vocab)
        weight, bias = self.plain(x)
        return linear_cross_entropy(x.flatten(0, -2), weight, labels.flatten(), whole, bias)


def positions_wanted(x: Tensor, last: int | Wanted | None) -> Tensor:
    """Of `x [B, S, E]` the positions that `Head.forward` is asked for."""
    if isinstance(last, Wanted):
        return last.of(x)
    return x if last is None else x[:, -last:]


class TPHead(TPModule, Head):
    """Each rank holds a run of the vocabulary; logits stay cut up to the loss unless `loss_parallel` is off."""

    loss_parallel = True

    def placements(self) -> dict[str, Placement]:
        return {"weight": Shard(0), "bias": Shard(0)}

    def logits(self, x: Tensor, seq: Sequences, last: int | Wanted | None = None) -> Tensor:
        """The same logits on every rank, `[B, S, V]`; or of each its own run of the vocabulary, where so wanted."""
        x = positions_wanted(self.enter(x, seq.tokens).view(seq.batch, seq.length, -1), last)
        (logits,) = self.multiply("logits", x)
        whole = not isinstance(last, Wanted) or last.whole
        return gather_last(logits, self.axis, self.vocab) if whole else logits

    def piece(self, owner: str, parameter: Tensor, like: Tensor) -> Tensor:
        return self.shard(parameter, like)

    def loss(self, x: Tensor, labels: Tensor, seq: Sequences) -> Tensor:
        if not self.loss_parallel:
            logits = self.logits(x, seq).flatten(0, -2)
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(wide), labels.flatten(), reduction="sum")
        tokens = self.read(x, seq.tokens)
        tokens = tokens if isinstance(tokens, TokenRun) else tokens.flatten(0, -2)
        shard = VocabularyShard(self.axis, self.axis.chunk(self.vocab)[0], self.vocab)
        weight, bias = self.plain(x)
        return linear_cross_entropy(tokens, weight, labels.flatten(), shard, bias)
