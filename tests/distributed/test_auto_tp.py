"""Tensor plans of plain modules: loss and every gradient of two ranks against one process; and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.auto import parallelize
from fms_parallel.auto.families import tiny_batch, tiny_model
from fms_parallel.auto.source import skeleton_of
from fms_parallel.auto.tensor_plan import infer_tensor_plan
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import FmsError
from tests.auto.test_graph import inputs_of
from tests.auto.test_tensor_plan import Packed

pytest.importorskip("transformers")

# ---- plain modules ----------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Blocks with packed attention and a scale for each feature inside of the cut."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.first = nn.LayerNorm(16)
        self.blocks = nn.ModuleList(Packed(order) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


def squares(out: Tensor, batch: Any) -> Tensor:
    return (out - batch["labels"]).square().sum()


class Mixture(nn.Module):
    """Experts as transformers keeps and calls them: stacked weights, and an index behind the last one for none."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_experts = count
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * 12, 16) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(count, 16, 12) * 0.3)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            chosen = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
            gate, up = nn.functional.linear(hidden_states, self.gate_up_proj[expert]).chunk(2, -1)
            found = found + chosen * nn.functional.linear(gate.sigmoid() * up, self.down_proj[expert])
        return found


class Routed(nn.Module):
    """A router, whose gradient comes through the weights of all ranks' experts, and its experts."""

    def __init__(self, order: str) -> None:
        super().__init__()
        count = int(order.split()[0])
        self.router, self.experts = nn.Linear(16, count), Mixture(count)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 16)
        weights, index = self.router(tokens).softmax(-1).topk(2, dim=-1)
        return x + self.experts(tokens, index, weights).reshape(x.shape)


PLAIN = {"heads first": Stack, "kinds first": Stack, "4 experts": Routed, "3 experts": Routed}


def every_plain() -> dict[str, tuple[int, dict[str, float]]]:
    """Case -> (elements of stacked experts that this rank holds, errors)."""
    return {case: of_plain(case) for case in PLAIN}


def of_plain(order: str) -> tuple[int, dict[str, float]]:
    torch.manual_seed(5)
    model = PLAIN[order](order).double()
    batch = {"x": torch.randn(4, 5, 16).double(), "labels": torch.randn(4, 5, 16).double()}
    whole = squares(model(batch["x"]), batch) / 4
    whole.backward()
    engine = parallelize(model, "tp=2", batch, loss=squares)
    worst = {"loss": abs(float(engine.train_step(batch)) - float(whole.detach()))}
    for name, parameter in engine.named_parameters():
        assert parameter.grad is not None
        should = model.get_parameter(name).grad
        worst[name] = float((parameter.grad.full_tensor() - should).abs().max() / should.abs().max().clamp(min=1e-3))
    held = [p.to_local().numel() for name, p in engine.named_parameters() if p.dim() == 3]  # type: ignore[attr-defined]
    return sum(held), worst


def test_plain_modules_equal_one_process() -> None:
    for answer in run_ranks(every_plain, 2):
        for case, (held, worst) in answer.items():
            assert len(worst) == (5 if "experts" in case else 15)
            assert {name: error for name, error in worst.items() if not error <= 1e-12} == {}, case
            share = {"4 experts": 2, "3 experts": 1.5}.get(case, 0)  # 2 of 4, or a half of each
            assert held == share * (2 * 12 * 16 + 16 * 12)


# ---- refusals ---------------------------------------------------------------------------------------------------


def without(name: str, part: str) -> dict[str, Any]:
    """An inferred plan that lacks a word."""
    model = tiny_model(name)
    plan = infer_tensor_plan(skeleton_of(model), inputs_of(name, model), 2)
    return {expression: word for expression, word in plan.items() if not re.search(part, expression)}


WRONG = {
    "heads are mixed with tokens": ("opt", r"self_attn$", "self_attn"),
    "one half of the matrices": ("gpt2", r"mlp.*c_proj", r"mlp\.c_proj"),
    "a norm of heads without a sum": ("qwen3", r"[qk]_norm", r"[qk]_norm|k_norm|q_norm"),
}
"""What is wrong -> (model, what is taken from its plan, who is named)."""


def refusals(plans: dict[str, dict[str, Any]]) -> dict[str, str]:
    found = {}
    for case, (name, _, _) in WRONG.items():
        found[case] = _said(
            lambda name=name, case=case: parallelize(  # type: ignore[misc]
                tiny_model(name), "tp=2", tiny_batch(name), tensor_plan=plans[case]
            )
        )
    three = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8}
    found["kv heads"] = _said(lambda: parallelize(tiny_model("llama", **three), "tp=2", tiny_batch("llama")))
    batch = {"x": torch.zeros(2, 5, 16), "labels": torch.zeros(2, 5, 16)}
    norms = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16))
    found["nothing"] = _said(lambda: parallelize(norms, "tp=2", {"input": batch["x"]}, loss=squares))
    return found


def _said(make: Any) -> str:
    try:
        make()
    except FmsError as error:
        return str(error)
    return ""


def test_what_is_wrong_is_refused_in_a_sentence_before_training() -> None:
    plans = {case: without(name, part) for case, (name, part, _) in WRONG.items()}
    for found in run_ranks(refusals, 2, plans, timeout=200.0):
        for case, (_, _, where) in WRONG.items():
            assert "the model does not give what it gives in one process" in found[case], (case, found[case])
            assert re.search(where, found[case]), (case, found[case])
        assert "tp=2 does not divide num_key_value_heads=3" in found["kv heads"]
        assert "nothing of Sequential can be cut by itself (no matrices)" in found["nothing"]
