"""A loop of the caller's own, with torch's optimizers and clipping, gives in every layout what one process gives.

The reference is one process that knows nothing of layouts: the summed loss divided by the tokens, `backward()`, torch's
own clipping and optimizer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.data.feed import Batch
from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.mesh import data_shard
from fms_parallel.errors import FmsError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.modules.loss import IGNORE
from fms_parallel.modules.low_rank import LowRank
from fms_parallel.strategy.base import parallel_of
from fms_parallel.strategy.context import share_of
from fms_parallel.training import complete_gradients, compute_gradients, count_tokens, evaluate, mean_loss, train_step
from tests.distributed.comparison import Together, each_of
from tests.poison import poisoned_memory
from tests.training.runs import TINY, rows

BIASED = {"attention_bias": True, "ffn_bias": True}
ONE_KV = {"kv_heads": 1, **BIASED}
LORA = {"adapters": LowRank(("query", "value"), rank=2)}
STEPS, MOST, TOLERANCE = 3, 0.01, 1e-12

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    # eps: else the rounding of a gradient near zero becomes a whole step, in one process as well
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, fused=True),
}

CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("plain", "dp=2", "fused", {}),
    ("plain", "fsdp=2", "adamw", {"tied": True}),
    ("plain", "tp=2", "momentum", ONE_KV),
    ("plain", "tp=2,sp", "fused", {"tied": True, **BIASED}),
    ("plain", "tp=2,sp,tp_parts=attention", "sgd", BIASED),
    ("plain", "cp=2", "fused", {}),
    ("plain", "tp=2", "adamw", LORA),
    ("ours", "pp=2,microbatches=2", "fused", {"tied": True}),
    ("ours", "fsdp=2", "momentum", {}),
]
LARGE: list[tuple[str, str, str, dict[str, Any]]] = [
    ("plain", "fsdp=2,tp=2,sp", "adamw", BIASED),
    ("plain", "dp=2,fsdp=2", "fused", {"tied": True}),
    ("plain", "dp=2,tp=2,sp,tp_parts=attention", "momentum", {}),
    ("plain", "cp=2,tp=2,sp", "fused", ONE_KV),
    ("plain", "fsdp=2,tp=2", "fused", LORA),
    ("ours", "pp=2,tp=2,sp", "adamw", {"tied": True}),
    ("ours", "fsdp=2,pp=2", "sgd", {}),
]


# ---- the loops --------------------------------------------------------------------------------------------------


def plain_gradients(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float, dict[str, Tensor]]:
    """As docs/training.md has it: several backward passes, torch's clipping. Loss, norm, gradients before clipping."""
    tokens = count_tokens(model, batches)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        part = mean_loss(model, batch, tokens)
        part.backward()
        loss += part.detach()
    dist.all_reduce(loss, op=dist.ReduceOp.AVG)
    found = gradients_of(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MOST)
    return float(loss), float(whole(norm)), found


def our_gradients(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float, dict[str, Tensor]]:
    """The call for every layout; what it has clipped is made whole again to be compared."""
    result = compute_gradients(model, batches, max_grad_norm=MOST)
    factor = min(1.0, MOST / (result.grad_norm + 1e-6))
    return result.loss, result.grad_norm, {name: found / factor for name, found in gradients_of(model).items()}


LOOPS = {"plain": plain_gradients, "ours": our_gradients}


def expected_gradients(
    model: nn.Module, batches: Sequence[Batch], most: float = MOST
) -> tuple[float, float, dict[str, Tensor]]:
    """One process, nothing of ours but the model."""
    (batch,) = batches
    loss = model(batch.input_ids, labels=batch.labels) / (batch.labels != IGNORE).sum()
    loss.backward()
    found = gradients_of(model)
    return float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(model.parameters(), most)), found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of(step: int) -> Batch:
    """Eight rows of 13 tokens, of which the first ones hardly count: ranks have very different numbers of tokens."""
    tokens = torch.randint(61, (8, 14), generator=torch.Generator().manual_seed(step))
    labels = tokens[:, 1:].clone()
    labels[: 3 + step, 2:] = IGNORE
    return Batch(tokens[:, :-1], labels)


def built(layout: str | None, config: dict[str, Any]) -> nn.Module:
    """None of its parameters is constant: zero biases and unit norms hide mistakes."""
    words: Any = f"{layout},precision=fp64" if layout else ParallelLayout(precision="fp64")
    model = get_model("llama", "micro", seed=5, distributed_strategy=words, **(TINY | config))
    with torch.no_grad():
        for parameter in model.parameters():
            ramp = torch.arange(parameter.numel(), dtype=parameter.dtype).remainder_(7).view(parameter.shape)
            local_tensor(parameter).add_(ramp.mul_(0.01)[local_box(parameter).slices])
    return model


Outcome = tuple[list[tuple[float, float, dict[str, Tensor]]], dict[str, Tensor]]


