"""Who proposes tokens for speculative decoding: the row's own past, or a small model with a cache of its own.

It knows rows and runners; how proposals are checked is inference/speculative.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError
from fms_parallel.inference.kv_manager import CacheSize, KVCacheManager
from fms_parallel.inference.paged import BlockPool
from fms_parallel.inference.ragged import Piece
from fms_parallel.inference.row import Row
from fms_parallel.inference.runner import ModelRunner
from fms_parallel.inference.sampler import Ask
from fms_parallel.inference.sampling import pick, uniform
from fms_parallel.inference.speculative import PromptLookup

DRAFT = 1_000_081
"""Added to a seed: the numbers that draw drafted tokens decide nothing else."""

Proposal = tuple[list[int], Tensor | None]
"""Drafted tokens, and the distributions `[n, V]` they were drawn from (None: of no distribution, or of greedy rows)."""


@dataclass(frozen=True)
class DraftModel:
    """A small model that proposes.

    Attributes:
        model: a `CausalModel` with the same tokens, whole on every rank. tokens: proposed per step.
    """

    model: nn.Module
    tokens: int = 4

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"a draft of {self.tokens} tokens: propose at least 1.")


class LookupProposer:
    """Proposals from the rows themselves."""

    memory_bytes = 0

    def __init__(self, lookup: PromptLookup) -> None:
        self.lookup = lookup

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """For each row at most so many tokens."""
        return [(self.lookup.propose(row.tokens)[:n], None) for row, n in zip(rows, most, strict=True)]

    def took(self, row: Row, length: int) -> None:
        """The first `length` tokens of a row were as proposed."""

    def end(self, row: Row) -> None:
        """The row is done."""


class ModelProposer:
    """Proposals from a small model, all rows together.

    Args:
        runner: of the small model. tokens: that its cache has room for.
    """

    def __init__(self, runner: ModelRunner, tokens: int, block_size: int, chunk: int) -> None:
        size = CacheSize.of(runner.model).as_one()
        self.runner, self.chunk = runner, chunk
        self.pool = BlockPool(-(-tokens // block_size), block_size, share=False)
        self.storage = KVCacheManager(size, -(-tokens // block_size), block_size, runner.ranks.device)
        self.longest = getattr(getattr(runner.model, "config", None), "max_positions", None)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the cache."""
        return self.storage.memory_bytes

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """For each row at most so many tokens; none for a row that the draft has no room for."""
        found: list[Proposal] = [([], None) for _ in rows]
        active = [i for i, row in enumerate(rows) if most[i] > 0 and self._room(row, len(row.tokens) + most[i])]
        for row in (rows[i] for i in active):
            self._catch_up(row)
        while active:
            pieces = [self._piece(rows[i], found[i][0]) for i in active]
            asks = [_ask(rows[i], found[i][0]) for i in active]
            logits = self.runner.forward(pieces, self.storage, whole=True)
            tokens = self._choose(logits, asks, found, active)
            for i, token in zip(active, tokens, strict=True):
                found[i][0].append(token)
                rows[i].draft_computed = len(rows[i].tokens) + len(found[i][0]) - 1
            active = [i for i in active if len(found[i][0]) < most[i]]
        return found

    def took(self, row: Row, length: int) -> None:
        """The first `length` tokens of a row were as proposed: what is cached behind them is void."""
        row.draft_computed = min(row.draft_computed, length)

    def end(self, row: Row) -> None:
        """The row is done."""
        if row.draft_table is not None:
            self.pool.end(row.draft_table)
        row.draft_table, row.draft_computed = None, 0

    def _room(self, row: Row, tokens: int) -> bool:
        if self.longest is not None and tokens > self.longest:
            return False
        row.draft_table = row.draft_table or self.pool.empty()
        return self.pool.grow(row.draft_table, tokens)

    def _catch_up(self, row: Row) -> None:
        """The prompt, at first, in chunks; all but the last token."""
        while len(row.tokens) - row.draft_computed > self.chunk:
            stop = row.draft_computed + self.chunk
            self.runner.forward([self._of(row, row.tokens[row.draft_computed : stop], 0)], self.storage)
            row.draft_computed = stop

    def _piece(self, row: Row, drafted: Sequence[int]) -> Piece:
        """What the draft has not computed yet, to its end."""
        return self._of(row, [*row.tokens, *drafted][row.draft_computed :], 1)

    def _of(self, row: Row, tokens: Sequence[int], wanted: int) -> Piece:
        assert row.draft_table is not None
        start, stop = row.draft_computed, row.draft_computed + len(tokens)
        return Piece(tokens, start, wanted, self.pool.where(row.draft_table, start, stop))

    def _choose(self, logits: Tensor, asks: Sequence[Ask], found: list[Proposal], active: Sequence[int]) -> list[int]:
        """A token per row, and beside it the distribution it was drawn from."""
        sampler = self.runner.sampler
        whole = type(sampler)(type(sampler.vocabulary)(sampler.vocabulary.size))
        tokens = whole.tokens(logits, asks)
        drawn = [n for n, ask in enumerate(asks) if ask.options.temperature > 0]
        if drawn:
            q = whole.probabilities(logits[drawn], [asks[n] for n in drawn])
            names = [(asks[n].options.seed + DRAFT, asks[n].options.row, len(asks[n].new)) for n in drawn]
            draws = torch.tensor([uniform(*name) for name in names], dtype=torch.float64, device=logits.device)
            tokens[drawn] = pick(q, draws)
            for place, n in enumerate(drawn):
                before, row = found[active[n]][1], q[place : place + 1]
                found[active[n]] = (found[active[n]][0], row if before is None else torch.cat([before, row]))
        return [int(token) for token in self.runner.ranks.first(tokens).clamp(min=0)]


def _ask(row: Row, drafted: Sequence[int]) -> Ask:
    return Ask(row.options, row.prompt, [*row.new, *drafted])
