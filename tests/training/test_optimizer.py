"""Learning rates against torch's schedulers and closed forms; AdamW against torch's own, tensor by tensor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fms_parallel.training.optimizer import decay_groups, learning_rate, make_optimizer
from fms_parallel.training.options import TrainOptions
from tests.training.runs import tiny


def rates(steps: int, options: TrainOptions) -> list[float]:
    return [learning_rate(step, steps, options) for step in range(steps)]


def test_cosine_matches_torch() -> None:
    options = TrainOptions(lr=1.0, min_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=49, eta_min=0.1)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(50, options) == pytest.approx(expected, rel=1e-12)


def test_warm_up_is_a_line_that_ends_at_lr() -> None:
    found = rates(20, TrainOptions(lr=0.5, warmup_steps=5))
    assert found[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert found[5] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0.05)


def test_wsd_stays_and_then_falls_in_a_line() -> None:
    found = rates(20, TrainOptions(lr=1.0, min_lr=0.0, lr_schedule="wsd", decay_steps=5))
    assert found[:16] == [1.0] * 16
    assert found[15:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_constant_is_constant() -> None:
    assert set(rates(9, TrainOptions(lr=0.3, lr_schedule="constant"))) == {0.3}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_finite_rates(schedule: str, steps: int) -> None:
    for warmup in range(5):
        found = rates(steps, TrainOptions(lr=1.0, warmup_steps=warmup, lr_schedule=schedule))
        assert all(math.isfinite(rate) and 0 < rate <= 1 for rate in found), found


def test_matrices_decay_and_vectors_and_fused_biases_do_not() -> None:
    model = tiny(fused=True, attention_bias=True, ffn_bias=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") and p.dim() >= 2 for p in decayed["params"])  # type: ignore[attr-defined]
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in kept["params"])  # type: ignore[attr-defined]
    assert len(decayed["params"]) + len(kept["params"]) == len(names)  # type: ignore[arg-type]


def test_frozen_parameters_are_left_out() -> None:
    model = tiny()
    model.embedding.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    held = {id(p) for group in make_optimizer(model, TrainOptions()).param_groups for p in group["params"]}
    assert id(model.embedding.weight) not in held  # type: ignore[union-attr]
