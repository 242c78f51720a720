"""One forward of many rows at once: pieces of rows side by side in one run of tokens, and their attention.

    tokens     a  | q r s t u | x           three rows' pieces: a decode step, a chunk of a prompt, a decode step
    positions  17 | 0 1 2 3 4 | 4           matrices see 7 tokens, without padding; attention goes row by row

A row's keys and values are read where they lie. In one run of the pool that is a view; one query over several runs is
computed run by run and merged (modules/block_attention.py); a chunk over several runs copies them first, which its
arithmetic hides. It knows tensors and places; it knows no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fms_parallel import compat
from fms_parallel.errors import FmsError
from fms_parallel.inference.kv_manager import Storage
from fms_parallel.inference.one_query import Stretch
from fms_parallel.inference.paged import Run, Where
from fms_parallel.modules.block_attention import block, merge
from fms_parallel.modules.scores import scores
from fms_parallel.modules.sequences import Wanted

MOST_RUNS = 16
"""Of a row that one query goes through one by one; above, copying them is cheaper."""


@dataclass
class Piece:
    """Some consecutive tokens of one row.

    Attributes:
        tokens: their ids. start: position of the first. wanted: logits of the last so many.
        where: of each kind of layers, where their keys and values go, and where those of all start + len(tokens) lie.
            Empty without a cache; then `start` is 0.
    """

    tokens: Sequence[int]
    start: int
    wanted: int = 1
    where: Sequence[Where] = ()

    @property
    def end(self) -> int:
        """Position behind the last."""
        return self.start + len(self.tokens)


@dataclass
class _Span:
    """A piece within the run of tokens, under one window: what all layers of a kind share.

    Attributes:
        first, last: its place there. runs: those that any of its queries can see. mask: where causal does not say it.
        scattered: places of the runs' tokens, where they are copied.
    """

    first: int
    last: int
    runs: list[Run]
    mask: Tensor | None = None
    scattered: Tensor | None = None


class RaggedBatch:
    """Pieces as a model reads them (a `modules.sequences.RaggedStore`).

    Args:
        pieces: at most one per row. storage: of keys and values; None: a piece attends to itself alone.
        whole: ask for all logits on every rank of tp, rather than for its run of the vocabulary.
    Attributes:
        windows: layer -> the window that it has asked for.
    """

    def __init__(
        self, pieces: Sequence[Piece], storage: Storage | None, device: torch.device, *, whole: bool = False
    ) -> None:
        self.pieces, self.storage, self.device = pieces, storage, device
        self.windows: dict[int, int | None] = {}
        self._spans: dict[tuple[int, int | None], list[_Span]] = {}  # by kind of layers and window
        self._places: dict[int, Tensor] = {}
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for piece in pieces:
            ids += piece.tokens
            positions += range(piece.start, piece.end)
            wanted += range(len(ids) - piece.wanted, len(ids))
        self.input_ids = torch.tensor([ids], device=device)
        self.positions = torch.tensor([positions], device=device)
        self.wanted = Wanted(torch.tensor(wanted, dtype=torch.int64, device=device), whole)

    @property
    def first_position(self) -> int:
        """What makes the model see the largest position of all rows as its last (negative where rows are many)."""
        return max(piece.end for piece in self.pieces) - self.input_ids.shape[1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Store `k, v [1, N, K, D]`; let `q [1, N, H, D]` attend to its row's: `[1, N, H, D]`."""
        grouped = q.view(q.shape[1], k.shape[2], -1, q.shape[3])  # the heads that read one kv head side by side
        self.windows[layer] = window
        if self.storage is None:
            outs = [_within(grouped, k, v, span, scale) for span in self._under(0, window)]
        else:
            memory, kind = self.storage.layer(layer, k), self.storage.kind(layer)
            memory.write(self._places_of(kind), k[0], v[0])
            keys, values = memory.keys.unsqueeze(0), memory.values.unsqueeze(0)
            outs = [_over(grouped, keys, values, span, scale) for span in self._under(kind, window)]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).view(q.shape)

    def stretches(self, layer: int, k: Tensor, window: int | None) -> list[Stretch] | None:
        """Where the rows lie, a query each; see `stretches_of`."""
        if self.storage is None:
            return None
        self.windows[layer] = window
        spans = self._under(self.storage.kind(layer), window)
        if any(span.last - span.first > 1 or len(span.runs) > 1 for span in spans):
            return None
        memory = self.storage.layer(layer, k)
        return [Stretch(memory.keys, memory.values, *span.runs[0]) for span in spans]

    def _places_of(self, kind: int) -> Tensor:
        """int64 `[N]`: where the tokens go in the memory of these layers."""
        if kind not in self._places:
            places = [place for piece in self.pieces for place in piece.where[kind].places]
            self._places[kind] = torch.tensor(places, device=self.device)
        return self._places[kind]

    def _under(self, kind: int, window: int | None) -> list[_Span]:
        """The pieces, with what they can see under a window in the memory of these layers."""
        if (kind, window) not in self._spans:
            ends = list(accumulate(len(piece.tokens) for piece in self.pieces))
            self._spans[kind, window] = [
                _Span(end - len(piece.tokens), end, _seen(piece, kind, window), _mask(piece, window, self.device))
                for piece, end in zip(self.pieces, ends, strict=True)
            ]
        return self._spans[kind, window]


