"""`Context`: which positions of a sequence this rank holds, when the ranks of the cp axis share every sequence.

A sequence is cut into 2 cp chunks; a rank holds one from the head and one from the tail, so that under a causal mask
all have the same to compute (a tail query sees many keys, a head query few):

    cp = 2, S = 13, chunks of 4      rank 0:  0 1 2 3 | 12 -- -- --      rank 1:  4 5 6 7 | 8 9 10 11

What S lacks to a multiple of 2 cp is padded behind the last token, where no real token looks. It knows positions and
moves rows and columns; it computes no attention (modules/context_attention.py) and no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fms_parallel.distributed.collectives import Axis, gather_tokens


@dataclass(frozen=True)
class Context:
    """B sequences of `length` tokens, each spread over the ranks of `axis`.

    Attributes:
        axis: the ranks that share them. method: how attention reaches the keys of the others (`layout.CP_METHODS`).
        length: S, tokens of a whole sequence without padding.
    """

    axis: Axis
    method: str
    length: int

    @property
    def chunk(self) -> int:
        """Positions of one of the 2 cp chunks."""
        return -(-self.length // (2 * self.axis.size))

    @property
    def held(self) -> int:
        """Positions that a rank holds, padding included."""
        return 2 * self.chunk

    def positions(self, device: torch.device | None = None) -> Tensor:
        """`[held]`: position in the sequence of each token held here, rising; padding says the last token's."""
        return self.cut(torch.arange(self.length, device=device), 0, fill=self.length - 1)

    def numbers(self, tokens: Tensor) -> Tensor:
        """Of this rank's tokens, counted over its B * held: their numbers counted over all B * S."""
        row, place = tokens // self.held, tokens % self.held
        return row * self.length + self.positions(tokens.device)[place]

    def real(self, rank: int) -> int:
        """How many of the positions of `rank` are no padding: its first so many."""
        starts = (number * self.chunk for number in self._chunks(rank))
        return sum(min(max(self.length - start, 0), self.chunk) for start in starts)

    def cut(self, x: Tensor, dim: int, *, fill: float = 0, rank: int | None = None) -> Tensor:
        """What a rank (this one) holds of a whole tensor: `[.., S, ..]` -> `[.., held, ..]`, `fill` in the padding."""
        first, second = self._chunks(self.axis.rank if rank is None else rank)
        pieces = self._padded(x, dim, fill).split(self.chunk, dim)
        return torch.cat([pieces[first], pieces[second]], dim)

    def whole(self, pieces: Tensor) -> Tensor:
        """What all ranks hold, `[cp, .., held, D]`, in the order of positions: `[.., 2 cp chunk, D]`."""
        heads, tails = pieces.split(self.chunk, -2)
        return torch.cat([heads, tails.flip(0)]).movedim(0, -3).flatten(-3, -2)

    def gathered(self, x: Tensor) -> Tensor:
        """What each rank holds, `[B, held, ..]` -> all of it on every rank, `[B, S, ..]`; gradients are summed and cut.

        Collective over the axis.
        """
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        everyone = gather_tokens(flat.unsqueeze(0), self.axis, self.axis.size)
        return self.whole(everyone)[:, : self.length].reshape(x.shape[0], self.length, *x.shape[2:])

    def pieces(self, whole: Tensor) -> Tensor:
        """The inverse of `whole`: `[.., S, D]` -> `[cp, .., held, D]`, zero in the padding."""
        chunks = self._padded(whole, -2, 0).unflatten(-2, (-1, self.chunk)).movedim(-3, 0)
        heads, tails = chunks.chunk(2)
        return torch.cat([heads, tails.flip(0)], -2)

    def _chunks(self, rank: int) -> tuple[int, int]:
        return rank, 2 * self.axis.size - 1 - rank

    def _padded(self, x: Tensor, dim: int, fill: float) -> Tensor:
        missing = 2 * self.axis.size * self.chunk - x.shape[dim]
        if missing == 0:
            return x
        dims_behind = x.dim() - 1 - dim % x.dim()
        return F.pad(x, (0, 0) * dims_behind + (0, missing), value=fill)


def positions_of(length: int, first: int, context: Context | None, device: torch.device) -> Tensor:
    """`[S]`: where the tokens of every row stand: `first ..`, or as the ranks that share the rows hold them."""
    return torch.arange(first, first + length, device=device) if context is None else context.positions(device)


def last_position(length: int, first: int, context: Context | None) -> int:
    """The largest position of whole sequences plus one."""
    return first + length if context is None else context.length
