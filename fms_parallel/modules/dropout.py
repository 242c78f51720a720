"""Dropout whose mask depends on the token, not on the rank.

The bits of token t and feature e are a hash of (seed, place in the model, t, e), t counted over the step's whole
global batch. So every layout drops the same elements, a rank that recomputes a block drops what it dropped before,
and no generator state has to be kept, synchronised or checkpointed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement

from fms_parallel.errors import ConfigError
from fms_parallel.modules.sequences import DropoutKey, Sequences
from fms_parallel.modules.tp import TPModule

_MASK = 0xFFFFFFFF


class Dropout(nn.Module):
    """Zero each element with probability `p` and scale the rest by 1 / (1 - p), while training.

    Args:
        p: in [0, 1). salt: differs for every dropout of a model, so that no two share a mask.
    """

    def __init__(self, p: float, salt: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"dropout {p}: must be in [0, 1).")
        self.p, self.salt = p, salt

    @property
    def active(self) -> bool:
        """Whether anything is dropped now."""
        return self.p > 0 and self.training

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` or, under sequence parallelism, `[T/tp, E]`, in the same form back."""
        return self._drop(x, seq, first=0)

    def first_tokens(self, x: Tensor, seq: Sequences, first_column: int = 0) -> Tensor:
        """`[B, n]`, one row for the first token of each sequence, features `first_column ..` of it."""
        return self._drop(x, seq, first=0, every=seq.length, first_column=first_column)

    def factors(self, heads: int, first_head: int, keys: int, seq: Sequences, like: Tensor) -> Tensor:
        """What attention weights of this rank's heads are multiplied by, `[B, heads, S, keys]`: 0 or 1 / (1 - p)."""
        shape = torch.Size((seq.tokens, heads * keys))
        kept = self._keep(shape, seq, like.device, first=0, first_column=first_head * keys)
        kept = kept.view(seq.batch, seq.length, heads, keys).transpose(1, 2)
        return kept.to(like.dtype).div_(1 - self.p)

    def _drop(self, x: Tensor, seq: Sequences, **cut: int) -> Tensor:
        if not self.active:
            return x
        keep = self._keep(x.flatten(0, -2).shape, seq, x.device, **cut)
        return x * keep.view(x.shape).to(x.dtype).div_(1 - self.p)

    def _keep(self, shape: torch.Size, seq: Sequences, device: torch.device, first: int, **cut: int) -> Tensor:
        if seq.dropout is None:
            raise ConfigError("a model with dropout needs `dropout=DropoutKey(seed, first_token)` while it trains.")
        return keep_mask(shape, first, self.p, seq.dropout, self.salt, device, numbers=seq.numbers, **cut)


class TPDropout(TPModule, Dropout):
    """With sp a rank's run of tokens starts at rank * ceil(T / tp)."""

    def placements(self) -> dict[str, Placement]:
        return {}

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        return self._drop(x, seq, first=self.axis.rank * x.shape[0] if self.sp else 0)


def keep_mask(
    shape: torch.Size,
    first: int,
    p: float,
    key: DropoutKey,
    salt: int,
    device: torch.device,
    *,
    every: int = 1,
    first_column: int = 0,
    numbers: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Bool `[n, E]`: which elements stay of n tokens of this micro-batch, `first` and each `every`-th after it.

    `numbers`: of tokens that are no run of the micro-batch, as of `Sequences`.
    `first_column`: index of the first of the E features, where this rank has some of them only.
    """
    tokens = torch.arange(shape[0], device=device, dtype=torch.int64).mul_(every).add_(first)
    tokens = (tokens if numbers is None else numbers(tokens)) + key.first_token
    # Hashed before they meet: sums would give two seeds the same bits, a few tokens further on.
    rows = _mix(_mix(tokens) ^ _word(key.seed, salt))
    columns = _mix(torch.arange(first_column, first_column + shape[1], device=device, dtype=torch.int64))
    bits = _mix(rows[:, None] ^ columns[None, :])
    return bits >= int(p * (_MASK + 1))


def _mix(x: Tensor) -> Tensor:
    """32-bit finaliser in 64-bit integers (multiplier and shifts: Chris Wellons, "lowbias32")."""
    x = x.bitwise_and(_MASK)
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x = (x ^ (x >> 15)).mul_(0x846CA68B).bitwise_and_(_MASK)
    return x ^ (x >> 16)


def _word(*numbers: int) -> int:
    """32 bits that depend on the low 64 of every number."""
    word = 0
    for part in (half for number in numbers for half in (number & _MASK, number >> 32 & _MASK)):
        word = _mix_number(word + part + 0x9E3779B9)
    return word


def _mix_number(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
