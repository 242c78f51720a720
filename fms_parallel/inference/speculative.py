"""Speculative decoding: a cheap proposal of several tokens, which one forward of the model then checks.

    row        t0 t1 t2 | d1 d2 d3        drafted
    forward          t2   d1 d2 d3        chooses behind each: c1 c2 c3 c4
    kept                  c1 = d1, c2 = d2, c3 != d3: the row goes on with c1 c2 c3

What comes out has exactly the model's own distribution. Without a distribution of the draft (prompt lookup, greedy
rows), each position's token is chosen with the random number it would have anyway, so the tokens are those of decoding
without a draft, token by token. With one, a drafted token d is kept with probability min(1, p(d) / q(d)), else one is
drawn from what p has more than q (arXiv 2211.17192, 2302.01318), which keeps more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.inference.sampler import Ask, Sampler
from fms_parallel.inference.sampling import NOT_FINITE, pick, uniform

ACCEPT, REPLACE = 1_000_003, 1_000_033
"""Added to a seed: the numbers that accept, and those that draw a replacement, are none that draw tokens."""


@dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed the latest earlier occurrence of a row's last tokens, in the row itself.

    Attributes:
        tokens: proposed at most. longest, shortest: of the last tokens that are looked for, longest first.
    """

    tokens: int = 4
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 1 <= self.shortest <= self.longest:
            raise ConfigError(f"{self}: tokens must be >= 1, and 1 <= shortest <= longest.")

    def propose(self, row: Sequence[int]) -> list[int]:
        """Tokens that may follow; none where nothing like the end occurred before."""
        for length in range(min(self.longest, len(row) - 1), self.shortest - 1, -1):
            end = list(row[-length:])
            for start in range(len(row) - length - 1, -1, -1):
                if row[start] == end[0] and list(row[start : start + length]) == end:
                    return list(row[start + length : start + length + self.tokens])
        return []


def verify(
    sampler: Sampler,
    logits: Tensor,
    asks: Sequence[Sequence[Ask]],
    drafts: Sequence[tuple[Sequence[int], Tensor | None]],
) -> Tensor:
    """A token for each wanted position, int64 `[W]`; behind the first that differs from its draft they mean nothing.

    Args:
        logits: `[W, run of the vocabulary]`. asks: of each row, one per position. drafts: of each row the n drafted
            tokens (one fewer than positions) and their distributions `[n, V]`, or None.
    """
    tokens = sampler.tokens(logits, [ask for several in asks for ask in several])
    start = 0
    for several, (drafted, q) in zip(asks, drafts, strict=True):
        if q is not None and len(drafted):
            here = slice(start, start + len(drafted))
            p = sampler.probabilities(logits[here], several[:-1])
            own = tokens[here]
            kept = torch.tensor(rejection(p, q, drafted, several), dtype=torch.int64, device=tokens.device)
            tokens[here] = kept.where(own != NOT_FINITE, NOT_FINITE)
        start += len(several)
    return tokens


def rejection(p: Tensor, q: Tensor, drafted: Sequence[int], asks: Sequence[Ask]) -> list[int]:
    """Of n positions the token: the drafted one where accepted, else one from `max(0, p - q)`.

    Args:
        p, q: `[n, V]`, distributions of the model and of the draft.
    """
    kept = []
    for number, token in enumerate(drafted):
        ask = asks[number]
        names = (ask.options.row, len(ask.new))
        if uniform(ask.options.seed + ACCEPT, *names) * float(q[number, token]) < float(p[number, token]):
            kept.append(token)
            continue
        more = (p[number] - q[number]).clamp(min=0).unsqueeze(0)
        if float(more.sum()) == 0.0:  # p and q are equal up to rounding
            more = p[number].unsqueeze(0)
        draw = torch.tensor([uniform(ask.options.seed + REPLACE, *names)], dtype=torch.float64, device=p.device)
        kept.append(int(pick(more, draw)))
    return kept
