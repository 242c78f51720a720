"""`StagedRunner`: a model cut into pipeline stages, with several groups of rows under way.

    stage 0   A  B  A' B' A" B"             A, B: groups of rows; ': their next tokens
    stage 1      A  B  A' B' A" B"          activations go one way, token ids the other, logits nowhere

Every rank runs the same scheduler, so nobody is told what to compute: a stage knows from the plan what will arrive and
how much of it. A step is begun where the stage before has sent it, its tokens are read when the scheduler cannot go on
without them. It knows stages, ranks and pieces; it knows no requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from fms_parallel.errors import RankFailed
from fms_parallel.inference.channel import ANSWERS, StagedRanks
from fms_parallel.inference.kv_manager import Storage, compute_dtype
from fms_parallel.inference.ragged import Piece, RaggedBatch
from fms_parallel.inference.runner import Answers, Drafts, by_row
from fms_parallel.inference.sampler import Ask, Chosen, Sampler
from fms_parallel.inference.sampling import NOT_FINITE
from fms_parallel.inference.speculative import verify
from fms_parallel.inference.vocabulary import Vocabulary
from fms_parallel.strategy.base import parallel_of


class StagedRunner:
    """A model whose stages lie on several ranks (a `Runner`).

    Args:
        model: cut by `compose`. vocab: its tokens. ranks: who goes on with the same tokens.
    """

    alone = False

    def __init__(self, model: nn.Module, vocab: int, ranks: StagedRanks) -> None:
        parallel = parallel_of(model)
        pipeline: Any = parallel.pipeline
        assert parallel.mesh is not None
        self.ranks, self.channel, self.groups = ranks, ranks.channel, ranks.groups
        self.layout, self.homes, self.line = parallel.layout, list(pipeline.homes), pipeline.group
        self.rank = dist.get_rank(self.line)
        self.stages = sorted(pipeline.stages, key=lambda stage: stage.index)
        for stage in self.stages:
            if isinstance(stage, FSDPModule) and "generate" not in vars(stage):  # not by another engine already
                register_fsdp_forward_method(stage, "generate")  # type: ignore[arg-type]
        self.width: int = model.activation_width  # type: ignore[assignment]
        self.vocab, self.sampler = vocab, Sampler(Vocabulary.of(model, vocab))
        # The first of the ranks that share the last stage speaks for it.
        self.speaker = self.channel.ranks.index(int(parallel.mesh.mesh[self.homes[-1]].flatten()[0]))
        self.dtype = _of_first_rank(compute_dtype(model), self.channel.group)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def begin(
        self, pieces: Sequence[Piece], storage: Storage | None, asks: Sequence[Sequence[Ask]], drafts: Drafts
    ) -> Answers:
        """See `Runner`."""
        logits = self._through(pieces, storage)
        flat = [ask for several in asks for ask in several]
        if not flat:
            return list
        found = None if logits is None else encoded(self._choose(logits, flat, asks, drafts), flat, self.vocab)
        answer = self._answer(found, encoded_size(flat, self.vocab), torch.float64)
        return lambda: by_row(decoded(answer(), flat, self.vocab), asks, drafts)

    def logits(self, pieces: Sequence[Piece], storage: Storage | None) -> Tensor:
        """See `Runner`; here logits do travel, because every rank's caller wants them."""
        found = self._through(pieces, storage, whole=True)
        wanted = sum(piece.wanted for piece in pieces)
        flat = None if found is None else found.to(self.dtype).flatten().cpu()
        return self._answer(flat, wanted * self.vocab, self.dtype)().view(wanted, -1).to(self.ranks.device)

    def likeliest(self, pieces: Sequence[Piece], storage: Storage | None, count: int) -> tuple[Tensor, Tensor]:
        """See `Runner`."""
        logits = self._through(pieces, storage)
        wanted, most = sum(piece.wanted for piece in pieces), min(count, self.vocab)
        flat = None
        if logits is not None:
            values, tokens = self.sampler.vocabulary.log_probabilities(logits, count)
            flat = torch.stack([values, tokens.double()]).flatten().cpu()
        both = self._answer(flat, 2 * wanted * most, torch.float64)().view(2, wanted, most)
        return both[0], both[1].long()

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _through(self, pieces: Sequence[Piece], storage: Storage | None, *, whole: bool = False) -> Tensor | None:
        """The pieces through this rank's stages; logits `[W, run of V or V]` on ranks of the last one."""
        batch = RaggedBatch(pieces, storage, self.ranks.device, whole=whole)
        x: Tensor = batch.input_ids
        for stage in self.stages:
            if not stage.is_first and self.homes[stage.index - 1] != self.rank:
                x = self._receive(batch.input_ids.shape[1], self.homes[stage.index - 1])
            x = stage.generate(x, batch)
            if not stage.is_last and self.homes[stage.index + 1] != self.rank:
                self._send(x, self.homes[stage.index + 1])
        return x[0] if self.stages[-1].is_last else None

    def _receive(self, tokens: int, peer: int) -> Tensor:
        layout = self.layout
        shape = (-(-tokens // layout.tp), self.width) if layout.sp else (1, tokens, self.width)
        x = torch.empty(shape, dtype=self.dtype, device=self.ranks.device)
        try:
            work = dist.irecv(x, group=self.line, group_src=peer)
            assert work is not None
            work.wait()
        except RuntimeError as error:
            self.channel.broken = True
            raise RankFailed(f"pipeline rank {peer} sent nothing: it has died or hangs ({error}).") from error
        return x

    def _send(self, x: Tensor, peer: int) -> None:
        """Start sending. What was sent before as many steps as can be under way has arrived: its tokens are read."""
        x = x.contiguous()
        work = dist.isend(x, group=self.line, group_dst=peer)
        assert work is not None
        self._sent.append((work, x))
        if len(self._sent) > self.groups * len(self.stages):
            self._sent.popleft()[0].wait()

    def _choose(
        self, logits: Tensor, flat: Sequence[Ask], asks: Sequence[Sequence[Ask]], drafts: Drafts
    ) -> list[Chosen]:
        """On all ranks of the last stage."""
        tokens = verify(self.sampler, logits, asks, drafts)
        if any(ask.told is not None for ask in flat):
            tokens = self.ranks.peers.first(tokens)  # they look for the same ones
        return self.sampler.with_logprobs(logits, flat, tokens.tolist())

    def _answer(self, found: Tensor | None, size: int, dtype: torch.dtype) -> Callable[[], Tensor]:
        """What the last stage's first rank has found, `[size]` on the host, once it is there."""
        if self.channel.me != self.speaker:
            return lambda: self.channel.hear(torch.empty(size, dtype=dtype), self.speaker, ANSWERS)
        assert found is not None
        mine = found
        self.channel.tell(mine, ANSWERS)
        return lambda: mine


def _of_first_rank(dtype: torch.dtype, group: dist.ProcessGroup) -> torch.dtype:
    """What the embedding gives: only the first stage has one."""
    told = [dtype]
    dist.broadcast_object_list(told, group=group, group_src=0)
    return told[0]


# ---- tokens as numbers: [token of each ask | of each ask for log-probabilities: its own, n tokens, theirs] --------


def encoded_size(asks: Sequence[Ask], vocab: int) -> int:
    """How many numbers the answers to these are."""
    return len(asks) + sum(1 + 2 * _told(ask, vocab) for ask in asks if ask.told is not None)


def encoded(chosen: Sequence[Chosen], asks: Sequence[Ask], vocab: int) -> Tensor:
    """Answers as fp64 `[encoded_size]`; every token id is exact in it."""
    numbers: list[float] = [one.token for one in chosen]
    for one, ask in zip(chosen, asks, strict=True):
        if ask.told is not None:
            top = one.top or ((0, 0.0),) * _told(ask, vocab)
            numbers += [one.logprob or 0.0, *(token for token, _ in top), *(value for _, value in top)]
    return torch.tensor(numbers, dtype=torch.float64)


def decoded(numbers: Tensor, asks: Sequence[Ask], vocab: int) -> list[Chosen]:
    """The answers back."""
    values: list[float] = numbers.tolist()
    place, found = len(asks), []
    for ask, number in zip(asks, values[: len(asks)], strict=True):
        token = int(number)
        if ask.told is None:
            found.append(Chosen(token))
            continue
        count = _told(ask, vocab)
        own, top = values[place], values[place + 1 : place + 1 + 2 * count]
        place += 1 + 2 * count
        pairs = tuple((int(t), v) for t, v in zip(top[:count], top[count:], strict=True))
        found.append(Chosen(token) if token == NOT_FINITE else Chosen(token, own, pairs))
    return found


def _told(ask: Ask, vocab: int) -> int:
    """Likeliest tokens that are told beside the chosen one."""
    return min(ask.told or 0, vocab)
