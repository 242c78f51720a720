"""Compiled blocks in a model's place of its own (`inference/block_pieces.py`), where they are faster.

    tokens 1      compiled for 1                 tokens 5     the blocks' own forwards, as while training
    tokens rows   compiled for `rows`            gradients    the same

It knows models that tell their blocks about tokens (`sequences`); it knows no layer in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError
from fms_parallel.inference.block_pieces import Attention, CompiledBlocks, Pieces, listened
from fms_parallel.inference.cache import KVCache
from fms_parallel.inference.one_query import ALLOWED, Attentions, Stretch, difference
from fms_parallel.modules.blocks import Blocks
from fms_parallel.modules.linear import Multiplies
from fms_parallel.modules.scores import scores
from fms_parallel.modules.sequences import KVStore, RaggedStore, Sequences
from fms_parallel.strategy.base import repeated_blocks


class _Side:
    """A cache of B sequences as a store of rows side by side."""

    def __init__(self, cache: KVStore, seq: Sequences) -> None:
        self.cache, self.seq = cache, seq

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """See `RaggedStore`; the window is in the mask."""
        q, k, v = (x.view(self.seq.batch, self.seq.length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        k, v = self.cache.append(layer, k, v)
        out = scores(q, k, v, self.seq.mask, scale).transpose(1, 2)
        return out.reshape(1, self.seq.tokens, *out.shape[2:])

    def stretches(self, layer: int, k: Tensor, window: int | None) -> list[Stretch] | None:
        """Where the rows lie, a query each; see `stretches_of`."""
        if self.seq.length > 1 or self.seq.mask is not None or not isinstance(self.cache, KVCache):
            return None
        rows = self.cache.one_more(layer, k[0])
        return None if rows is None else [Stretch(keys, values, 0, length) for keys, values, length in rows]


class _Quick:
    """A store of rows side by side, whose attention goes through kernels where it can."""

    def __init__(self, store: RaggedStore, attentions: Attentions) -> None:
        self.store, self.attentions = store, attentions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """See `RaggedStore`."""
        heads = q.shape[2], k.shape[2], q.shape[3]
        call = Attention(layer, scale, window, heads, self.attentions.known(heads, q, scale))
        return call(self.store, (q, k, v))


class FastBlocks:
    """Takes the place of the forward of consecutive blocks: compiled for some numbers of tokens, their own otherwise.

    Args:
        owner: whose forward that is, of the `Blocks` or of a single block.
        attentions: kernels that steps of other numbers of tokens use too.
    Attributes:
        compiled: number of tokens -> the blocks for so many.
    """

    def __init__(self, owner: nn.Module, dtype: torch.dtype, attentions: Attentions) -> None:
        self.owner, self.dtype, self.attentions, self.tables = owner, dtype, attentions, Tables()
        self.compiled: dict[int, CompiledBlocks] = {}

    @property
    def blocks(self) -> list[nn.Module]:
        """In order."""
        return list(self.owner) if isinstance(self.owner, Blocks) else [self.owner]

    def __call__(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        compiled, decoding = self.compiled.get(seq.tokens), self._is_decoding(x, seq)
        if compiled is None or not decoding:
            if decoding and seq.ragged is not None:
                seq = replace(seq, cache=_Quick(seq.ragged, self.attentions))
            return type(self.owner).forward(self.owner, x, seq)  # type: ignore[no-any-return, arg-type]
        store: Any = seq.ragged or _Side(seq.cache, seq)  # type: ignore[arg-type]
        if x.shape[0] == 1:  # the usual case, in as few operations as can be
            return compiled(x.contiguous(), self.tables.of(seq), store)
        return compiled(x.reshape(1, seq.tokens, -1).contiguous(), self.tables.of(seq), store).view(x.shape)

    def _is_decoding(self, x: Tensor, seq: Sequences) -> bool:
        alone = seq.cache is not None and seq.context is None and not self.owner.training and x.dtype == self.dtype
        return alone and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    @property
    def extra_bytes(self) -> int:
        """Of matrices that are no parameters as they are: in another dtype, say."""
        return max((compiled.extra_bytes for compiled in self.compiled.values()), default=0)

    def install(self) -> None:
        """Take the place of the forward."""
        self.owner.forward = self

    def remove(self) -> None:
        """Give it back."""
        self.owner.__dict__.pop("forward", None)

    def __reduce__(self) -> Any:
        raise ConfigError("a model prepared for decoding is not copied or pickled: undo() that first.")


class Tables:
    """The rotary tables of one forward, `[1, N, R/2]` for N tokens side by side: made for its first block."""

    def __init__(self) -> None:
        self._made: tuple[object, tuple[Tensor, ...]] = (None, ())

    def of(self, seq: Sequences) -> tuple[Tensor, ...]:
        """Those of `seq`, if it has any."""
        if seq.rope is None:
            return ()
        given, flat = self._made  # as one value: another thread may be in another forward
        if seq.rope is not given:
            flat = tuple(_side_by_side(table, seq) for table in seq.rope)
            self._made = seq.rope, flat
        return flat


def _side_by_side(table: Tensor, seq: Sequences) -> Tensor:
    """`[S, R/2]` or `[B, S, R/2]` -> `[1, B * S, R/2]`."""
    if seq.batch == 1:
        return (table if table.dim() == 3 else table.unsqueeze(0)).contiguous()
    return table.expand(seq.batch, seq.length, table.shape[-1]).reshape(1, seq.tokens, -1).contiguous()


# ---- which blocks, and whether it pays -----------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockChoice:
    """What was found for a model's blocks and so many tokens.

    Attributes:
        count: blocks. tokens: N. seconds: of one run of them as they are. compiled: of one as compiled pieces, or None.
        reason: why there are none, or why they are not used.
        attention: why their attention is not compiled; empty where it is.
    """

    count: int
    tokens: int
    seconds: float
    compiled: float | None
    reason: str = ""
    attention: str = ""


def fast_blocks(
    model: nn.Module, counts: Sequence[int], dtype: torch.dtype, time: Callable[[Sequence[Callable[[], Any]]], float]
) -> tuple[list[FastBlocks], list[BlockChoice]]:
    """Put compiled blocks in the place of the model's own, for the numbers of tokens that they are faster for.

    Args:
        time: seconds of one of these calls.
    """
    attentions = Attentions(time)
    fast = [FastBlocks(owner, dtype, attentions) for owner in _owners(model)]
    if not hasattr(model, "sequences") or not fast:
        return [], []
    trial = _Trial(model, fast, Pieces(), attentions, time)
    choices = [trial.choose(tokens) for tokens in counts]
    used = [one for one in fast if one.compiled]
    for one in used:
        one.install()
    return used, choices


def _owners(model: nn.Module) -> list[nn.Module]:
    """Runs of blocks with matrices; blocks that a model calls one by one, each."""
    runs: list[nn.Module] = [module for module in model.modules() if isinstance(module, Blocks)]
    known = {id(block) for run in runs for block in run.children()}
    alone = [block for _, block in repeated_blocks(model) if id(block) not in known]
    return [run for run in (*runs, *alone) if any(isinstance(module, Multiplies) for module in run.modules())]


@dataclass(frozen=True)
class _Trial:
    """What blocks are tried, and what with."""

    model: Any
    fast: Sequence[FastBlocks]
    pieces: Pieces
    attentions: Attentions
    time: Callable[[Sequence[Callable[[], Any]]], float]

    def choose(self, tokens: int) -> BlockChoice:
        """Compile the blocks for so many tokens; keep that where it is right and faster."""
        blocks = [block for one in self.fast for block in one.blocks]
        x = torch.randn(1, tokens, self.model.activation_width, device=next(blocks[0].parameters()).device)
        x = x.to(self.fast[0].dtype)
        positions = torch.arange(tokens, device=x.device).unsqueeze(0)
        with listened(blocks) as listener, torch.no_grad():
            seq = self.model.sequences(1, tokens, positions, 0, cache=listener)  # as for rows side by side
            own = [partial(type(one.owner).forward, one.owner, x, seq) for one in self.fast]
            seconds = self.time(own)
            try:
                compiled = [CompiledBlocks(one.blocks, x, seq, self.pieces, self.attentions) for one in self.fast]
                runs = [partial(one.steps, x, tuple(seq.rope or ()), seq.cache) for one in compiled]
                worst = max(_worst(one.blocks, x, seq, run()) for one, run in zip(self.fast, runs, strict=True))
            except ConfigError as error:
                return BlockChoice(len(blocks), tokens, seconds, None, str(error))
            if not worst <= ALLOWED[x.dtype]:
                return BlockChoice(len(blocks), tokens, seconds, None, f"compiled, they differ by {worst:.1e}.")
            faster = self.time(runs)
        if faster >= seconds:
            return BlockChoice(len(blocks), tokens, seconds, faster, "compiled, they are no faster.")
        for one, made in zip(self.fast, compiled, strict=True):
            one.compiled[tokens] = made
        return BlockChoice(len(blocks), tokens, seconds, faster, attention=self.attentions.reason)


def _worst(blocks: Sequence[nn.Module], x: Tensor, seq: Sequences, steps: Sequence[Tensor]) -> float:
    """The largest difference between a compiled block and the block itself, of what the one before it made."""
    made = zip(blocks, (x, *steps), steps, strict=False)
    return max(difference(after, type(block).forward(block, before, seq)) for block, before, after in made)  # type: ignore[arg-type]
