"""Encoders over pipeline stages and shared rows, padding included: loss, norm and every gradient of one process.

A job compares many layouts, so that the ranks start once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.mesh import data_shard
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.strategy.base import parallel_of
from fms_parallel.training.step import backward, count_tokens, dropout_keys, summarise
from fms_parallel.verify import TOLERANCE
from tests.poison import poisoned_memory

S, V = 13, 97
LENGTHS = torch.tensor([13, 5, 1, 13, 9, 4, 2, 7])
"""Of rows that are padded to S; with cp = 2 or 4 whole chunks of some are padding."""

TINY: dict[str, Any] = {
    **{"vocab_size": V, "width": 16, "layers": 4, "heads": 4, "ffn_width": 23, "max_positions": 16, "padding_id": 1},
    **{"dropout": 0.0, "attention_dropout": 0.0, "std": 0.2},
}
BERT: dict[str, Any] = {"positions": "bert", "token_types": 2}
DROPS = {"dropout": 0.2, "attention_dropout": 0.3}
HEADS: dict[str, dict[str, Any]] = {
    "roberta": {},
    "roberta_classification": {"classes": 3},
    "roberta_question_answering": {},
}

TWO = (
    *("pp=2", "pp=2,schedule=gpipe,microbatches=3", "pp=2,schedule=interleaved1f1b,stage_split=1,1,1,1"),
    *("pp=2,schedule=looped_bfs", "pp=2,schedule=interleaved_zero_bubble", "pp=2,schedule=zbv"),
    *("pp=2,schedule=dualpipev", "cp=2", "cp=2,cp_method=allgather,recompute=full", "cp=2,cp_method=ulysses"),
)
FOUR = (
    *("pp=2,tp=2,sp,schedule=zbv", "pp=2,fsdp=2", "pp=2,dp=2,schedule=interleaved1f1b", "pp=2,cp=2"),
    *("pp=2,cp=2,schedule=gpipe,cp_method=ulysses,recompute=full", "cp=4", "cp=2,tp=2", "cp=2,tp=2,sp"),
    *("fsdp=2,cp=2,cp_method=allgather", "dp=2,cp=2", "cp=2,tp=2,sp,cp_method=ulysses"),
)
EIGHT = ("pp=2,fsdp=2,cp=2,schedule=interleaved1f1b", "pp=2,cp=2,tp=2,sp", "fsdp=2,cp=2,tp=2,sp")


@dataclass(frozen=True)
class Rows:
    """A batch that says more of its tokens."""

    input_ids: Tensor
    labels: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def part(self, index: int, count: int) -> Rows:
        rows = len(self.labels) // count
        mine = slice(index * rows, (index + 1) * rows)
        return Rows(self.input_ids[mine], self.labels[mine], {name: t[mine] for name, t in self.more.items()})


def rows_for(architecture: str, told: bool) -> Rows:
    """Padded rows; `told`: with a mask that is not that of padding, and with token types."""
    draw = torch.Generator().manual_seed(3)
    real = torch.arange(S) < LENGTHS[:, None]
    ids = torch.randint(2, V, (len(LENGTHS), S), generator=draw).where(real, 1)
    labels = {
        "roberta": torch.randint(V, ids.shape, generator=draw).where(real, -100),
        "roberta_classification": torch.tensor([0, 2, 1, -100, 1, 0, 2, 2]),
        "roberta_question_answering": torch.stack([LENGTHS // 2, LENGTHS - 1], 1),
    }[architecture]
    labels.view(-1)[::5] = -100
    seen = torch.rand(ids.shape, generator=draw) < 0.6
    seen[:, 0] = True
    types = torch.randint(2, ids.shape, generator=draw)
    return Rows(ids, labels, {"mask": seen, "token_types": types} if told else {})


@dataclass(frozen=True)
class Found:
    loss: float
    norm: float
    gradients: Mapping[str, Tensor]


def build(architecture: str, config: Mapping[str, Any], layout: str) -> nn.Module:
    """None of whose parameters is constant: zero biases and unit norms hide mistakes."""
    parsed = ParallelLayout.parse(f"{layout},precision=fp64".removeprefix(","))
    model = get_model(architecture, "micro", seed=5, distributed_strategy=parsed, **(TINY | dict(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            ramp = torch.arange(parameter.numel(), dtype=parameter.dtype).remainder_(7).view(parameter.shape)
            local_tensor(parameter).add_(ramp.mul_(0.01)[local_box(parameter).slices])
    return model.train()


def step(model: nn.Module, whole: Rows) -> Found:
    batches = [whole.part(*data_shard(parallel_of(model).mesh))]
    tokens = count_tokens(model, batches)
    keys = dropout_keys(batches, 7, data_shard(parallel_of(model).mesh)[0])
    loss, norm = summarise(model, backward(model, batches, tokens, keys=keys), tokens)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Found(float(loss), float(norm), gradients)


@cache
def expected(architecture: str, config: tuple[tuple[str, Any], ...], told: bool) -> Found:
    """Of one process."""
    return step(build(architecture, dict(config), ""), rows_for(architecture, told))


def worst(architecture: str, layout: str, config: Mapping[str, Any], told: bool) -> tuple[float, str, set[str]]:
    """The largest relative error on this rank, of what, and the names that have a gradient here."""
    want = expected(architecture, tuple(config.items()), told)
    with poisoned_memory():
        model = build(architecture, config, layout)
        found = step(model, rows_for(architecture, told))
    errors = {"loss": abs(found.loss - want.loss) / want.loss, "norm": abs(found.norm - want.norm) / want.norm}
    floor = 1e-3 * max(float(g.abs().max()) for g in want.gradients.values())
    for name, gradient in found.gradients.items():
        whole = want.gradients[name]
        gap = (local_tensor(gradient) - whole[local_box(gradient).slices]).abs()
        errors[name] = float(gap.max()) / max(float(whole.abs().max()), floor) if gap.numel() else 0.0
    name = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    return errors[name], name, set(found.gradients)


def cases(layouts: Sequence[str], heads: int) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """So many of the heads in every layout; they, drops, BERT and tied or untied heads take turns."""
    for number, layout in enumerate(layouts):
        for place in range(number, number + heads):
            architecture, config = list(HEADS.items())[place % 3]
            turn = (number // 3 + number + place) % 3
            options = config | [{}, DROPS, BERT][turn]
            # torch shards a weight once: ends on one rank cannot share it.
            if architecture == "roberta" and number % 2 == 0:
                options = options | {"tied": False}
            yield architecture, layout, options, turn == 2


def compare(layouts: Sequence[str], heads: int) -> list[tuple[float, str, set[str]]]:
    return [worst(*case) for case in cases(layouts, heads)]


@pytest.mark.parametrize(
    ("ranks", "layouts", "heads"),
    [
        pytest.param(2, TWO, 3, id="2"),
        pytest.param(4, FOUR, 1, id="4"),
        pytest.param(4, FOUR, 3, id="4 in full", marks=pytest.mark.slow),
        pytest.param(8, EIGHT, 3, id="8", marks=pytest.mark.slow),
    ],
)
def test_every_head_matches_one_process_in_fp64(ranks: int, layouts: Sequence[str], heads: int) -> None:
    found = run_ranks(compare, ranks, layouts, heads, timeout=300.0)
    for number, (architecture, layout, config, told) in enumerate(cases(layouts, heads)):
        place = f"{architecture}, {layout}, {config}, {told}"
        for error, name, _ in (rank[number] for rank in found):
            assert error <= TOLERANCE["fp64"], f"{place}: {name} {error}"
        names = set().union(*(rank[number][2] for rank in found))
        assert names == set(expected(architecture, tuple(config.items()), told).gradients), place
