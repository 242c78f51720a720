"""AdamW whose state lives on the host against torch's own: bitwise, bucket by bucket, in and out of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.training import offload, train
from fms_parallel.training.offload import ALIGN, MODES, AdamW
from tests.poison import poisoned_memory
from tests.training.runs import OPTIONS, TINY, rows, tiny

SMALLEST = ALIGN * 2 * 4
"""Bytes of the smallest bucket for fp32; the embedding alone is no multiple of it."""

NUMBERS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def trained(offload: str, steps: int = 6, config: dict[str, Any] | None = None, **options: Any) -> tuple[Any, ...]:
    """(losses, weights) of a run that clips."""
    told: list[float] = []
    config = {"precision": "fp32", **(config or {})}
    layout = ParallelLayout(precision=config.pop("precision"), offload=offload)
    with poisoned_memory():
        model = get_model("llama", "micro", distributed_strategy=layout, **(TINY | config))
        run = OPTIONS | {"max_grad_norm": 0.5, "steps": steps, "lr_schedule": "constant"} | options
        train(model, rows(), on_step=lambda numbers: told.append(numbers["loss"]), **run)
    return told, {name: p.detach().clone() for name, p in model.named_parameters()}


def check_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert found[0] == expected[0][-len(found[0]) :]
    assert found[1].keys() == expected[1].keys()
    for name, weight in found[1].items():
        assert torch.equal(weight, expected[1][name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bucket", [4 * SMALLEST, 64 * 2**20])
@pytest.mark.parametrize(
    "config", [{}, {"tied": True, "precision": "fp64"}, {"precision": "bf16", "fused": True}], ids=str
)
def test_a_run_is_bitwise_that_without_offload(mode: str, bucket: int, config: dict[str, Any]) -> None:
    check_same(trained(mode, config=config, offload_bucket_bytes=bucket), trained("none", config=config))


@pytest.mark.parametrize(("first", "then"), [("none", "optimizer_state"), ("optimizer_step", "none"), tuple(MODES)])
def test_a_checkpoint_goes_on_with_and_without_offload_bitwise(first: str, then: str, tmp_path: Path) -> None:
    folder = {"output_path": str(tmp_path), "resume": "auto"}
    trained(first, steps=3, **folder)
    check_same(trained(then, **folder), trained("none"))


# ---- where the memory is ----------------------------------------------------------------------------------------


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


class Seen:
    """Stands in for the update: what it was given, and the bytes of copies alive at each of its calls."""

    def __init__(self, brought: tuple[str, ...]) -> None:
        self.brought, self.update = brought, offload.adamw
        self.copies: list[Tensor] = []
        self.alive: list[int] = []

    def __call__(self, *tensors: Any, **options: Any) -> None:
        given = dict(zip(offload.KINDS, tensors, strict=False))
        self.copies += [copy for kind in self.brought for copy in given[kind]]
        self.alive.append(sum(copy.untyped_storage().nbytes() for copy in self.copies))
        self.update(*tensors, **options)


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_of_their_own_small_and_gone_after_the_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = parameters((300, 40), (7,), (2000,), (5, 5))
    optimizer = AdamW(made, mode=mode, bucket_bytes=SMALLEST, **NUMBERS)
    monkeypatch.setattr(offload, "adamw", seen := Seen(MODES[mode].brought))
    optimizer.step()
    homes = [*made, *(p.grad for p in made), *(optimizer.state[p][kind] for p in made for kind in offload.STATE)]
    places = {home.untyped_storage().data_ptr() for home in homes if home is not None}
    assert len(places) == 4 * len(made)  # state, weights and gradients share nothing
    assert sum(copy.numel() for copy in seen.copies) == 2 * sum(p.numel() for p in made)  # each element came once
    assert len(seen.alive) >= 12 and max(seen.alive) <= SMALLEST  # a bucket; the next one was not given yet
    assert [copy.untyped_storage().nbytes() for copy in seen.copies] == [0] * len(seen.copies)


def test_two_buckets_at_most_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = AdamW(parameters((300, 40)), mode="optimizer_state", bucket_bytes=SMALLEST, **NUMBERS)
    made: list[Tensor] = []
    alive: list[int] = []
    empty_like = torch.empty_like

    def noted(*args: Any, **options: Any) -> Tensor:
        made.append(empty_like(*args, **options))
        alive.append(sum(copy.untyped_storage().nbytes() for copy in made))
        return made[-1]

    monkeypatch.setattr(torch, "empty_like", noted)
    optimizer.step()
    assert max(alive) == 2 * SMALLEST


# ---- as torch's optimizer ---------------------------------------------------------------------------------------


def steps_of(optimizer: torch.optim.Optimizer, made: list[nn.Parameter], count: int) -> None:
    for step in range(count):
        for index, parameter in enumerate(made):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + index))
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_is_torchs_and_loads_either_way(mode: str) -> None:
    shapes = ((70, 40), (7,), (0, 3))
    ours, theirs = parameters(*shapes), parameters(*shapes)
    one = AdamW(ours, mode=mode, bucket_bytes=SMALLEST, **NUMBERS)
    other = torch.optim.AdamW(theirs, fused=True, **NUMBERS)
    steps_of(one, ours, 2)
    steps_of(other, theirs, 2)
    a, b = one.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for index, state in b["state"].items():
        assert a["state"][index].keys() == state.keys()
        assert all(torch.equal(a["state"][index][kind], value) for kind, value in state.items())
    one.load_state_dict(b)
    other.load_state_dict(a)
    steps_of(one, ours, 2)
    steps_of(other, theirs, 2)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert type(one).__name__ == type(other).__name__


@pytest.mark.parametrize("mode", MODES)
def test_odd_parameters_are_stepped_as_torch_does(mode: str) -> None:
    """Transposed memory, a transposed gradient, none at all, and an empty shard."""

    def odd() -> list[nn.Parameter]:
        one, two, three, four = parameters((60, 50), (33, 65), (4, 4), (0, 3))
        one = nn.Parameter(one.detach().t())
        one.grad = torch.ones(one.shape).mul_(0.3).t().contiguous().t()
        two.grad = torch.randn(65, 33, generator=torch.Generator().manual_seed(1)).t()
        three.grad = None
        return [one, two, three, four]

    ours, theirs = odd(), odd()
    one, other = AdamW(ours, mode=mode, bucket_bytes=SMALLEST, **NUMBERS), torch.optim.AdamW(theirs, **NUMBERS)
    one.step(lambda: None)
    other.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert ours[2] not in one.state and ours[0].stride() == theirs[0].stride()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "optimizer"}, "unknown optimizer offload 'optimizer'.* Known: optimizer_state, optimizer_step"),
        (
            {"mode": "optimizer_step", "bucket_bytes": SMALLEST - 1},
            f"bucket of {SMALLEST - 1} bytes .* give {SMALLEST}",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdamW(parameters((3,)), **options, **NUMBERS)


def test_the_state_of_another_optimizer_is_refused() -> None:
    made = parameters((3,))
    other = torch.optim.AdamW(made, amsgrad=True, **NUMBERS)
    other.step()
    with pytest.raises(ConfigError, match=r"max_exp_avg_sq.*AdamW has \['exp_avg', 'exp_avg_sq', 'step'\]"):
        AdamW(made, mode="optimizer_step", **NUMBERS).load_state_dict(other.state_dict())


def test_a_bucket_without_offload_is_refused() -> None:
    words = "offload_bucket_bytes=4096 with offload=none: .*add offload=optimizer_state or offload=optimizer_step"
    with pytest.raises(ConfigError, match=words):
        trained("none", offload_bucket_bytes=4096)


def test_params_without_fsdp_is_refused() -> None:
    with pytest.raises(LayoutError, match="offload=params keeps shards on the host; add fsdp=N or drop it"):
        tiny(ParallelLayout(offload="params"))  # type: ignore[arg-type]
