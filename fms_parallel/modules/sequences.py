"""`Sequences`: what a block must know about the tokens whose activations it is given.

Activations may be `[B, S, E]` or, under sequence parallelism, a run of tokens `[T/tp, E]`; this value carries what
that form no longer says, and what is the same for every block of one forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.modules.context import Context


class KVStore(Protocol):
    """Where attention keeps keys and values between calls (the inference room has them)."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[B, K, S, D]` behind what `layer` already holds; return all of it, `[B, K, T, D]`."""
        ...


class RaggedStore(Protocol):
    """A store for rows of any lengths side by side in one run of tokens, `[1, N]`: it alone knows whose each token is.

    The model's mask has no say there; what a model restricts, it says as `Sequences.window`.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Store keys and values, `[1, N, K, D]`; let `q [1, N, H, D]` attend to its own rows': `[1, N, H, D]`."""
        ...


@dataclass(frozen=True)
class Wanted:
    """Which logits a caller wants, where "the last so many" does not say it.

    Attributes:
        tokens: int64 `[W]`, indices of positions. whole: with tp, the logits of all V tokens on every rank; otherwise
            each rank keeps those of the run of the vocabulary that it holds.
    """

    tokens: Tensor
    whole: bool = True

    def of(self, x: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, W, E]`."""
        return x[:, self.tokens]


@dataclass(frozen=True)
class DropoutKey:
    """Names the random bits of one forward, the same in every layout.

    Attributes:
        seed: differs for every step (and every use).
        first_token: index of the first token of this micro-batch within the step's global batch.
    """

    seed: int
    first_token: int = 0


@dataclass(frozen=True)
class Sequences:
    """B sequences of S tokens in flight.

    Attributes:
        batch: B. length: S, of this rank's tokens where a sequence is shared.
        rope: (cos, sin), each `[S, R/2]` or `[B, S, R/2]` for R rotated features, or None.
        mask: bool `[B or 1, 1, S, T]`, True where a query may attend; None: what the attention does by itself.
        cache: keys and values of earlier calls, or None. window: a query sees itself and the window - 1 positions
            before it; said to a `RaggedStore` only, for others it is in the mask.
        dropout: the key of this forward's random bits, or None when nothing is dropped.
        positions: `[S]` or `[B, S]`, for models that look positions up in a table.
        token_types: `[B, S]`, for models that look these up too.
        context: which part of longer sequences these are, when several ranks share them; None: all of them.
    """

    batch: int
    length: int
    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    cache: KVStore | RaggedStore | None = None
    dropout: DropoutKey | None = None
    positions: Tensor | None = None
    context: Context | None = None
    window: int | None = None
    token_types: Tensor | None = None

    def __post_init__(self) -> None:
        if self.context is not None and self.cache is not None:
            raise ConfigError("a cache of keys and values does not go with sequences that ranks share (cp).")

    @property
    def ragged(self) -> RaggedStore | None:
        """The cache, where it holds rows of any lengths."""
        return self.cache if hasattr(self.cache, "attend") else None  # type: ignore[return-value]

    @property
    def tokens(self) -> int:
        """T = B * S."""
        return self.batch * self.length

    def numbers(self, tokens: Tensor) -> Tensor:
        """Number within the micro-batch, all ranks' tokens counted, of these of the `tokens` here."""
        return tokens if self.context is None else self.context.numbers(tokens)
