"""Inferred tensor plans against plans written by hand and transformers' own, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms_parallel.auto.blocks import find_blocks
from fms_parallel.auto.families import FAMILIES, tiny_model
from fms_parallel.auto.plans import WORDS, tensor_patterns
from fms_parallel.auto.source import skeleton_of
from fms_parallel.auto.tensor_plan import infer_tensor_plan
from fms_parallel.auto.tensor_styles import Columns, Features, Numbers, Rows, as_expressions
from fms_parallel.errors import LayoutError
from tests.auto.test_graph import inputs_of

pytest.importorskip("transformers")

LLAMA = {
    r"lm_head": "colwise_gather",
    r"model\.embed_tokens": "rowwise_embedding",
    r"model\.layers\.\d+\.mlp\.down_proj": "rowwise",
    r"model\.layers\.\d+\.mlp\.gate_proj": "colwise",
    r"model\.layers\.\d+\.mlp\.up_proj": "colwise",
    r"model\.layers\.\d+\.self_attn\.k_proj": "colwise",
    r"model\.layers\.\d+\.self_attn\.o_proj": "rowwise",
    r"model\.layers\.\d+\.self_attn\.q_proj": "colwise",
    r"model\.layers\.\d+\.self_attn\.v_proj": "colwise",
}
GPT2 = {
    r"lm_head": "colwise_gather",
    r"transformer\.h\.\d+\.attn": Numbers(("split_size",)),
    r"transformer\.h\.\d+\.attn\.c_attn": Columns((32, 32, 32), transposed=True),
    r"transformer\.h\.\d+\.attn\.c_proj": Rows(),
    r"transformer\.h\.\d+\.mlp\.c_fc": Columns((128,), transposed=True),
    r"transformer\.h\.\d+\.mlp\.c_proj": Rows(),
    r"transformer\.wte": "rowwise_embedding",
}


def infer(name: str, tp: int = 2, **fields: Any) -> dict[str, Any]:
    model = tiny_model(name, **fields)
    return infer_tensor_plan(skeleton_of(model), inputs_of(name, model), tp)


@pytest.mark.parametrize(("name", "plan"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_plans_are_the_ones_written_by_hand(name: str, plan: dict[str, Any]) -> None:
    assert infer(name) == plan


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.plan])
def test_inferred_plans_are_those_of_transformers(name: str) -> None:
    known = {key.replace("*", "0"): WORDS[word] for key, word in tiny_model(name).tp_plan.items()}
    found = {key.replace(r"\d+", "0").replace("\\", ""): word for key, word in infer(name).items()}
    assert found == known


def test_numbers_that_the_code_counts_with_are_found() -> None:
    assert infer("opt")[r"model\.decoder\.layers\.\d+\.self_attn"] == Numbers(("num_heads",))
    assert infer("gptj")[r"transformer\.h\.\d+\.attn"] == Numbers(("num_attention_heads",))
    t5 = infer("t5")
    assert t5[r"decoder\.block\.\d+\.layer\.\d+\.EncDecAttention"] == Numbers(("n_heads",))
    assert Features() in t5.values()


def test_numbers_of_equal_size_are_told_apart() -> None:
    """8 heads of width 8: only the shapes say which 8 counts heads."""
    plan = infer("opt", hidden_size=64, num_attention_heads=8, word_embed_proj_dim=64)
    assert plan[r"model\.decoder\.layers\.\d+\.self_attn"] == Numbers(("num_heads",))


def test_a_deep_model_is_planned_by_its_first_blocks_unless_they_are_not_all_alike() -> None:
    assert infer("gpt2", n_layer=24) == GPT2
    whole = infer("mixtral", num_hidden_layers=3)
    assert whole[r"model\.layers\.\d+\.self_attn\.q_proj"] == "colwise"
    uneven = nn.Sequential(*(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, n), nn.Linear(n, 16)) for n in (8, 8, 7, 8)))
    found = infer_tensor_plan(uneven, {"input": torch.zeros(2, 16)}, 2)
    assert {name for name in (f"{n}.1" for n in range(4)) if any(re.fullmatch(p, name) for p in found)} == {
        *("0.1", "1.1", "3.1")
    }


# ---- plain modules ----------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """Query, key and value in one matrix, in either order of heads and kinds."""

    def __init__(self, order: str, normed: bool = False) -> None:
        super().__init__()
        self.order = order
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        if self.order == "kinds first":
            q, k, v = self.qkv(x).view(rows, tokens, 3, -1, 4).unbind(2)
        else:
            q, k, v = self.qkv(x).view(rows, tokens, -1, 3, 4).unbind(3)
        mixed = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        flat = mixed.transpose(1, 2).reshape(rows, tokens, -1)
        return self.out(self.norm(flat))


def of_packed(order: str, normed: bool = False) -> dict[str, Any]:
    model = nn.Sequential(nn.LayerNorm(16), Packed(order, normed))
    return infer_tensor_plan(model, {"input": torch.zeros(2, 5, 16)}, 2)


def test_packed_matrices_are_told_by_how_they_are_taken_apart() -> None:
    assert of_packed("heads first") == {r"\d+\.qkv": "colwise", r"\d+\.out": "rowwise"}
    assert of_packed("kinds first") == {r"\d+\.qkv": Columns((16, 16, 16)), r"\d+\.out": "rowwise"}


def test_a_norm_over_what_would_be_cut_is_refused_by_name() -> None:
    with pytest.raises(
        LayoutError, match=r"nothing of Sequential can be cut .*1\.out: no matrix comes before it without a norm"
    ):
        of_packed("heads first", normed=True)


def test_heads_that_do_not_divide_are_refused_with_the_numbers() -> None:
    with pytest.raises(LayoutError, match=r"tp=4 does not divide 2 heads of 8, and each rank holds whole heads"):
        infer("llama", tp=4)
    model = tiny_model("llama")
    with pytest.raises(LayoutError, match="tp=4 does not divide num_key_value_heads=2"):
        tensor_patterns(model, 4, None, inputs_of("llama", model))


def test_a_cut_tensor_between_stages_is_refused() -> None:
    model = tiny_model("t5")
    stages = {block: number for number, block in enumerate(find_blocks(model))}
    with pytest.raises(LayoutError, match=r"encoder\.block\.0 hands a tensor that tp cuts .* to encoder\.block\.1"):
        infer_tensor_plan(model, inputs_of("t5", model), 2, stages)
    apart = {block: int(block.startswith("decoder")) for block in stages}
    assert Features() in infer_tensor_plan(model, inputs_of("t5", model), 2, apart).values()


def test_the_callers_plan_is_taken_before_any_other() -> None:
    model = tiny_model("llama")
    assert tensor_patterns(model, 2, {"lm_head": "replicate"}, inputs_of("llama", model)) == {"lm_head": "replicate"}
    assert tensor_patterns(model, 2, None, inputs_of("llama", model))[r"lm_head"] == "colwise_gather"


def test_expressions_join_only_what_is_alike() -> None:
    names = ["h.0.up", "h.1.up", "h.0.fc1", "h.0.fc2", "h.1.fc1", "h.1.fc2"]
    assert as_expressions({"h.0.up": "colwise", "h.1.up": "colwise", "h.0.fc1": "colwise"}, names) == {
        r"h\.\d+\.up": "colwise",
        r"h\.0\.fc1": "colwise",
    }
