"""`ScheduleGeneration`: generation by hand, in its two phases: prompts, then a token at a time.

It knows rows and logits; what to do with them is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.inference.options import check_tokens, read_prompt
from fms_parallel.inference.tables import HeldRow

if TYPE_CHECKING:
    from fms_parallel.inference.by_hand import ByHand


class ScheduleGeneration:
    """Rows that a caller drives.

        logits = generation.prefill(input_ids)                       # [B, V]
        logits = generation.decode_step(tokens, positions)           # [B, V], as often as wanted

    On several ranks all make the same calls. Its rows hold blocks of the engine's cache until `close`.
    """

    def __init__(self, engine: ByHand) -> None:
        self.engine = engine
        self.rows: list[HeldRow] = []

    def prefill(self, input_ids: Tensor | Sequence[Sequence[int]], *, chunk: int | None = None) -> Tensor:
        """Compute prompts; logits `[B, V]` behind the last token of each.

        Args:
            input_ids: `[B, S]`, or rows of any lengths. chunk: tokens of a row per forward, at most (None: all).
        Raises:
            ConfigError: an empty row, a token outside the vocabulary, more tokens than fit.
        """
        if chunk is not None and chunk < 1:
            raise ConfigError(f"chunk={chunk}: compute at least 1 token at a time.")
        rows = [read_prompt(f"row {n}", ids) for n, ids in enumerate(input_ids)]
        for n, ids in enumerate(rows):
            check_tokens(f"row {n}", ids, self.engine.vocab)
            self._check_length(f"row {n}", len(ids))
        self._check_count(len(rows))
        self.close()
        with self.engine.by_hand():
            self.rows = []
            try:
                for ids in rows:  # one by one: those that were begun are given back when the next does not fit
                    self.rows.append(HeldRow(ids, self.engine.pool))
                return self._forward(chunk)
            except Exception:
                self.close()
                raise

    def decode_step(self, tokens: Tensor | Sequence[int], positions: Tensor | Sequence[int] | int) -> Tensor:
        """One token of each row; logits `[B, V]` behind it.

        Args:
            tokens: `[B]`. positions: of the tokens, `[B]` or one for all; one that is not the next forgets what is
                behind it.
        Raises:
            ConfigError: as `prefill`, or a position that leaves a gap.
        """
        ids = read_prompt("tokens", tokens)
        places = [positions] * len(ids) if isinstance(positions, int) else list(read_prompt("positions", positions))
        if not len(ids) == len(places) == len(self.rows):
            raise ConfigError(f"{len(ids)} tokens at {len(places)} positions for {len(self.rows)} rows: one for each.")
        check_tokens("tokens", ids, self.engine.vocab)
        for n, (row, place) in enumerate(zip(self.rows, places, strict=True)):
            if not 0 < place <= len(row.tokens):
                raise ConfigError(f"row {n} has {len(row.tokens)} tokens: its next position is that, not {place}.")
            self._check_length(f"row {n}", place + 1)
        for row, token, place in zip(self.rows, ids, places, strict=True):
            row.replace(place, token)
        with self.engine.by_hand():
            return self._forward(None)

    def close(self) -> None:
        """Give the blocks back."""
        for row in self.rows:
            row.close()
        self.rows = []

    def _forward(self, chunk: int | None) -> Tensor:
        """Compute what rows have not; the logits behind each of them."""
        engine = self.engine
        found: dict[int, Tensor] = {}
        waiting = list(enumerate(self.rows))
        while waiting:
            pieces = [row.piece(1, engine.setup.chunk(chunk)) for _, row in waiting]
            logits = engine.runner.logits(pieces, engine.storage)
            done = [number for (number, _), piece in zip(waiting, pieces, strict=True) if piece.wanted]
            found.update(zip(done, logits, strict=True))
            for (_, row), piece in zip(waiting, pieces, strict=True):
                row.did(piece)
            waiting = [(number, row) for number, row in waiting if number not in found]
        return torch.stack([found[number] for number in range(len(self.rows))])

    def _check_length(self, name: str, tokens: int) -> None:
        longest = self.engine.setup.longest
        if tokens > longest:
            raise ConfigError(f"{name} would have {tokens} tokens, but max_seq_len={longest}.")

    def _check_count(self, rows: int) -> None:
        most = self.engine.setup.rows
        if not 0 < rows <= most:
            raise ConfigError(f"{rows} rows: this engine runs 1..{most} at a time (max_batch_size).")
