"""A feed-forward of several experts, of which every token visits a few, and its tensor-parallel twin.

    p = softmax(router x)        y = sum over the top experts e of  p_e / (their sum) * down_e(act(gate_e x) * up_e x)

(arXiv 1701.06538; without dropped tokens, as Mixtral: arXiv 2401.04088.) Tokens are sorted by expert and each expert
multiplies its own run of them. Under torch.compile, which cannot know how long the runs are, every expert sees every
token and what was not chosen counts zero: X / top times the work.

The twin cuts F of every expert, so each rank runs all experts on its part of F: no token is sent anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from fms_parallel.errors import ConfigError
from fms_parallel.modules.feedforward import ACTIVATIONS, gate
from fms_parallel.modules.initial import Init, Normal
from fms_parallel.modules.linear import Weight, linear, shared_linear
from fms_parallel.modules.tp import TPModule


class Experts(nn.Module):
    """X gated feed-forwards and the matrix that chooses among them.

    Args:
        width: E. hidden: F of one expert. count: X. top: experts that a token visits. activation: one of `ACTIVATIONS`.
        std, out_std: of the initial weights.

    Attributes:
        stacks: its parameters that are a matrix for each expert. stack_types: how those are stored that are not plain
            numbers (`modules/linear_types.py`).
    """

    stacks = ("gate", "up", "down")
    stack_types: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        width: int,
        hidden: int,
        count: int,
        top: int,
        activation: str = "silu",
        *,
        std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation {activation!r}: known are {', '.join(ACTIVATIONS)}.")
        if not 1 <= top <= count:
            raise ConfigError(f"a token cannot visit {top} of {count} experts.")
        self.count, self.top, self.activation = count, top, activation
        self.std, self.out_std = std, out_std
        self.router = nn.Parameter(torch.empty(count, width))
        self.gate = nn.Parameter(torch.empty(count, hidden, width))
        self.up = nn.Parameter(torch.empty(count, hidden, width))
        self.down = nn.Parameter(torch.empty(count, width, hidden))

    def initial(self) -> dict[str, Init]:
        """How own parameters start."""
        normal = Normal(self.std)
        return {"router": normal, "gate": normal, "up": normal, "down": Normal(self.out_std)}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., E]` -> `[..., E]`."""
        flat = x.flatten(0, -2)
        weights, chosen = self.route(flat)
        mix = self.mix_dense if torch.compiler.is_compiling() else self.mix_sorted
        return mix(flat, weights, chosen).view(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[T, E]` -> weights and indices of the experts of each token, `[T, top]` both; softmax in fp32 at least."""
        logits = F.linear(x, self.shared(self.router, x))
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights, chosen = logits.softmax(-1, dtype=wide).topk(self.top, dim=-1)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), chosen

    def mix_sorted(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on its own tokens, one after the other."""
        order = chosen.flatten().argsort(stable=True)  # places of [T, top], by expert
        token = order // self.top
        runs = x.index_select(0, token).split(chosen.flatten().bincount(minlength=self.count).tolist())
        gates, ups, downs = (self.each(name, x) for name in self.stacks)
        done = [self.one_expert(*expert) for expert in zip(runs, gates, ups, downs, strict=True)]
        weighted = torch.cat(done) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, weighted)

    def one_expert(self, x: Tensor, gate_weight: Weight, up_weight: Weight, down_weight: Weight) -> Tensor:
        """`[n, E]` -> `[n, E]` through one expert's matrices; n may be 0."""
        g, u = shared_linear(x, (gate_weight, up_weight), (None, None))
        return linear(gate(g, u, self.activation), down_weight)

    def mix_dense(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Every expert on every token."""
        gates, ups, downs = (self.dense(name, x) for name in self.stacks)
        share = torch.zeros(len(x), self.count, dtype=x.dtype, device=x.device).scatter(1, chosen, weights)
        hidden = gate(x @ gates.transpose(1, 2), x @ ups.transpose(1, 2), self.activation)  # [X, T, F]
        return ((hidden @ downs.transpose(1, 2)) * share.t().unsqueeze(-1)).sum(0)

    def each(self, name: str, like: Tensor) -> Sequence[Weight]:
        """A stack's matrices, one for each expert."""
        kind = self.stack_types.get(name)
        if kind is None:
            return self.cut(getattr(self, name), like).unbind(0)
        return [kind.weight(*one) for one in zip(*(part.unbind(0) for part in self._stored(name)), strict=True)]

    def dense(self, name: str, like: Tensor) -> Tensor:
        """A stack as plain numbers."""
        kind = self.stack_types.get(name)
        if kind is None:
            return self.cut(getattr(self, name), like)
        dense: Tensor = kind.dense(*self._stored(name), like.dtype)
        return dense

    def _stored(self, name: str) -> tuple[Tensor, Tensor]:
        """What is stored of a stack, in its own dtype: values and scales."""
        values, scale = getattr(self, name), getattr(self, f"{name}_scale")
        return self.cut(values, values), self.cut(scale, scale)

    def shared(self, parameter: Tensor, like: Tensor) -> Tensor:
        """A parameter that is whole here."""
        return parameter.to(like.dtype)

    def cut(self, parameter: Tensor, like: Tensor) -> Tensor:
        """The experts' matrices, as much of F as is held here."""
        return parameter.to(like.dtype)


class TPExperts(TPModule, Experts):
    """Each rank holds F/tp of every expert and the whole router.

    All ranks choose the same experts, from the same tokens. What a choice was worth each rank knows only of its part of
    F, so the router's gradient is a partial sum over the axis.
    """

    def placements(self) -> dict[str, Placement]:
        return {"router": Replicate(), "gate": Shard(1), "up": Shard(1), "down": Shard(2)}

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, E]`, or `[T/tp, E]` with sp, in the same form back."""
        return self.leave(Experts.forward(self, self.enter(x)))

    def shared(self, parameter: Tensor, like: Tensor) -> Tensor:
        return self.summed(parameter, like)

    def cut(self, parameter: Tensor, like: Tensor) -> Tensor:
        return self.shard(parameter, like)