def run(model: nn.Module, optimizer: str, gradients: Any, pieces: int) -> Outcome:
    """Loss, norm and gradients of each step, and the weights after the last one."""
    index, count = data_shard(parallel_of(model).mesh)
    updates = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    told = []
    for step in range(STEPS):
        mine = list(rows_of(step).split(count))[index]
        told.append(gradients(model, list(mine.split(pieces))))
        updates.step()
        updates.zero_grad()
    return told, {name: whole(p.detach()) for name, p in model.named_parameters()}


def compare(loop: str, layout: str, optimizer: str, config: dict[str, Any]) -> float:
    """The largest relative error of losses, norms, gradients of every step, and weights."""
    with poisoned_memory():
        steps, weights = run(built(None, config), optimizer, expected_gradients, 1)
        got_steps, got_weights = run(built(layout, config), optimizer, LOOPS[loop], 2)
    errors = [error_of(weights, got_weights, "pp" in layout)]
    for (loss, norm, gradients), (got_loss, got_norm, got) in zip(steps, got_steps, strict=True):
        assert norm > MOST, "nothing is clipped"
        errors += [abs(got_loss / loss - 1), abs(got_norm / norm - 1), error_of(gradients, got, "pp" in layout)]
    return max(errors)


def error_of(expected: dict[str, Tensor], got: dict[str, Tensor], some: bool) -> float:
    """Relative to each tensor's largest element, or a thousandth of the largest of all."""
    assert got.keys() == expected.keys() or (some and got.keys() < expected.keys())
    floor = 1e-3 * max(float(tensor.abs().max()) for tensor in expected.values())
    gaps = {name: float((got[name] - expected[name]).abs().max()) for name in got}
    return max(gap / max(float(expected[name].abs().max()), floor) for name, gap in gaps.items())


# ---- what would be silently wrong -------------------------------------------------------------------------------


def refused(layout: str, attempt: str) -> list[str]:
    """What a rank says of a mistake."""
    model = built(layout, {})
    try:
        ATTEMPTS[attempt](model)
    except FmsError as error:
        return [f"{type(error).__name__}: {error}"]
    return ["nothing"]


def by_rank(model: nn.Module) -> Batch:
    return list(rows_of(0).split(2))[dist.get_rank()]


def forward_only(model: nn.Module) -> None:
    with torch.no_grad():
        model(rows_of(0).input_ids)
    model.eval()(rows_of(0).input_ids)
    model.train()
    evaluate(model, rows(4))


ATTEMPTS: dict[str, Callable[[nn.Module], Any]] = {
    "rows by rank": lambda model: model(by_rank(model).input_ids, labels=by_rank(model).labels),
    "rows by rank, step": lambda model: train_step(model, torch.optim.SGD(model.parameters()), [by_rank(model)]),
    "whole rows": lambda model: model(rows_of(0).input_ids, labels=rows_of(0).labels),
    "whole rows, told": lambda model: share_of(model, rows_of(0)),
    "own backward": lambda model: mean_loss(model, rows_of(0), 8).backward(),
    "only forward": forward_only,
}

REFUSALS = [
    ("tp=2", "rows by rank", "TrainingError: tp=2: the ranks of tp were given different rows"),
    ("tp=2,sp", "rows by rank, step", "part 0 of 1"),
    ("cp=2", "rows by rank, step", "TrainingError: cp=2: the ranks of cp were given different rows"),
    ("pp=2", "rows by rank, step", "TrainingError: pp=2: the ranks of pp were given different rows"),
    ("fsdp=2", "rows by rank", "nothing"),
    ("tp=2", "whole rows", "nothing"),
    ("cp=2", "whole rows", "LayoutError: cp=2: a training forward needs this rank's part of every row"),
    ("cp=2", "whole rows, told", "nothing"),
    ("cp=2", "only forward", "nothing"),
    ("pp=2", "own backward", "compute_gradients(model, batches, max_grad_norm=...)"),
]


# ---- one job for all of them ------------------------------------------------------------------------------------


def twice(layout: str) -> float:
    """Gradients of two calls without `zero_grad` between them add up."""
    model, expected = built(layout, BIASED), built(None, BIASED)
    index, count = data_shard(parallel_of(model).mesh)
    for step in range(2):
        compute_gradients(model, [list(rows_of(step).split(count))[index]])
        expected_loss = expected(rows_of(step).input_ids, labels=rows_of(step).labels)
        (expected_loss / rows_of(step).tokens).backward()
    return error_of(gradients_of(expected), gradients_of(model), False)


def left_behind(layout: str) -> list[str]:
    """What the next step says after one whose gradients were never summed over the ranks."""
    model = built(layout, {})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    mean_loss(model, rows_of(0), count_tokens(model, [rows_of(0)])).backward()
    optimizer.step()
    try:
        train_step(model, optimizer, [rows_of(1)])
    except FmsError as error:
        return [f"{type(error).__name__}: {error}"]
    return ["nothing"]


def changed_in_place() -> float:
    """Each gradient clipped by value, under sp, after they were completed."""
    model, expected = built("tp=2,sp", BIASED), built(None, BIASED)
    for each in (model, expected):
        mean_loss(each, rows_of(0), rows_of(0).tokens).backward()
        complete_gradients(each.parameters())
        torch.nn.utils.clip_grad_value_(each.parameters(), 1e-3)
    return error_of(gradients_of(expected), gradients_of(model), False)


