"""`Runner`: what the engine asks of a model, and `ModelRunner`: a model in this process, with its tp ranks.

    engine --pieces, asks--> runner: forward, choose --tokens--> engine

Tokens come back, not logits, and when they are asked for: a runner whose model lies in stages on other ranks
(inference/staged.py) chooses where its logits are, and has several steps under way. It knows a module with the forward
of `CausalModel`; it knows no schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from fms_parallel.strategy.base import parallel_of

Drafts = Sequence[tuple[Sequence[int], Tensor | None]]
"""Of each piece that wants logits: the drafted tokens, and the distributions `[n, V]` that they were drawn from."""

Answers = Callable[[], list[list[Chosen]]]
"""Waits for the new tokens of each piece that wanted logits, the same on every rank."""


class Runner(Protocol):
    """Runs pieces of rows. Every method is collective: all ranks call it with the same arguments.

    Attributes:
        alone: no other rank takes part. groups: steps that may be under way, each with rows of its own.
    """

    alone: bool
    groups: int

    def begin(
        self, pieces: Sequence[Piece], storage: Storage | None, asks: Sequence[Sequence[Ask]], drafts: Drafts
    ) -> Answers:
        """One forward of these pieces; what it returns gives their tokens, in the order in which steps were begun.

        Args:
            asks: of each piece that wants logits, one per wanted position. drafts: of each, see `verify`.
        """
        ...

    def logits(self, pieces: Sequence[Piece], storage: Storage | None) -> Tensor:
        """Logits `[W, V]` of the W positions that the pieces want, on every rank. Nothing else is under way."""
        ...

    def likeliest(self, pieces: Sequence[Piece], storage: Storage | None, count: int) -> tuple[Tensor, Tensor]:
        """Of each wanted position the `count` largest log-probabilities and their tokens, `[W, min(count, V)]` fp64.

        NaN where the logits are no distribution. The same on every rank. Nothing else is under way.
        """
        ...


class ModelRunner:
    """A model whose stages all lie in this process.

    Args:
        model: a `CausalModel`. vocab: its tokens. ranks: who goes on with the same tokens.
    """

    groups = 1

    def __init__(self, model: nn.Module, vocab: int, ranks: SameOnAllRanks) -> None:
        self.model, self.ranks, self.alone = model, ranks, ranks.alone
        self.vocabulary = Vocabulary.of(model, vocab)
        self.sampler = Sampler(self.vocabulary)

    def forward(self, pieces: Sequence[Piece], storage: Storage | None, *, whole: bool = False) -> Tensor:
        """Logits `[W, V]` of the W positions that the pieces want; whole=False: this rank's run of the vocabulary."""
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

    def begin(
        self, pieces: Sequence[Piece], storage: Storage | None, asks: Sequence[Sequence[Ask]], drafts: Drafts
    ) -> Answers:
        """See `Runner`; the tokens are there already."""
        logits = self.forward(pieces, storage)
        flat = [ask for several in asks for ask in several]
        if not flat:
            return list
        tokens = self.ranks.first(verify(self.sampler, logits, asks, drafts)).tolist()
        found = by_row(self.sampler.with_logprobs(logits, flat, tokens), asks, drafts)
        return lambda: found

    def logits(self, pieces: Sequence[Piece], storage: Storage | None) -> Tensor:
        """See `Runner`."""
        return self.forward(pieces, storage, whole=True)

    def likeliest(self, pieces: Sequence[Piece], storage: Storage | None, count: int) -> tuple[Tensor, Tensor]:
        """See `Runner`."""
        values, tokens = self.vocabulary.log_probabilities(self.forward(pieces, storage), count)
        both = self.ranks.first(torch.stack([values, tokens.double()]).to(self.ranks.device))
        return both[0], both[1].long()


def by_row(chosen: Sequence[Chosen], asks: Sequence[Sequence[Ask]], drafts: Drafts) -> list[list[Chosen]]:
    """The tokens of all wanted positions -> of each row those that count: up to the first that is not as drafted."""
    rows, start = [], 0
    for several, (drafted, _) in zip(asks, drafts, strict=True):
        rows.append(_accepted(list(chosen[start : start + len(several)]), drafted))
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
        # Styles of a tensor plan watch versions of activations, which tensors of inference_mode have not.
        planned = getattr(model, "watches_versions", False)
        self._gathers = planned or any(isinstance(module, FSDPModule) for module in model.modules())
        # Stages keep what they gathered, for many steps; the next optimizer step would not reach that.
        pipeline = parallel_of(model).pipeline
        parts = (part for stage in (pipeline.stages if pipeline is not None else ()) for part in stage.modules())
        self._gathered = [part for part in parts if isinstance(part, FSDPModule)]

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
            for part in self._gathered:
                part.reshard()
