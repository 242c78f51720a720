"""Masked-language-model rows: some tokens hidden, and asked for where they stood (arXiv 1810.04805, 1907.11692).

    tokens   a    b    c    d    e    f
    chosen        x         x    x                   a seventh of them or so
    input    a  <mask>  c    d    q    f             8 in 10 hidden, 1 in 10 another token, 1 in 10 as it was
    labels   -    b    -    d    e    -              - IGNORE

What is hidden is drawn anew at every step from (seed, step, row) only. It knows rows; it knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fms_parallel.data.rows import IGNORE, RowDataset, seeded
from fms_parallel.errors import ConfigError

HIDDEN, KEPT = 0.8, 0.1
"""Of the chosen tokens: the share that is hidden, the share that stays; the rest becomes a random token."""


@dataclass(frozen=True)
class Masking:
    """What is hidden, and behind what.

    Attributes:
        mask_id: the token that hides others. vocab_size: random tokens are below it.
        special_ids: tokens that are neither hidden nor put in another's place (mask_id needs not be named).
        fraction: of the tokens that are chosen.
    Raises:
        ConfigError: a fraction outside (0, 1), a mask that is no token, no ordinary token.
    """

    mask_id: int
    vocab_size: int
    special_ids: Collection[int] = ()
    fraction: float = 0.15
    _special: Tensor = field(init=False, repr=False, compare=False)
    _ordinary: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(f"mask fraction {self.fraction}: must lie between 0 and 1, usually 0.15.")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ConfigError(f"mask id {self.mask_id} is none of {self.vocab_size} tokens.")
        special = {*self.special_ids, self.mask_id}
        ordinary = [token for token in range(self.vocab_size) if token not in special]
        if not ordinary:
            raise ConfigError(f"all {self.vocab_size} tokens are special: there is nothing to hide.")
        object.__setattr__(self, "_special", torch.tensor(sorted(special)))
        object.__setattr__(self, "_ordinary", torch.tensor(ordinary))

    def hide(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and labels `[S]` of the row `tokens [S]`; at least one token is chosen where one may be."""
        choice, fate = torch.rand(2, len(tokens), generator=generator)
        others = self._ordinary[torch.randint(len(self._ordinary), tokens.shape, generator=generator)]
        may = ~torch.isin(tokens, self._special)
        chosen = may & (choice < self.fraction)
        if may.any() and not chosen.any():
            chosen[choice.where(may, 1.0).argmin()] = True
        inputs = torch.where(fate < HIDDEN, self.mask_id, torch.where(fate < HIDDEN + KEPT, tokens, others))
        return inputs.where(chosen, tokens), tokens.where(chosen, IGNORE)


@dataclass(frozen=True)
class MaskedRows:
    """The inputs of other rows, masked. Rows as such are those of step 0, for validation.

    Attributes:
        rows: whose inputs are taken; their labels are not read. seed, step: what is hidden is drawn from.
    """

    rows: RowDataset
    masking: Masking
    seed: int
    step: int = 0

    @property
    def seq_len(self) -> int:
        return self.rows.seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, step: int) -> MaskedRows:
        """The same rows in step `step`."""
        return replace(self, step=step)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Row `index` as `(input_ids [S], labels [S])`."""
        return self.masking.hide(self.rows.row(index)[0], seeded(self.seed, self.step, index))