def documented(layout: str, folder: str) -> list[list[float]]:
    """Losses and norms that the file of docs/training.md prints: four steps, the second two from a checkpoint."""
    told: list[list[float]] = []

    def note(line: str, **_: Any) -> None:
        told.append([float(word) for word in line.split()[3::2]])

    for last in (2, 4):
        text = PAGE[0].replace("= 20, 10", f"= {last}, 2").replace("runs/own", folder)
        text = text.replace('"micro", ', '"micro", layers=2, ')
        assert f"= {last}, 2" in text and folder in text and "layers=2" in text
        with mock.patch.object(sys, "argv", ["own_loop.py", layout]):
            exec(compile(text, "own_loop.py", "exec"), {"print": note})
    return told


def documented_piece(layout: str) -> float:
    """The error of the weights after three steps as the second piece of that page has them."""
    model, expected = built(layout, BIASED), built(None, BIASED)
    named = {"torch": torch, "count_tokens": count_tokens, "mean_loss": mean_loss, "model": model}
    named["complete_gradients"] = complete_gradients
    index, count = data_shard(parallel_of(model).mesh)
    named["optimizer"], optimizer = (
        OPTIMIZERS["fused"]([*model.parameters()]),
        OPTIMIZERS["fused"]([*expected.parameters()]),
    )
    for step in range(STEPS):
        mine = list(rows_of(step).split(count))[index]
        exec(compile(PAGE[1], "piece.py", "exec"), named | {"micro_batches": list(mine.split(2))})
        expected_gradients(expected, [rows_of(step)], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return error_of(
        {n: p.detach() for n, p in expected.named_parameters()},
        {n: whole(p.detach()) for n, p in model.named_parameters()},
        False,
    )


TEXT = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
PAGE = re.findall(r"^```python\n(.*?)^```", TEXT.partition("## Your own loop\n")[2], flags=re.MULTILINE | re.DOTALL)[:2]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "compare": compare,
    "refused": refused,
    "twice": twice,
    "left behind": left_behind,
    "changed": changed_in_place,
    "documented": documented,
    "documented piece": documented_piece,
}


def one(function: str, *arguments: Any) -> Any:
    return FUNCTIONS[function](*arguments)


SMALL_JOB = Together(
    one,
    [
        *[("compare", *case) for case in CASES],
        *[("refused", *case[:2]) for case in REFUSALS],
        *[("left behind", layout) for layout in ("fsdp=2", "dp=2")],
        ("twice", "tp=2,sp"),
        ("changed",),
        *[("documented piece", layout) for layout in ("tp=2,sp", "cp=2")],
    ],
    lambda *case: 2,
)
LARGE_JOB = Together(one, [("compare", *case) for case in LARGE], lambda *case: 4)


@pytest.mark.parametrize("case", CASES, ids=[f"{case[1]}-{case[2]}" for case in CASES])
def test_three_steps_match_one_process(case: tuple[str, str, str, dict[str, Any]]) -> None:
    assert max(SMALL_JOB("compare", *case)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=[f"{case[1]}-{case[2]}" for case in LARGE])
def test_three_steps_of_four_ranks_match_one_process(case: tuple[str, str, str, dict[str, Any]]) -> None:
    assert max(LARGE_JOB("compare", *case)) <= TOLERANCE


def test_gradients_of_two_calls_add_up() -> None:
    assert max(SMALL_JOB("twice", "tp=2,sp")) <= TOLERANCE


def test_completed_gradients_can_be_changed_as_in_one_process() -> None:
    assert max(SMALL_JOB("changed")) <= TOLERANCE


@pytest.mark.parametrize("layout", ["fsdp=2", "dp=2"])
def test_gradients_that_no_step_has_applied_are_found_at_the_next(layout: str) -> None:
    for (said,) in SMALL_JOB("left behind", layout):
        assert said.startswith("TrainingError: gradients of an earlier step") and "set_requires_gradient_sync" in said


def test_the_file_of_the_page_does_in_every_layout_what_it_does_in_one_process(tmp_path: Path) -> None:
    expected = documented("", str(tmp_path / "one"))
    assert len(expected) == 4
    jobs = [("documented", layout, str(tmp_path / layout)) for layout in ("tp=2,sp", "pp=2,microbatches=2")]
    for printed in run_ranks(each_of, 2, one, jobs)[0]:
        assert not isinstance(printed, str), printed
        for mine, theirs in zip(printed, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=3e-5)


@pytest.mark.parametrize("layout", ["tp=2,sp", "cp=2"])
def test_the_piece_of_the_page_gives_the_weights_of_one_process(layout: str) -> None:
    assert max(SMALL_JOB("documented piece", layout)) <= TOLERANCE


@pytest.mark.parametrize(("layout", "attempt", "words"), REFUSALS)
def test_what_would_be_silently_wrong_is_said_on_every_rank(layout: str, attempt: str, words: str) -> None:
    for (said,) in SMALL_JOB("refused", layout, attempt):
        assert words in said
