"""What a tensor plan holds and what it refuses. That a plan computes right: tests/distributed/test_plan.py."""

from __future__ import annotations

import logging

import pytest
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput

from fms_parallel.errors import LayoutError
from fms_parallel.modules.feedforward import FeedForward
from fms_parallel.strategy.plan import WORDS, generate_layer_plan
from fms_parallel.strategy.styles import (
    Colwise,
    ColwiseGather,
    Door,
    ReplicateStyle,
    Rowwise,
    RowwiseEmbedding,
    Sequence,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.act = nn.GELU()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 13)


PATTERNS = {
    r"embed": "rowwise_embedding",
    r"blocks\.\d+\.up": "colwise",
    r"blocks\.\d+\.down": "rowwise",
    r"blocks\.\d+\.norm": "sequence",
    r"head": "colwise_gather",
}


def kinds(plan: dict) -> dict[str, type]:
    return {name: type(style) for name, style in plan.items()}


def test_each_matched_module_gets_the_style_of_its_word() -> None:
    assert kinds(generate_layer_plan(Model(), PATTERNS, sp=True)) == {
        "": ReplicateStyle,  # hands out plain tensors
        "embed": RowwiseEmbedding,
        "blocks.0.norm": Sequence,
        "blocks.0.up": Colwise,
        "blocks.0.down": Rowwise,
        "blocks.1.norm": Sequence,
        "blocks.1.up": Colwise,
        "blocks.1.down": Rowwise,
        "head": ColwiseGather,
    }


def test_sequence_without_sp_is_replicate() -> None:
    assert kinds(generate_layer_plan(Model(), PATTERNS))["blocks.0.norm"] is ReplicateStyle


def test_unmatched_modules_with_parameters_are_replicated_and_others_left() -> None:
    plan = kinds(generate_layer_plan(Model(), {"head": "colwise_gather"}))
    assert plan.pop("head") is ColwiseGather
    assert plan == dict.fromkeys(
        ("embed", *(f"blocks.{n}.{name}" for n in (0, 1) for name in ("norm", "up", "down"))), ReplicateStyle
    )


def test_every_parameter_has_a_style() -> None:
    model = Model()
    model.blocks[0].scale = nn.Parameter(model.head.bias.detach().clone())
    plan = generate_layer_plan(model, PATTERNS)
    assert {name.rpartition(".")[0] for name, _ in model.named_parameters()} <= plan.keys()


def test_styles_of_torch_are_kept() -> None:
    style, prepare = ColwiseParallel(), PrepareModuleInput()
    plan = generate_layer_plan(Model(), {r"blocks\.\d+\.up": style, r"blocks\.\d+": prepare})
    assert plan["blocks.0.up"] is plan["blocks.1.up"] is style
    assert plan["blocks.1"] is prepare


def test_modules_with_a_twin_are_left_to_it() -> None:
    model = nn.ModuleDict({"ours": FeedForward(8, 16), "head": nn.Linear(8, 13)})
    assert list(generate_layer_plan(model, {})) == ["head"]
    with pytest.raises(LayoutError, match=r"'ours\.up' matches ours\.up, which a twin cuts already"):
        generate_layer_plan(model, {"ours.up": "colwise"})


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"head": "columnwise"}, r"'head': unknown word .* 'columnwise'\. Did you mean 'colwise'\?.* Known: "),
        ({"head": 3}, "unknown word"),
        ({"head": "colwise", "h.*": "rowwise"}, "head matches two patterns, 'head' and 'h"),
        ({r"blocks\.0\.act": "colwise"}, r"blocks\.0\.act \(GELU\) has no parameters that 'colwise'"),
        ({r"blocks\.0\.act": "replicate"}, "no parameters"),
        ({r"blocks\.0\.act": ColwiseParallel()}, "no parameters that ColwiseParallel"),
        ({"embed": "colwise"}, r"embed: 'colwise' cuts nn\.Linear, this is Embedding"),
        ({"head": "rowwise_embedding"}, r"head: 'rowwise_embedding' cuts nn\.Embedding"),
        ({r"blocks\.0": "rowwise"}, r"blocks\.0: 'rowwise' cuts nn\.Linear, this is Block"),
        ({"head(": "colwise"}, r"'head\(' is no regular expression"),
    ],
)
def test_an_impossible_plan_is_refused(patterns: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        generate_layer_plan(Model(), patterns)


def test_a_pattern_that_matches_nothing_warns_with_the_nearest_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        generate_layer_plan(Model(), {**PATTERNS, r"blocks\.\d+\.upp": "colwise"})
    assert [record.name for record in caplog.records] == ["fms_parallel.strategy.plan"]
    assert "upp' matches no module; the nearest name is 'blocks." in caplog.text


def test_dropout_of_torch_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "drop": nn.Dropout(0.1)})
    with caplog.at_level(logging.WARNING):
        generate_layer_plan(model, {"head": "colwise"})
        generate_layer_plan(model.eval(), {"head": "colwise"})
    assert [record.getMessage()[:24] for record in caplog.records] == ["1 torch dropouts (drop, "]


@pytest.mark.parametrize(
    ("word", "module", "message"),
    [
        ("colwise", nn.Linear(8, 9), r"layer: out_features=9 does not divide by tp=2: .* Use tp in \[1, 3, 9\]"),
        ("rowwise", nn.Linear(9, 8), "layer: in_features=9 does not divide by tp=2"),
        ("rowwise_embedding", nn.Embedding(9, 8, max_norm=1.0), "layer: max_norm"),
    ],
)
def test_what_cannot_be_cut_over_the_ranks_is_refused(word: str, module: nn.Module, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        WORDS[word]("layer", False, Door()).check(module, 2)


@pytest.mark.parametrize(
    ("word", "module"), [("colwise_gather", nn.Linear(8, 9)), ("rowwise_embedding", nn.Embedding(9, 8))]
)
def test_a_vocabulary_need_not_divide(word: str, module: nn.Module) -> None:
    WORDS[word]("layer", False, Door()).check(module, 2)
