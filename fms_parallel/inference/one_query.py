"""Attention of one query per row, as one compiled kernel: it stores the row's key and value, and attends to them all.

    keys [K, C, D]   | other rows | k_0 k_1 ..... k_n-1 | free | other rows |
                     start -------'                     ^ the query's own is written here, and read with the rest

A library's attention multiplies matrices; for one query that costs more than the keys and values take to be read, and
more than twice as much in bf16. On a GPU it is what one wants: there is no kernel of this page.

It knows tensors and where they lie; it knows no rows, no blocks and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fms_parallel import compat
from fms_parallel.modules.scores import scores

ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""Largest difference between what was compiled and what it stands for, of the largest number: what was traced wrongly
is far above, rounding far below."""

TRIED = 192
"""Tokens that a kernel is tried with."""


class Stretch(NamedTuple):
    """Where a row's tokens lie, its query's own last: `[K, C, D]` each, of which tokens start .. start + length."""

    keys: Tensor
    values: Tensor
    start: int
    length: int


def stretches_of(store: Any, layer: int, k: Tensor, window: int | None) -> list[Stretch] | None:
    """One for each row of `k [1, N, K, D]`, where a store can tell; None where it cannot.

    A store that told takes what is to be written there as written.
    """
    tell = getattr(store, "stretches", None)
    return None if tell is None else tell(layer, k, window)  # type: ignore[no-any-return]


class OneQuery:
    """Attention of rows with one query each.

    Args:
        heads: H, K and D of what it is compiled for.
    """

    def __init__(self, heads: tuple[int, int, int], dtype: torch.dtype, scale: float | None) -> None:
        count, kv, width = heads
        q, one = torch.empty(1, 1, count, width, dtype=dtype), torch.empty(1, 1, kv, width, dtype=dtype)
        # Sizes that are alike here would have to be alike in every call.
        capacity, start, length = [n for n in (1009, 11, 101, 1013, 13, 103, 1019, 17, 107) if n not in heads][:3]
        memory = torch.empty(kv, max(capacity, start + length), width, dtype=dtype)
        examples = (q, one, one.clone(), memory, memory.clone(), start, length)
        self._made = compat.compile_over_sizes(_attention(heads, scale), examples)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[Stretch]) -> Tensor:
        """`q [1, N, H, D]`, `k, v [1, N, K, D]` and N stretches -> `[1, N, H, D]`."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if len(rows) == 1:
            return self._made(q, k, v, *rows[0])  # type: ignore[no-any-return]
        ones = zip(*(x.split(1, 1) for x in (q, k, v)), rows, strict=True)
        return torch.cat([self._made(*one, *stretch) for *one, stretch in ones], 1)


def _attention(heads: tuple[int, int, int], scale: float | None) -> Callable[..., Tensor]:
    count, kv, width = heads
    factor = width**-0.5 if scale is None else scale

    def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int, length: int) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, values = keys.view(kv, -1, width), values.view(kv, -1, width)
        for memory, new in ((keys, k), (values, v)):
            memory.narrow(1, start + length - 1, 1).copy_(new.view(kv, 1, width))
        seen, said = (memory.narrow(1, start, length).to(wide).unsqueeze(1) for memory in (keys, values))
        asked = q.view(kv, count // kv, 1, width).to(wide) * factor
        found = (seen * asked).sum(-1)  # [K, H/K, T]
        weights = (found - found.amax(-1, keepdim=True)).exp()
        out = (said * weights.unsqueeze(-1)).sum(2) / weights.sum(-1, keepdim=True)
        return out.to(q.dtype).view(1, 1, count, width)

    return attend


class _Row(NamedTuple):
    """A row to try a kernel with: its query, key and value, and its place in a memory of its own."""

    given: tuple[Tensor, Tensor, Tensor]
    stretch: Stretch

    @classmethod
    def drawn(cls, heads: tuple[int, int, int], dtype: torch.dtype) -> _Row:
        """Tokens 3 .. of a memory with a few more."""
        count, kv, width = heads
        sizes = (1, 1, count, width), (1, 1, kv, width), (1, 1, kv, width), *[(kv, TRIED + 7, width)] * 2
        q, k, v, keys, values = (torch.randn(size).to(dtype) for size in sizes)
        return cls((q, k, v), Stretch(keys, values, 3, TRIED))

    def compiled(self, kernel: OneQuery) -> Tensor:
        """By the kernel."""
        return kernel(*self.given, [self.stretch])

    def plainly(self, scale: float | None) -> Tensor:
        """As a store does it."""
        (q, k, v), (keys, values, start, length) = self.given, self.stretch
        for memory, new in ((keys, k), (values, v)):
            memory[:, start + length - 1] = new[0, 0]
        seen, said = (memory[None, :, start : start + length] for memory in (keys, values))
        return scores(q.view(1, k.shape[2], -1, q.shape[3]), seen, said, None, scale, causal=False).view(q.shape)


class Attentions:
    """Kernels made so far: of the same heads and scale there is one, where it is right and faster.

    Args:
        time: seconds of one of these calls.
    Attributes:
        reason: why some queries have none.
    """

    def __init__(self, time: Callable[[Sequence[Callable[[], Any]]], float]) -> None:
        self._time = time
        self._made: dict[Any, OneQuery | None] = {}
        self.reason = ""

    def of(self, heads: tuple[int, int, int], like: Tensor, scale: float | None) -> OneQuery | None:
        """The one for H, K and D, for tensors like these; if any."""
        if like.device.type != "cpu":
            return None
        key = heads, like.dtype, scale
        if key not in self._made:
            try:
                self._made[key] = self._tried(*key)
            except Exception as error:  # anything, from a compiler
                said = str(error).strip().splitlines() or [""]
                self.reason, self._made[key] = f"cannot be compiled: {type(error).__name__}: {said[0]}", None
        return self._made[key]

    def known(self, heads: tuple[int, int, int], like: Tensor, scale: float | None) -> OneQuery | None:
        """As `of`, of those that there are."""
        return self._made.get((heads, like.dtype, scale))

    def _tried(self, heads: tuple[int, int, int], dtype: torch.dtype, scale: float | None) -> OneQuery | None:
        kernel, rows = OneQuery(heads, dtype, scale), [_Row.drawn(heads, dtype) for _ in range(4)]
        compiled = [partial(row.compiled, kernel) for row in rows]
        plain = [partial(row.plainly, scale) for row in rows]
        worst = max(difference(run(), want()) for run, want in zip(compiled, plain, strict=True))
        if not worst <= ALLOWED[dtype]:
            self.reason = f"compiled, it differs by {worst:.1e}."
        elif self._time(plain) <= self._time(compiled):
            self.reason = "compiled, it is no faster."
        else:
            return kernel
        return None


def difference(found: Tensor, want: Tensor) -> float:
    """The largest, of the largest number; infinite where one is none."""
    worst = float((found - want).abs().max() / want.abs().max())
    return worst if worst == worst else float("inf")
