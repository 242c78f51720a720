"""Beam search: at each step the continuations of all beams compete, and the likeliest go on.

    beams 2    a -- ac -- acb        candidates of a step: 2 per beam that goes on and 1 for each eos, over all beams;
               b -- ad -- adc        those that end are set aside, scored by  sum of log p / tokens ** length_penalty

Beams with the same past share its blocks; one that splits copies its last block only. Where ranks share the vocabulary
they exchange the candidates. The rules, and what ends the search, are those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fms_parallel.errors import ConfigError, FmsError, unknown
from fms_parallel.inference.request import Endings, Ids
from fms_parallel.inference.tables import HeldRow

if TYPE_CHECKING:
    from fms_parallel.inference.by_hand import ByHand


@dataclass(frozen=True)
class Hypothesis:
    """A continuation: its new tokens (with the eos that ended it), their text, and its score."""

    tokens: Ids
    score: float
    text: str = ""


@dataclass(frozen=True)
class BeamSearch:
    """What is searched for.

    Attributes:
        beams: that go on at each step. max_new_tokens: at most. length_penalty: above 0 it favours long continuations.
        early_stopping: stop at the first `beams` that have ended, rather than when no beam looks better than those.
        returned: hypotheses wanted, at most `beams`. endings: tokens that end one.
    """

    beams: int = 4
    max_new_tokens: int = 128
    length_penalty: float = 1.0
    early_stopping: bool = False
    returned: int = 1
    endings: Endings = field(default_factory=Endings)

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise ConfigError(f"{name}={value!r}: must be {_SAID[kinds]}.")
        if self.beams < 1 or self.max_new_tokens < 1:
            raise ConfigError(f"beams={self.beams}, max_new_tokens={self.max_new_tokens}: both must be >= 1.")
        if not 1 <= self.returned <= self.beams:
            raise ConfigError(f"returned={self.returned}: from 1 to beams={self.beams}.")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty={self.length_penalty}: must be a finite number.")

    @classmethod
    def read(cls, words: Mapping[str, Any], eos_id: int | None = None) -> BeamSearch:
        """From what a caller passes; `eos_id` in the words replaces the one given."""
        given = dict(words)
        ending = given.pop("eos_id", eos_id)
        known = [f.name for f in fields(cls) if f.name != "endings"]
        for name in given:
            if name not in known:
                raise ConfigError(unknown("option of beam search", name, [*known, "eos_id"]))
        return cls(**given, endings=Endings.read(ending, ()))

    def run(self, prompt: Ids, engine: ByHand) -> list[Hypothesis]:
        """Search from `prompt`, with blocks of the engine's cache.

        Raises:
            ConfigError: the beams do not fit. FmsError: logits are NaN or infinite.
        """
        longest = engine.setup.longest
        if len(prompt) + self.max_new_tokens > longest:
            raise ConfigError(f"{len(prompt)} and {self.max_new_tokens} new tokens are beyond max_seq_len={longest}.")
        search = _Search(self, prompt, engine)
        try:
            return search.run()
        finally:
            search.close()


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("beams", "max_new_tokens", "returned"), int),
    **{"length_penalty": (int, float), "early_stopping": bool},
}
_SAID: dict[Any, str] = {int: "a whole number", (int, float): "a number", bool: "True or False"}

Candidate = tuple[float, int, int]
"""Score so far, number of the beam, token."""


class _Search:
    def __init__(self, rules: BeamSearch, prompt: Ids, engine: ByHand) -> None:
        self.rules, self.prompt, self.engine = rules, prompt, engine
        self.rows = [HeldRow(prompt, engine.pool)]
        self.scores = [0.0]
        self.ended: list[tuple[float, Ids]] = []

    def run(self) -> list[Hypothesis]:
        rules = self.rules
        for length in range(1, rules.max_new_tokens + 1):
            going = self._sort_out(self._candidates(), length)
            if not going or self._settled(going[0][0], length):
                break
            self._go_on(going)
        tokenizer = self.engine.tokenizer
        return [
            Hypothesis(tokens, score, "" if tokenizer is None else tokenizer.decode(tokens))
            for score, tokens in self.ended[: rules.returned]
        ]

    def close(self) -> None:
        for row in self.rows:
            row.close()

    def _candidates(self) -> list[Candidate]:
        """One forward; the likeliest continuations of all beams, best first."""
        engine, rules = self.engine, self.rules
        pieces = [row.piece(1, engine.setup.chunk(None)) for row in self.rows]
        while not all(piece.wanted for piece in pieces):  # a prompt in chunks
            engine.runner.logits(pieces, engine.storage)
            for row, piece in zip(self.rows, pieces, strict=True):
                row.did(piece)
            pieces = [row.piece(1, engine.setup.chunk(None)) for row in self.rows]
        count = rules.beams * max(2, 1 + len(rules.endings.eos))
        values, tokens = engine.runner.likeliest(pieces, engine.storage, count)
        if not values[:, 0].isfinite().all():
            raise FmsError("the logits are NaN or infinite: check the weights.")
        for row, piece in zip(self.rows, pieces, strict=True):
            row.did(piece)
        found = [
            (self.scores[beam] + value, beam, token)
            for beam, (v, t) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True))
            for value, token in zip(v, t, strict=True)
        ]
        return sorted(found, key=lambda one: -one[0])[:count]

    def _sort_out(self, candidates: list[Candidate], length: int) -> list[Candidate]:
        """Set those aside that have ended; the others, as many as there are beams."""
        rules, going = self.rules, []
        full = rules.early_stopping and len(self.ended) >= rules.beams
        for place, (score, beam, token) in enumerate(candidates):
            if token not in rules.endings.eos and length < rules.max_new_tokens:
                going.append((score, beam, token))
            elif place < rules.beams and not full:
                tokens = (*self.rows[beam].tokens[len(self.prompt) :], token)
                self.ended.append((score / length**rules.length_penalty, tokens))
        self.ended = sorted(self.ended, key=lambda one: -one[0])[: rules.beams]
        return going[: rules.beams]

    def _settled(self, best: float, length: int) -> bool:
        """Whether enough have ended, or none that goes on looks better than the worst of those."""
        if len(self.ended) < self.rules.beams:
            return False
        return self.rules.early_stopping or best / length**self.rules.length_penalty <= self.ended[-1][0]

    def _go_on(self, going: list[Candidate]) -> None:
        """Beams split, go on or are given up."""
        children: list[HeldRow | None] = [None] * len(going)
        parents = self.rows
        used = {beam for _, beam, _ in going}
        for number, row in enumerate(parents):
            if number not in used:
                row.close()
        taken: set[int] = set()
        for place, (_, beam, _) in enumerate(going):
            if beam not in taken:
                taken.add(beam)
                children[place] = parents[beam]
        self.rows = [parents[beam] for beam in sorted(taken)]  # what `close` must know of, should a fork fail
        for place, (_, beam, _) in enumerate(going):
            if children[place] is None:
                fork = parents[beam].fork(self.engine.storage)
                children[place] = fork
                self.rows.append(fork)
        self.rows = [row for row in children if row is not None]
        self.scores = [score for score, _, _ in going]
        for row, (_, _, token) in zip(self.rows, going, strict=True):
            row.tokens.append(token)
