"""Sampling: logits -> distribution -> one token per row.

A row's token is a function of (seed, row, step) and the row's own logits. There is no generator whose state a batch
mate, a finished row or another rank could move: the one random number that a token needs is a hash, as for dropout.
It knows logits; it knows nothing of models, caches or ranks.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fms_parallel.errors import ConfigError

NOT_FINITE = -1
"""The token of a row whose logits are no distribution (NaN, an infinity, or nothing allowed)."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens. top_p: of those, keep the fewest whose mass reaches p (arXiv 1904.09751).
        seed: names the random numbers; unused at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature={self.temperature}: must be a number >= 0 (0 takes the likeliest token).")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: must be >= 1, or None to keep every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be in (0, 1], or None to keep every token.")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)} with temperature=0: the likeliest token is taken whatever {name} "
                    f"keeps; give a temperature > 0 or drop {name}."
                )

    def check_vocabulary(self, vocab: int) -> None:
        """Raise ConfigError when `top_k` is more than the vocabulary has."""
        if self.top_k is not None and self.top_k > vocab:
            raise ConfigError(f"top_k={self.top_k} of a vocabulary of {vocab} keeps every token; use at most {vocab}.")

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """One token per row of `logits [B, V]`: int64 `[B]`, `NOT_FINITE` where a row is no distribution.

        Args:
            step: how many tokens each row has been given before.
        """
        if self.temperature == 0:
            best, tokens = logits.max(dim=-1)
            return tokens.where(best.isfinite(), NOT_FINITE)
        draws = [uniform(self.seed, row, step) for row in range(logits.shape[0])]
        return pick(self.probabilities(logits), torch.tensor(draws, dtype=torch.float64, device=logits.device))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that tokens are drawn from at a temperature > 0: `[B, V]` -> fp64 `[B, V]`, rows sum to 1.

        Temperature first, then `top_k`, then `top_p` of what is left.
        """
        self.check_vocabulary(logits.shape[-1])
        wide = logits.double()
        # The largest becomes 0 before dividing, so that no temperature overflows.
        scaled = (wide - wide.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            scaled = keep_top_k(scaled, self.top_k)
        kept = scaled.softmax(-1)
        return kept if self.top_p is None or self.top_p == 1 else keep_top_p(kept, self.top_p)


def keep_top_k(scaled: Tensor, k: int) -> Tensor:
    """Logits `[B, V]` with all but exactly k of each row at -inf."""
    values, indices = scaled.topk(k, dim=-1)
    return torch.full_like(scaled, -math.inf).scatter(-1, indices, values)


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Of each row the fewest tokens whose mass is >= p, at least one; `[B, V]`, rows sum to 1 again."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(-1) - ordered
    dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mass_before >= p)
    kept = probabilities.masked_fill(dropped, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def pick(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The token at which the summed distribution `[B, V]` passes each draw `[B]` in [0, 1): int64 `[B]`.

    In the order of the vocabulary, not of likelihood: last-bit differences between layouts then move a token only when
    a draw falls on the edge, and never because two tokens changed places. A token of probability 0 is never picked.
    """
    mass = probabilities.cumsum(-1)
    total = mass[:, -1:]
    # Divided by itself the last entry is exactly 1, which is more than any draw.
    tokens = torch.searchsorted(mass / total, draws.unsqueeze(-1), right=True)
    return tokens.where(total.isfinite(), NOT_FINITE).squeeze(-1)


def uniform(seed: int, row: int, step: int) -> float:
    """The random number in [0, 1) of one row at one step: 53 bits of a hash."""
    digest = hashlib.blake2b(f"{seed},{row},{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