# ---- one piece: of all pieces' q [N, K, H/K, D], its own [n, K, H/K, D] ------------------------------------------


def _within(q: Tensor, k: Tensor, v: Tensor, span: _Span, scale: float | None) -> Tensor:
    """A whole row that attends to itself."""
    mine = slice(span.first, span.last)
    return _attention(q[mine], k[:, mine].transpose(1, 2), v[:, mine].transpose(1, 2), span.mask, scale)


def _over(q: Tensor, keys: Tensor, values: Tensor, span: _Span, scale: float | None) -> Tensor:
    """A piece that attends to its row in memory, `[1, K, T, D]` each, its own tokens included."""
    q, runs = q[span.first : span.last], span.runs
    if len(runs) == 1:
        start, stop = runs[0][0], sum(runs[0])
        return _attention(q, keys[:, :, start:stop], values[:, :, start:stop], span.mask, scale)
    if q.shape[0] == 1 and len(runs) <= MOST_RUNS and compat.has_attention_sums(q):
        return _merged(q, keys, values, runs, scale)
    if span.scattered is None:
        ranges = [torch.arange(first, first + count, device=q.device) for first, count in runs]
        span.scattered = torch.cat(ranges)
    k, v = (x.index_select(2, span.scattered) for x in (keys, values))
    return _attention(q, k, v, span.mask, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`q [n, K, H/K, D]` over `k, v [1, K, T, D]`, the last n of which are its own."""
    if q.shape[0] == 1:  # one query: the heads that share a kv head are as good as a sequence of queries
        return scores(q, k, v, None, scale, causal=False)
    return scores(q.flatten(1, 2).transpose(0, 1).unsqueeze(0), k, v, mask, scale)[0].transpose(0, 1).reshape(q.shape)


def _merged(q: Tensor, keys: Tensor, values: Tensor, runs: Sequence[Run], scale: float | None) -> Tensor:
    """One query over several runs, without copying them."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    total: tuple[Tensor, Tensor] | None = None
    for first, count in runs:
        part = slice(first, first + count)
        out, sums = block(q, keys[:, :, part], values[:, :, part], None, factor, False)
        if total is None:
            total = out.to(torch.promote_types(q.dtype, torch.float32)), sums.clone()
        else:
            merge(*total, out, sums)
    assert total is not None
    return total[0].to(q.dtype).reshape(q.shape)


def _seen(piece: Piece, kind: int, window: int | None) -> list[Run]:
    """The runs that any query of the piece can see. Raises FmsError where it could see tokens that are gone."""
    if not piece.where:
        return []
    where = piece.where[kind]
    hidden = (0 if window is None else max(0, piece.start - window + 1)) - where.gone
    if hidden < 0:
        raise FmsError(
            f"attention with window={window} reads {-hidden} tokens whose blocks were given back: the model's "
            "config.window is less than what its layers see; set it to the longest, or to None."
        )
    seen = []
    for first, count in where.runs:
        cut = min(hidden, count)
        hidden -= cut
        if count > cut:
            seen.append((first + cut, count - cut))
    return seen


def _mask(piece: Piece, window: int | None, device: torch.device) -> Tensor | None:
    """Bool `[n, T]` over the keys of `_seen`, where causal alone does not say it."""
    if len(piece.tokens) == 1 or (piece.start == 0 and (window is None or piece.end <= window)):
        return None
    hidden = 0 if window is None else max(0, piece.start - window + 1)
    query = torch.arange(piece.start, piece.end, device=device).unsqueeze(1)
    key = torch.arange(hidden, piece.end, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
