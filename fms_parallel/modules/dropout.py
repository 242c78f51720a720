"""Dropout whose mask depends on the token, not on the rank.

The bits of token t and feature e are a hash of (seed, place in the model, t, e), t counted over the step's whole
global batch. So every layout drops the same elements, a rank that recomputes a block drops what it dropped before,
and no generator state has to be kept, synchronised or checkpointed.
"""

from __future__ import annotations

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

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` or, under sequence parallelism, `[T/tp, E]`, in the same form back."""
        return self._drop(x, seq, first=0)

    def _drop(self, x: Tensor, seq: Sequences, first: int) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        if seq.dropout is None:
            raise ConfigError("a model with dropout needs `dropout=DropoutKey(seed, first_token)` while it trains.")
        keep = keep_mask(x.flatten(0, -2).shape, first, self.p, seq.dropout, self.salt, x.device)
        return x * keep.view(x.shape).to(x.dtype).div_(1 - self.p)


class TPDropout(TPModule, Dropout):
    """With sp a rank's run of tokens starts at rank * ceil(T / tp)."""

    def placements(self) -> dict[str, Placement]:
        return {}

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        return self._drop(x, seq, first=self.axis.rank * x.shape[0] if self.sp else 0)


def keep_mask(shape: torch.Size, first: int, p: float, key: DropoutKey, salt: int, device: torch.device) -> Tensor:
    """Bool `[n, E]`: which elements stay of tokens `first .. first + n` of this micro-batch."""
    tokens = torch.arange(shape[0], device=device, dtype=torch.int64).add_(key.first_token + first)
    # Hashed before they meet: sums would give two seeds the same bits, a few tokens further on.
    rows = _mix(_mix(tokens) ^ _word(key.seed, salt))
    columns = _mix(torch.arange(shape[1], device=device, dtype=torch.int64))
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
