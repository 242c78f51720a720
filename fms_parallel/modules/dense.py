"""Small matrices behind the blocks, and their twins: one that nobody cuts, and a classifier of whole sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from fms_parallel.distributed.collectives import reduce_out
from fms_parallel.errors import ConfigError, unknown
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.feedforward import ACTIVATIONS
from fms_parallel.modules.initial import Fill, Init, Normal
from fms_parallel.modules.sequences import Sequences
from fms_parallel.modules.tp import TPModule


class Dense(nn.Module):
    """act(x W^T + b), for a matrix that is too small to cut.

    Args:
        width, out_width: of x and of the result. activation: one of `ACTIVATIONS`. std: of the initial weight.
    """

    def __init__(self, width: int, out_width: int, activation: str = "linear", std: float = 0.02) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(unknown("activation", activation, ACTIVATIONS))
        self.activation, self.std = activation, std
        self.weight = nn.Parameter(torch.empty(out_width, width))
        self.bias = nn.Parameter(torch.empty(out_width))

    def initial(self) -> dict[str, Init]:
        """How own parameters start."""
        return {"weight": Normal(self.std), "bias": Fill(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` -> `[..., out_width]`."""
        return ACTIVATIONS[self.activation](F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))


class TPDense(TPModule, Dense):
    """Every rank holds the matrix; with sp it multiplies its own tokens, and gradients are summed over the axis."""

    def placements(self) -> dict[str, Placement]:
        return {"weight": Replicate(), "bias": Replicate()}

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.whole(self.weight, x), self.whole(self.bias, x)
        return ACTIVATIONS[self.activation](F.linear(x, weight, bias))


class Drops(NamedTuple):
    """Dropout in front of each of a classifier's two matrices."""

    first: float
    second: float


class SequenceClassifier(nn.Module):
    """out(tanh(dense(first token))): a class for each sequence.

    Args:
        width: E. classes: C. drops: see `Drops`. salt: of the first dropout; the second has the next one.
        std: of the initial weights.
    """

    def __init__(self, width: int, classes: int, drops: Drops, salt: int, std: float = 0.02) -> None:
        super().__init__()
        self.width, self.std = width, std
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, classes)
        self.dense_dropout = Dropout(drops.first, salt)
        self.out_dropout = Dropout(drops.second, salt + 1)

    def initial(self) -> dict[str, Init]:
        """How the parameters below start."""
        weights: dict[str, Init] = {f"{name}.weight": Normal(self.std) for name in ("dense", "out")}
        return weights | {f"{name}.bias": Fill(0.0) for name in ("dense", "out")}

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` -> logits `[B, C]`."""
        first = self.dense_dropout.first_tokens(x[:, 0], seq)
        hidden = torch.tanh(F.linear(first, self.dense.weight.to(x.dtype), self.dense.bias.to(x.dtype)))
        hidden = self.out_dropout.first_tokens(hidden, seq)
        return F.linear(hidden, self.out.weight.to(x.dtype), self.out.bias.to(x.dtype))


class TPSequenceClassifier(TPModule, SequenceClassifier):
    """Each rank holds E/tp of the hidden features: `dense` is cut along its output, `out` along its input."""

    def placements(self) -> dict[str, Placement]:
        cut: dict[str, Placement] = {"dense.weight": Shard(0), "dense.bias": Shard(0), "out.weight": Shard(1)}
        return cut | {"out.bias": Replicate()}

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]`, or `[T/tp, E]` with sp -> logits `[B, C]`, the same on every rank."""
        x = self.enter(x, seq.tokens).view(seq.batch, seq.length, -1)
        first = self.dense_dropout.first_tokens(x[:, 0], seq)
        hidden = torch.tanh(F.linear(first, self.shard(self.dense.weight, x), self.shard(self.dense.bias, x)))
        hidden = self.out_dropout.first_tokens(hidden, seq, first_column=self.axis.chunk(self.width)[0])
        logits = reduce_out(F.linear(hidden, self.shard(self.out.weight, x)), self.axis)
        return logits + self.shard(self.out.bias, x)  # every rank adds it to the same logits: its gradient is whole
