"""One token per row of logits, each row by its own rules, in any layout the same.

A row's token is a function of its logits, its rules and (seed, row, step): see inference/sampling.py, whose rules these
are. Here rows with different rules are chosen from together, and where ranks share the vocabulary they exchange a few
candidates instead of logits: all that a rule needs to know of tokens nobody will choose is the sum of their masses.
It knows logits and rules; it knows no models, caches or schedules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fms_parallel.inference.options import Options
from fms_parallel.inference.sampling import NOT_FINITE, pick, uniform
from fms_parallel.inference.vocabulary import Vocabulary

FIRST_LOOK = 64
"""Candidates with which top_p and min_p are tried before all logits are gathered."""
TOLD_AT_ONCE = 64
"""Rows whose logits are widened to fp64 at a time to tell log-probabilities: a prompt may have hundreds."""


@dataclass(frozen=True)
class Ask:
    """By which rules one row of logits is chosen from.

    Attributes:
        prompt, new: the row's tokens so far; the one chosen is new token `len(new)`.
        given: the token that stands there already, in a prompt: only its log-probability is wanted.
    """

    options: Options
    prompt: Sequence[int]
    new: Sequence[int]
    given: int | None = None

    @property
    def told(self) -> int | None:
        """Of how many of the likeliest the log-probability is to be told beside its own; None: of none."""
        return self.options.logprobs if self.given is None else self.options.prompt_logprobs

    @property
    def early(self) -> bool:
        """Whether nothing may end the row yet."""
        return len(self.new) < self.options.min_new_tokens

    @property
    def penalised(self) -> bool:
        """Whether its logits are changed before a token is chosen."""
        return self.options.penalised or (self.early and bool(self.options.endings.eos))


@dataclass(frozen=True)
class Chosen:
    """One new token.

    Attributes:
        token: `NOT_FINITE` where the logits are no distribution.
        logprob: of it under the model's own distribution (before temperature and penalties), if asked for.
        top: the likeliest (token, logprob), as many as were asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses from logits `[R, run of the vocabulary]`. Its methods are collective over tp."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def tokens(self, logits: Tensor, asks: Sequence[Ask]) -> Tensor:
        """One token per row, int64 `[R]`."""
        free = [row for row, ask in enumerate(asks) if ask.given is None]
        if len(free) < len(asks):
            given = [NOT_FINITE if ask.given is None else ask.given for ask in asks]
            out = torch.tensor(given, dtype=torch.int64, device=logits.device)
            if free:
                out[free] = self.tokens(logits[free], [asks[row] for row in free])
            return out
        logits = self.penalised(logits, asks)
        greedy = [row for row, ask in enumerate(asks) if ask.options.temperature == 0]
        drawn = [row for row, ask in enumerate(asks) if ask.options.temperature > 0]
        if not drawn:
            return self._likeliest(logits)
        out = torch.empty(len(asks), dtype=torch.int64, device=logits.device)
        if greedy:
            out[greedy] = self._likeliest(logits[greedy])
        out[drawn] = self._drawn(logits[drawn], [asks[row] for row in drawn])
        return out

    def with_logprobs(self, logits: Tensor, asks: Sequence[Ask], tokens: Sequence[int]) -> list[Chosen]:
        """The tokens that were chosen, with what each row wants to be told beside."""
        told = [row for row, ask in enumerate(asks) if ask.told is not None and tokens[row] != NOT_FINITE]
        chosen = [Chosen(token) for token in tokens]
        for start in range(0, len(told), TOLD_AT_ONCE):
            rows = told[start : start + TOLD_AT_ONCE]
            counts = [asks[row].told or 0 for row in rows]
            for row, found in zip(rows, self._told(logits[rows], [tokens[r] for r in rows], counts), strict=True):
                chosen[row] = found
        return chosen

    def probabilities(self, logits: Tensor, asks: Sequence[Ask]) -> Tensor:
        """The distribution that rows at a temperature > 0 are drawn from, fp64 `[R, V]`, on every rank."""
        x = self.vocabulary.whole(self.penalised(logits, asks))
        rows = []
        for row, ask in zip(x, asks, strict=True):
            kept = ask.options.sampling.probabilities(row.unsqueeze(0))[0]
            if ask.options.min_p:
                scaled = (row.double() - row.double().max()) / ask.options.temperature
                kept = kept.masked_fill(scaled < math.log(ask.options.min_p), 0.0)
                kept = kept / kept.sum()
            rows.append(kept)
        return torch.stack(rows)

    def penalised(self, logits: Tensor, asks: Sequence[Ask]) -> Tensor:
        """Logits after penalties and biases; the same tensor where no row has any."""
        if not any(ask.penalised for ask in asks):
            return logits
        logits = logits.clone()
        for row, ask in zip(logits, asks, strict=True):
            if ask.penalised:
                self._penalise(row, ask)
        return logits

    # ---- rules -------------------------------------------------------------------------------------------------

    def _penalise(self, row: Tensor, ask: Ask) -> None:
        options = ask.options
        seen = self._here(row, sorted({*ask.prompt, *ask.new}))
        if options.repetition_penalty != 1 and len(seen):
            values = row[seen]
            penalty = options.repetition_penalty
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        added = Counter[int]()
        for token, times in Counter(ask.new).items():
            added[token] -= options.presence_penalty + options.frequency_penalty * times  # type: ignore[assignment]
        for token, bias in options.logit_bias:
            added[token] += bias  # type: ignore[assignment]
        mine = {token: x for token, x in added.items() if 0 <= token - self.vocabulary.first < row.shape[-1]}
        if mine:
            row[self._here(row, list(mine))] += torch.tensor(list(mine.values()), dtype=row.dtype, device=row.device)
        if ask.early:
            row[self._here(row, list(options.endings.eos))] = -math.inf

    def _here(self, row: Tensor, tokens: list[int]) -> Tensor:
        """Indices of those tokens whose logits are held here."""
        places = torch.tensor(tokens, dtype=torch.int64, device=row.device) - self.vocabulary.first
        return places[(places >= 0) & (places < row.shape[-1])]

    def _likeliest(self, logits: Tensor) -> Tensor:
        best, tokens = self.vocabulary.largest(logits)
        return tokens.where(best.isfinite(), NOT_FINITE)

    def _drawn(self, logits: Tensor, asks: Sequence[Ask]) -> Tensor:
        """Tokens of rows at a temperature > 0."""
        best, _ = self.vocabulary.largest(logits)
        temperature = _column([ask.options.temperature for ask in asks], logits)
        scaled = (logits.double() - best.unsqueeze(-1)) / temperature
        draws = [uniform(ask.options.seed, ask.options.row, len(ask.new)) for ask in asks]
        draw = torch.tensor(draws, dtype=torch.float64, device=logits.device)
        limited = [row for row, ask in enumerate(asks) if _limited(ask.options)]
        free = [row for row, ask in enumerate(asks) if not _limited(ask.options)]
        out = torch.empty(len(asks), dtype=torch.int64, device=logits.device)
        if free:
            out[free] = self.vocabulary.pick(scaled[free].exp(), draw[free])
        if limited:
            out[limited] = self._limited(scaled[limited], [asks[row].options for row in limited], draw[limited])
        return out.where(best.isfinite(), NOT_FINITE)

    def _limited(self, scaled: Tensor, rules: Sequence[Options], draw: Tensor) -> Tensor:
        """Tokens of rows that keep some candidates only; logits are scaled already, the largest is 0."""
        total = self.vocabulary.gather(scaled.exp().sum(-1, keepdim=True)).sum(0)
        count = max(FIRST_LOOK, *(rule.top_k or 0 for rule in rules))
        values, tokens = self.vocabulary.candidates(scaled, count)
        kept, enough = _keep(values, total, rules)
        if not enough:
            values, tokens = self.vocabulary.candidates(scaled, self.vocabulary.size)
            kept, _ = _keep(values, total, rules)
        order = tokens.argsort(-1)
        places = pick(kept.gather(1, order), draw)
        return tokens.gather(1, order).gather(1, places.clamp(min=0).unsqueeze(-1)).squeeze(-1)

    def _told(self, logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Chosen]:
        """Log-probabilities of these tokens and of the likeliest."""
        best, _ = self.vocabulary.largest(logits)
        x = logits.double() - best.unsqueeze(-1)
        places = torch.tensor(tokens, device=logits.device).unsqueeze(-1) - self.vocabulary.first
        here = (places >= 0) & (places < x.shape[-1])
        own = torch.full_like(places, -math.inf, dtype=torch.float64)
        if x.shape[-1]:
            own = x.gather(1, places.where(here, 0)).where(here, own)
        both = self.vocabulary.gather(torch.cat([x.exp().sum(-1, keepdim=True), own], -1))
        normaliser = both[..., 0].sum(0).log()
        chosen = (both[..., 1].amax(0) - normaliser).tolist()
        most = max(counts)
        values, top = self.vocabulary.candidates(x, most) if most else (x[:, :0], places[:, :0])
        values = values - normaliser.unsqueeze(-1)
        pairs = [list(zip(t, v, strict=True)) for t, v in zip(top.tolist(), values.tolist(), strict=True)]
        return [Chosen(t, p, tuple(row[:n])) for t, p, row, n in zip(tokens, chosen, pairs, counts, strict=True)]


