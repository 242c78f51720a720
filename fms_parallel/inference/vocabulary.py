"""`Vocabulary`: who holds which logits, and the small exchanges that choosing a token needs.

    tp = 2, V = 7    rank 0: logits of tokens 0..3    rank 1: of 4..6     what they exchange: maxima, sums, candidates

Without tp one rank holds all and nothing is sent: the same lines then work on one piece. It knows logits and ranks; it
knows no requests and no rules of sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms_parallel.distributed.collectives import Axis, all_gather, gather_last
from fms_parallel.modules.embedding import Head, TPHead


@dataclass(frozen=True)
class Vocabulary:
    """The run of tokens whose logits this rank has.

    Attributes:
        size: V. axis: the ranks that share them; None: this one has all. first: token of the first logit here.
    """

    size: int
    axis: Axis | None = None
    first: int = 0

    @classmethod
    def of(cls, model: nn.Module, size: int) -> Vocabulary:
        """As the model's head leaves its logits where they are not asked for whole."""
        heads = [module for module in model.modules() if isinstance(module, Head)]
        if len(heads) == 1 and isinstance(heads[0], TPHead):
            axis = heads[0].axis
            return cls(size, axis, axis.chunk(size)[0])
        return cls(size)

    def here(self, logits: Tensor) -> Tensor:
        """`[R, run]` -> the same with at least one column: a rank without tokens has one that nobody chooses."""
        return logits if logits.shape[-1] else F.pad(logits, (0, 1), value=-math.inf)

    def gather(self, x: Tensor) -> Tensor:
        """`[R, n]` of this rank -> `[ranks, R, n]`, in the order of the vocabulary. Collective."""
        return x.unsqueeze(0) if self.axis is None else all_gather(x.unsqueeze(0), self.axis)

    def whole(self, logits: Tensor) -> Tensor:
        """`[R, run]` -> `[R, V]` on every rank. Collective."""
        return logits if self.axis is None else gather_last(logits, self.axis, self.size)

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row of `x [R, run]` the largest logit and its token, the lowest where several have it: `[R]` each.

        NaN where a row has one. Collective.
        """
        values, tokens = self.here(x).max(-1)
        both = self.gather(torch.stack([values.double(), (tokens + self.first).double()], -1))
        if both.shape[0] == 1:
            return both[0, :, 0], both[0, :, 1].long()
        best, rank = both[..., 0].max(0)
        return best, both[..., 1].gather(0, rank.unsqueeze(0)).squeeze(0).long()

    def candidates(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of each row the `count` largest, `[R, min(count, V)]` fp64 and their tokens, in falling order.

        Equal ones come in the order of the vocabulary, in every layout. Collective.
        """
        values, tokens = _top(self.here(x), min(count, max(1, x.shape[-1])))
        both = torch.stack([values.double(), (tokens + self.first).double()], -1)
        if self.axis is not None:
            step = min(count, -(-self.size // self.axis.size))
            both = F.pad(both, (0, 0, 0, step - both.shape[1]), value=-math.inf)  # the last rank may have fewer
            both = self.gather(both.flatten(1)).unflatten(-1, (-1, 2)).movedim(0, 1).flatten(1, 2)
        # Ranks hold the vocabulary in order, and each its own in order: a stable sort keeps equal ones so.
        order = both[..., 0].sort(dim=-1, descending=True, stable=True)[1][:, : min(count, self.size)]
        values, tokens = both[..., 0].gather(1, order), both[..., 1].gather(1, order)
        return values, tokens.clamp(min=0).long()

    def log_probabilities(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`candidates` of `logits [R, run]` as log-probabilities; NaN in rows that are no distribution. Collective."""
        best, _ = self.largest(logits)
        x = logits.double() - best.unsqueeze(-1)
        total = self.gather(x.exp().sum(-1, keepdim=True)).sum(0).log()
        values, tokens = self.candidates(x, count)
        return values - total, tokens

    def pick(self, mass: Tensor, draws: Tensor) -> Tensor:
        """The token at which the summed masses `[R, run]`, of all ranks, pass each draw `[R]` in [0, 1). Collective."""
        mass = F.pad(mass, (0, 1)) if mass.shape[-1] == 0 else mass
        summed = mass.cumsum(-1)
        totals = self.gather(summed[:, -1:])[..., 0]
        ends = totals.cumsum(0)
        goal = draws * ends[-1]
        owner = (goal.unsqueeze(0) >= ends).sum(0).clamp(max=ends.shape[0] - 1)
        before = (ends - totals).gather(0, owner.unsqueeze(0)).squeeze(0)
        # Rounding must not pass the last token that has any mass.
        rest = torch.minimum(goal - before, summed[:, -1] * (1 - 2**-52))
        mine = torch.searchsorted(summed, rest.unsqueeze(-1), right=True).squeeze(-1)
        found = self.gather((mine.clamp(max=mass.shape[-1] - 1) + self.first).unsqueeze(-1))[..., 0]
        return found.gather(0, owner.unsqueeze(0)).squeeze(0)


def _top(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in falling order, equal ones by index (which `topk` does not promise)."""
    values, indices = x.topk(count, dim=-1)
    if ((x >= values[:, -1:]).sum(-1) > count).any():
        values, indices = (y[:, :count] for y in x.sort(dim=-1, descending=True, stable=True))
        return values, indices
    indices, order = indices.sort(-1)
    values = values.gather(1, order)
    order = values.sort(dim=-1, descending=True, stable=True)[1]
    return values.gather(1, order), indices.gather(1, order)
