"""`Runner`: what the engine asks of a model, and `ModelRunner`: a model in this process, with its tp ranks.

    engine --pieces, asks--> runner: forward, choose --tokens--> engine

Tokens come back, not logits, so that a runner whose model lies in stages on other ranks is free to choose where its
logits are. It knows a module with the forward of `CausalModel`; it knows no schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fms_parallel.inference.kv_manager import Storage
from fms_parallel.inference.ragged import Piece, RaggedBatch
from fms_parallel.inference.ranks import SameOnAllRanks
from fms_parallel.inference.sampler import Ask, Chosen, Sampler
from fms_parallel.inference.speculative import verify
from fms_parallel.inference.vocabulary import Vocabulary


class Runner(Protocol):
    """Runs pieces of rows. Every method is collective: all ranks call it with the same arguments.

    Attributes:
        alone: no other rank takes part. vocabulary: the run of it whose logits `forward` gives.
    """

    alone: bool
    vocabulary: Vocabulary

    def forward(self, pieces: Sequence[Piece], storage: Storage | None, *, whole: bool = False) -> Tensor:
        """Logits `[W, V]` of the W positions that the pieces want; whole=False: this rank's run of the vocabulary."""
        ...

    def choose(
        self, pieces: Sequence[Piece], storage: Storage | None, asks: Sequence[Sequence[Ask]], drafts: Drafts
    ) -> list[list[Chosen]]:
        """Forward, then the new tokens of each piece that wants logits, the same on every rank.

        Args:
            asks: of each such piece, one per wanted position. drafts: what was proposed for it, see `verify`.
        """
        ...


Drafts = Sequence[tuple[Sequence[int], Tensor | None]]
"""Of each piece that wants logits: the drafted tokens, and the distributions `[n, V]` that they were drawn from."""


class ModelRunner:
    """A model whose stages all lie in this process.

    Args:
        model: a `CausalModel`. vocab: its tokens. ranks: who goes on with the same tokens.
    """

    def __init__(self, model: nn.Module, vocab: int, ranks: SameOnAllRanks) -> None:
        self.model, self.ranks, self.alone = model, ranks, ranks.alone
        self.vocabulary = Vocabulary.of(model, vocab)
        self.sampler = Sampler(self.vocabulary)

    def forward(self, pieces: Sequence[Piece], storage: Storage | None, *, whole: bool = False) -> Tensor:
        """See `Runner`."""
        batch = RaggedBatch(pieces, storage, self.ranks.device, whole=whole)
        logits: Tensor = self.model(
            batch.input_ids,
            positions=batch.positions,
            first_position=batch.first_position,
            mask=None,
            cache=batch,
            last=batch.wanted,
        )
        return logits[0]

    def choose(
        self, pieces: Sequence[Piece], storage: Storage | None, asks: Sequence[Sequence[Ask]], drafts: Drafts
    ) -> list[list[Chosen]]:
        """See `Runner`."""
        logits = self.forward(pieces, storage)
        flat = [ask for several in asks for ask in several]
        if not flat:
            return []
        tokens = self.ranks.first(verify(self.sampler, logits, asks, drafts)).tolist()
        chosen = self.sampler.with_logprobs(logits, flat, tokens)
        rows, start = [], 0
        for several, (drafted, _) in zip(asks, drafts, strict=True):
            rows.append(_accepted(chosen[start : start + len(several)], drafted))
            start += len(several)
        return rows


def _accepted(chosen: list[Chosen], drafted: Sequence[int]) -> list[Chosen]:
    """Up to and including the first token that is not the drafted one: what follows saw another row."""
    for number, token in enumerate(drafted):
        if chosen[number].token != token:
            return chosen[: number + 1]
    return chosen


class EvalMode:
    """Eval mode while steps run; afterwards every module is in the mode it was in.

    Attributes:
        held: `leave` does nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.held = model, False
        self._training: list[nn.Module] = []
        self._gathers = any(isinstance(module, FSDPModule) for module in model.modules())

    def no_gradients(self) -> torch.no_grad | torch.inference_mode:
        """inference_mode saves a tenth of a small model's step; FSDP keeps what its first forward makes: not there."""
        return torch.no_grad() if self._gathers else torch.inference_mode()

    def enter(self) -> None:
        """Eval mode."""
        if self.model.training:
            self._training += [module for module in self.model.modules() if module.training]
            self.model.eval()

    def leave(self) -> None:
        """The mode it was in, unless eval mode is held."""
        if not self.held:
            for module in self._training:
                module.training = True
            self._training = []
