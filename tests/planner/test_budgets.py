"""Recompute budgets: memory against what torch's compiler keeps of a block, time between none and full, a search."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fms_parallel import compat
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.models.build import get_shape
from fms_parallel.planner import Planner, Workload
from fms_parallel.planner.cli import main
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.memory import activation_bytes_per_token
from fms_parallel.planner.software import load_software
from fms_parallel.strategy.base import repeated_blocks

SIZE: dict[str, Any] = {"vocab_size": 256, "width": 128, "layers": 2, "heads": 8, "kv_heads": 4, "ffn_width": 384}
B, S = 2, 256
compile_within = compat.compile_within


def kept_by_compiler(layout: ParallelLayout) -> int:
    """Bytes that the last block keeps of a forward pass, without parameters."""
    torch._dynamo.reset()
    kept: dict[int, int] = {}
    inside = False

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    with compat.fake_process_group(0, layout.world_size):
        with patch.object(compat, "compile_within", lambda blocks, part: compile_within(blocks, part, "aot_eager")):
            model = get_model("llama", distributed_strategy=layout, compile_blocks=True, **SIZE)
        own = {getattr(p, "_local_tensor", p).untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if inside and storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        last = repeated_blocks(model)[-1][1]
        last.register_forward_pre_hook(enter, prepend=True)
        last.register_forward_hook(leave)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(torch.zeros(B, S, dtype=torch.int64))  # noqa: F841 (while it is there, nothing is freed)
        return sum(kept.values())


def planned(layout: ParallelLayout) -> float:
    columns = Columns.of_layout(layout, B)
    software = load_software("native").with_precision("fp32")
    return float(activation_bytes_per_token(get_shape("llama", **SIZE), columns, S, software)[0]) * B * S


LATER = [(words, part) for words in ("tp=2,", "tp=2,sp,", "") for part in (0.1, 0.6, 0.9)]


@pytest.mark.parametrize(
    ("words", "part"),
    [("", 0.3), ("tp=2,sp,", 0.3), *(pytest.param(*case, marks=pytest.mark.slow) for case in LATER)],
)
def test_what_a_budget_keeps_is_what_the_compiler_keeps(words: str, part: float) -> None:
    """It chooses whole tensors, of which a block this small has few: a tenth of it."""
    layout = ParallelLayout.parse(f"{words}recompute=budget={part}")
    assert planned(layout) == pytest.approx(kept_by_compiler(layout), rel=0.08)


def test_budgets_lie_between_full_and_none() -> None:
    planner = Planner.of("llama:3.1-8b", "h100:8", Workload(32, 4096))
    parts = [f"budget={part}" for part in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.99)]
    for axes in ("fsdp=8", "fsdp=4,tp=2,sp", "pp=2,fsdp=4,microbatches=4"):
        found = [planner.estimate(ParallelLayout.parse(f"{axes},recompute={word}"), 1) for word in
                 ("full", *parts, "none")]  # fmt: skip
        full, nothing, *within, none = found
        assert nothing.memory_gb == pytest.approx(full.memory_gb, rel=1e-9)
        assert nothing.step_time_s == pytest.approx(full.step_time_s, rel=1e-3)
        for one, more in pairwise([nothing, *within, none]):
            assert one.memory_gb <= more.memory_gb and one.step_time_s >= more.step_time_s
        assert within[0].memory_gb < within[-1].memory_gb < none.memory_gb
        assert within[0].step_time_s > within[-1].step_time_s > none.step_time_s


@pytest.mark.parametrize("part", ["0", "0.5", "0.25", "0.123456", "0.333333"])
def test_a_budget_comes_back_from_columns(part: str) -> None:
    layout = ParallelLayout.parse(f"fsdp=2,recompute=budget={part}")
    assert Columns.of_layout(layout, 8).layout(0, "fp32") == layout


def test_a_search_prices_budgets_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["search", "--model", "llama:3.1-8b", "--gpus", "h100:8", "--global-batch", "64", "--seq", "8192", "--json"]
    words = ["--recompute", "full", "budget=0.5", "budget=0.2", "--exclude", "pp", "--top", "500"]
    assert main([*job, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    policies = {entry["layout_fields"]["recompute"] for entry in found["results"]}
    assert policies == {"full", "budget=0.5", "budget=0.2"}
    assert "budget" in found["results"][0]["layout"] and "--compile" in found["launch"]
    assert main([*job, "--top", "500"]) == 0
    assert "budget" not in capsys.readouterr().out
