"""Compiled blocks in a model's place of its own (`inference/block_pieces.py`), where they are faster.

    tokens 1      compiled for 1                 tokens 5     the block's own forward, as while training
    tokens rows   compiled for `rows`            gradients    the same

It knows models that tell their blocks about tokens (`sequences`); it knows no layer in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError
from fms_parallel.inference.block_pieces import CompiledBlock, Pieces, listened
from fms_parallel.modules.linear import Multiplies
from fms_parallel.modules.scores import scores
from fms_parallel.modules.sequences import KVStore, Sequences
from fms_parallel.strategy.base import repeated_blocks

ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2**-5}
"""Largest difference between compiled pieces and the block itself, of the largest number: a block that was traced
wrongly is far above, rounding far below."""


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


class FastBlock:
    """Takes the place of a block's forward: compiled for some numbers of tokens, the block's own for all others.

    Attributes:
        compiled: number of tokens -> the block for so many. tables: shared by all blocks of a model.
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype, tables: Tables) -> None:
        self.block, self.dtype, self.tables = block, dtype, tables
        self.compiled: dict[int, CompiledBlock] = {}

    def __call__(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        compiled = self.compiled.get(seq.tokens)
        if compiled is None or not self._is_decoding(x, seq):
            return type(self.block).forward(self.block, x, seq)  # type: ignore[no-any-return, arg-type]
        store: Any = seq.ragged or _Side(seq.cache, seq)  # type: ignore[arg-type]
        return compiled(x.reshape(1, seq.tokens, -1).contiguous(), self.tables.of(seq), store).view(x.shape)

    def _is_decoding(self, x: Tensor, seq: Sequences) -> bool:
        alone = seq.cache is not None and seq.context is None and not self.block.training and x.dtype == self.dtype
        return alone and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    @property
    def extra_bytes(self) -> int:
        """Of matrices that are no parameters as they are: in another dtype, say."""
        return max((compiled.extra_bytes for compiled in self.compiled.values()), default=0)

    def install(self) -> None:
        """Take the place of the block's forward."""
        self.block.forward = self

    def remove(self) -> None:
        """Give it back."""
        self.block.__dict__.pop("forward", None)

    def __reduce__(self) -> Any:
        raise ConfigError("a model prepared for decoding is not copied or pickled: undo() that first.")


class Tables:
    """The rotary tables of one forward, `[1, N, R/2]` for N tokens side by side: made for its first block."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, Tensor] | None = None
        self._flat: tuple[Tensor, ...] = ()

    def of(self, seq: Sequences) -> tuple[Tensor, ...]:
        """Those of `seq`, if it has any."""
        if seq.rope is None:
            return ()
        if seq.rope is not self._given:
            self._given = seq.rope
            wide = (table.expand(seq.batch, seq.length, table.shape[-1]) for table in seq.rope)
            self._flat = tuple(table.reshape(1, seq.tokens, -1).contiguous() for table in wide)
        return self._flat


# ---- which blocks, and whether it pays -----------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockChoice:
    """What was found for a model's blocks and so many tokens.

    Attributes:
        count: blocks. tokens: N. seconds: of one block as it is. compiled: of one as compiled pieces, or None.
        reason: why there are none, or why they are not used.
    """

    count: int
    tokens: int
    seconds: float
    compiled: float | None
    reason: str = ""


def fast_blocks(
    model: nn.Module, counts: Sequence[int], dtype: torch.dtype, time: Callable[[Sequence[Callable[[], Any]]], float]
) -> tuple[list[FastBlock], list[BlockChoice]]:
    """Put compiled blocks in the place of the model's own, for the numbers of tokens that they are faster for.

    Args:
        time: seconds of one of these calls.
    """
    blocks = [block for _, block in repeated_blocks(model) if any(isinstance(m, Multiplies) for m in block.modules())]
    if not hasattr(model, "sequences") or not blocks:
        return [], []
    pieces, tables = Pieces(), Tables()
    fast = [FastBlock(block, dtype, tables) for block in blocks]
    choices = [_choose(model, fast, tokens, pieces, time) for tokens in counts]
    used = [one for one in fast if one.compiled]
    for one in used:
        one.install()
    return used, choices


def _choose(
    model: Any, fast: Sequence[FastBlock], tokens: int, pieces: Pieces, time: Callable[..., float]
) -> BlockChoice:
    device = next(fast[0].block.parameters()).device
    x = torch.randn(1, tokens, model.activation_width, device=device).to(fast[0].dtype)
    with ExitStack() as stack, torch.no_grad():
        listeners = [stack.enter_context(listened(one.block)) for one in fast]
        positions = torch.arange(tokens, device=device).unsqueeze(0)
        seq = model.sequences(1, tokens, positions, 0, cache=listeners[0])  # as for rows side by side
        heard = [replace(seq, cache=listener) for listener in listeners]
        own = [partial(type(one.block).forward, one.block, x, told) for one, told in zip(fast, heard, strict=True)]
        seconds = time(own)
        try:
            compiled = [CompiledBlock(one.block, x, seq, pieces) for one in fast]
            runs = [partial(one, x, tuple(seq.rope or ()), to) for one, to in zip(compiled, listeners, strict=True)]
            worst = max(_difference(run(), block()) for run, block in zip(runs, own, strict=True))
        except ConfigError as error:
            return BlockChoice(len(fast), tokens, seconds, None, str(error))
        if not worst <= ALLOWED[x.dtype]:
            return BlockChoice(len(fast), tokens, seconds, None, f"compiled, they differ by {worst:.1e}.")
        faster = time(runs)
    if faster >= seconds:
        return BlockChoice(len(fast), tokens, seconds, faster, "compiled, they are no faster.")
    for one, made in zip(fast, compiled, strict=True):
        one.compiled[tokens] = made
    return BlockChoice(len(fast), tokens, seconds, faster)


def _difference(found: Tensor, want: Tensor) -> float:
    """The largest, of the largest number."""
    return float((found - want).abs().max() / want.abs().max())
