"""What an engine holds, and what would fit: for a person, and for a metrics page.

It knows counts; it computes nothing of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fms_parallel.inference.handle import FINISHES
from fms_parallel.inference.kv_manager import Storage
from fms_parallel.inference.paged import BlockPool

if TYPE_CHECKING:
    from fms_parallel.inference.setup import Proposer, Setup
    from fms_parallel.inference.weights import Prepared

GIB = 2**30


@dataclass(frozen=True)
class KindReport:
    """The cache of layers that see equally far.

    Attributes:
        window: how far; None: all. layers: of them on this rank. tokens: that fit; used: that running rows hold;
            kept: of rows that ended, for rows to come.
    """

    window: int | None
    layers: int
    tokens: int
    used: int
    kept: int

    def __str__(self) -> str:
        sees = "that see all" if self.window is None else f"with window {self.window:,}"
        counts = f"{self.used:,} tokens used, {self.kept:,} kept for sharing, {self.tokens:,} in all"
        return f"{self.layers} {sees}: {counts}"


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one rank's engine.

    Attributes:
        weights: bytes of parameters here. cache: bytes of keys and values allocated now; cache_whole: in all.
        token: bytes of one token's keys and values. tokens: that fit; used: that running rows hold; shared: of those
            and of earlier rows, how many were found instead of computed; kept: of rows that ended, for rows to come.
        rows: that may run at a time. longest: tokens of one row at most. draft: bytes of the draft model's cache.
        copies: bytes of matrices laid out for decoding, beside the weights.
        window: rows keep the blocks of so many of their last tokens; None: of all, at least in some layers.
        kinds: layers that see equally far, farthest first. `tokens`, `used`, `kept` are of the first of them.
    """

    weights: int
    cache: int
    cache_whole: int
    token: int
    tokens: int
    used: int
    shared: int
    kept: int
    rows: int
    longest: int
    draft: int = 0
    copies: int = 0
    window: int | None = None
    kinds: tuple[KindReport, ...] = ()

    @property
    def free(self) -> int:
        """Tokens that rows to come could get now."""
        return self.tokens - self.used

    @property
    def _kept_of_rows(self) -> str:
        return "" if self.window is None else f", of which {self.window:,} are kept (window)"

    def __str__(self) -> str:
        lines = [
            ("weights", f"{self.weights / GIB:.3f} GiB"),
            ("cache", f"{self.cache / GIB:.3f} of {self.cache_whole / GIB:.3f} GiB allocated"),
            ("per token", f"{self.token:,} bytes"),
            ("tokens", f"{self.used:,} used, {self.kept:,} kept for sharing, {self.tokens:,} in all"),
            ("shared", f"{self.shared:,} tokens were found, not computed"),
            ("rows", f"{self.rows} at a time, of up to {self.longest:,} tokens{self._kept_of_rows}"),
        ]
        if self.copies:
            lines.insert(1, ("copies", f"{self.copies / GIB:.3f} GiB of weights laid out for decoding"))
        if len(self.kinds) > 1:
            lines += [("layers", str(kind)) for kind in self.kinds]
        if self.draft:
            lines.append(("draft cache", f"{self.draft / GIB:.3f} GiB"))
        return "\n".join(f"{name:12}{text}" for name, text in lines)


@dataclass(frozen=True)
class Counts:
    """What an engine is doing and has done, since it was made.

    Attributes:
        waiting, running: requests now. finished: requests, by how they ended. preemptions: rows that had to give their
            blocks back. prompt_tokens, new_tokens: of requests that ended. steps: forwards of the model.
        drafted, accepted: proposed tokens, and those that the model would have chosen too.
    """

    waiting: int
    running: int
    finished: dict[str, int]
    preemptions: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    drafted: int
    accepted: int

    @classmethod
    def of(cls, waiting: int, running: int, preemptions: int, done: Mapping[str, int]) -> Counts:
        """From what was counted by name; a request that ended is counted under why."""
        finished = {name: done[name] for name in FINISHES if done[name]}
        totals = (done[name] for name in ("prompt", "new", "steps", "drafted", "accepted"))
        return cls(waiting, running, finished, preemptions, *totals)


def sizes(tokens: int, memory_bytes: int) -> str:
    """`1,024 tokens (0.125 GiB)`: how sizes are told in errors."""
    return f"{tokens:,} tokens ({memory_bytes / GIB:.3f} GiB)"


def memory_report(
    model: nn.Module,
    setup: Setup,
    pool: BlockPool | None,
    storage: Storage | None,
    proposer: Proposer | None,
    fast: Prepared | None = None,
) -> MemoryReport:
    """What an engine of these parts holds on this rank."""
    weights = sum(_local_bytes(p) for p in {id(p): p for p in model.parameters()}.values())
    token, block = setup.size.token_bytes, 0 if pool is None else pool.block_size
    kinds = (
        ()
        if pool is None
        else tuple(
            KindReport(
                kind.window, len(setup.size.of_kind(n)), kind.blocks * block, kind.in_use * block, kind.kept * block
            )
            for n, kind in enumerate(pool.kinds)
        )
    )
    first = kinds[0] if kinds else KindReport(None, 0, 0, 0, 0)
    return MemoryReport(
        weights=weights,
        cache=0 if storage is None else storage.memory_bytes,
        cache_whole=0 if storage is None else storage.whole_bytes,
        token=token,
        tokens=first.tokens,
        used=first.used,
        shared=0 if pool is None else pool.shared_tokens,
        kept=first.kept,
        rows=setup.rows,
        longest=setup.longest,
        draft=0 if proposer is None else proposer.memory_bytes,
        copies=0 if fast is None else fast.extra_bytes,
        window=setup.window,
        kinds=kinds,
    )


def _local_bytes(parameter: Tensor) -> int:
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.element_size()