def _limited(options: Options) -> bool:
    """Whether some tokens are dropped before one is drawn."""
    return options.top_k is not None or options.min_p > 0 or (options.top_p is not None and options.top_p < 1)


def _keep(values: Tensor, total: Tensor, rules: Sequence[Options]) -> tuple[Tensor, bool]:
    """Masses of the candidates that each row's rules keep, 0 for the others; and whether no further one is kept.

    Args:
        values: `[R, C]`, scaled logits in falling order, the first 0. total: `[R, 1]`, mass of all tokens.
    """
    count = values.shape[1]
    places = torch.arange(count, device=values.device)
    most = _column([rule.top_k or math.inf for rule in rules], values)
    mass = values.exp() * (places < most)
    whole = torch.where(most.isinf(), total, mass.sum(-1, keepdim=True))  # top_p is of what top_k leaves
    share = mass / whole
    p = _column([1.0 if rule.top_p is None else rule.top_p for rule in rules], values)
    floor = _column([math.log(rule.min_p) if rule.min_p else -math.inf for rule in rules], values)
    before = share.cumsum(-1) - share
    kept = (places < most) & ((before < p) | (p == 1)) & (values >= floor)
    enough = bool((~kept[:, -1] | (most.squeeze(-1) <= count)).all())
    return mass * kept, enough


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device).unsqueeze(-1)
