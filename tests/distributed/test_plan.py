"""Models without twins, cut by a generated plan: loss, every gradient and an optimizer step equal one process."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.feedforward import FeedForward
from fms_parallel.strategy.compose import compose
from fms_parallel.strategy.plan import generate_layer_plan
from fms_parallel.training.step import backward, count_tokens, logits_loss, train_step

D = 4
"""Head width of the toy models."""


@dataclass(frozen=True)
class Toy:
    """A GPT of plain torch modules."""

    heads: int = 4
    kv_heads: int = 4
    vocab: int = 13
    length: int = 7
    tied: bool = False
    post_norm: bool = False
    qk_norm: bool = False
    padding: int | None = None
    beside_twins: bool = False


class ToyAttention(nn.Module):
    def __init__(self, toy: Toy, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, toy.heads * D)
        self.k = nn.Linear(width, toy.kv_heads * D)
        self.v = nn.Linear(width, toy.kv_heads * D)
        self.o = nn.Linear(toy.heads * D, width)
        self.q_norm = nn.LayerNorm(D) if toy.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q, k, v = (m(x).view(batch, length, -1, D).transpose(1, 2) for m in (self.q, self.k, self.v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(self.q_norm(q), k, v, is_causal=True, enable_gqa=grouped)
        return self.o(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ToyBlock(nn.Module):
    def __init__(self, toy: Toy, width: int) -> None:
        super().__init__()
        self.post_norm = toy.post_norm
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = ToyAttention(toy, width)
        self.mlp: nn.Module = Mlp(width)
        if toy.beside_twins:
            self.mlp = FeedForward(width, 3 * width, "gelu", gated=False, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ToyGPT(nn.Module):
    def __init__(self, toy: Toy) -> None:
        super().__init__()
        width = 8
        self.embed = nn.Embedding(toy.vocab, width, padding_idx=toy.padding)
        self.positions = nn.Embedding(16, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.blocks = nn.ModuleList(ToyBlock(toy, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, toy.vocab, bias=False)
        if toy.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.embed(ids) + self.positions(torch.arange(ids.shape[1]))) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    labels: Tensor


PATTERNS = {
    r"blocks\.\d+\.attn\.[qkv]": "colwise",
    r"blocks\.\d+\.attn\.o": "rowwise",
    r"blocks\.\d+\.mlp\.up": "colwise",
    r"blocks\.\d+\.mlp\.down": "rowwise",
    r"embed": "rowwise_embedding",
    r"head": "colwise_gather",
    r"(.*\.)?norm\d?": "sequence",
}


def without(*patterns: str) -> dict[str, str]:
    """`PATTERNS` less some."""
    return {pattern: word for pattern, word in PATTERNS.items() if pattern not in patterns}


MQA = {r"blocks\.\d+\.attn\.q": "colwise", r"blocks\.\d+\.attn\.[kv]": "copied"} | dict(list(PATTERNS.items())[1:])
QK_NORM = PATTERNS | {r".*q_norm": "partial"}

CASES = {
    "plain": (Toy(), PATTERNS),
    "tied": (Toy(tied=True), PATTERNS),
    "one token": (Toy(length=1), PATTERNS),
    "post-norm": (Toy(post_norm=True), PATTERNS),
    "one kv head": (Toy(kv_heads=1), MQA),
    "query norm": (Toy(qk_norm=True), QK_NORM),
    "embedding and head on every rank": (Toy(), without("embed", "head")),
    "only matrices": (Toy(), without(r"(.*\.)?norm\d?", "head", "embed")),
    "padding row": (Toy(padding=3), PATTERNS),
    "beside twins": (Toy(beside_twins=True), without(r"blocks\.\d+\.mlp\.up", r"blocks\.\d+\.mlp\.down")),
    "padding row counted from the end": (Toy(padding=-1, tied=True), PATTERNS),
}


WITHOUT_SP = ("beside twins", "tp=2,sp")
"""Twins and plans keep cut tokens in different forms."""


def toy_model(toy: Toy) -> ToyGPT:
    """The same fp64 weights on every rank; biases and norms are random too, so that each one counts."""
    torch.manual_seed(1)
    model = ToyGPT(toy).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def toy_batches(toy: Toy) -> list[Batch]:
    torch.manual_seed(2)
    ids = torch.randint(toy.vocab, (2, 3, toy.length))
    labels = torch.randint(toy.vocab, (2, 3, toy.length))
    labels[0, 0, 0] = -100
    return [Batch(i, t) for i, t in zip(ids, labels, strict=True)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Summed loss and every gradient."""
    loss = backward(model, batches, count_tokens(model, batches), loss_function=logits_loss)
    return {"loss": loss} | {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def results(model: nn.Module, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(loss and gradients, parameters after one AdamW step of `train_step`)."""
    found = gradients(model, batches)
    # A large eps: without it Adam's first step is the sign of the gradient, which hides its size.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0)
    train_step(model, optimizer, batches, loss_function=logits_loss, check_gradients=True)
    return found, {name: whole(parameter).detach() for name, parameter in model.named_parameters()}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each entry, measured against the entry's largest element (its size when all are tiny)."""
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name] - want).abs().max() / want.abs().max().clamp(min=1e-3))
        for name, want in wanted.items()
    }


def compare_toys(pairs: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """On each rank: case and layout -> errors against one process, which runs here as well."""
    report, wanted = {}, {}
    for name, text in pairs:
        (toy, patterns), layout = CASES[name], ParallelLayout.parse(text)
        batches = toy_batches(toy)
        if name not in wanted:
            wanted[name] = results(toy_model(toy), batches)
        plain = toy_model(toy)
        model: Any = compose(plain, layout, plan=generate_layer_plan(plain, patterns, sp=layout.sp))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert model.head.weight is model.embed.weight or not toy.tied
        if layout.data_parallel > 1:  # each data-parallel rank reads its own micro-batch
            batches = [batches[dist.get_rank() // layout.tp]]
        gradient, stepped = results(model, batches)
        if layout.data_parallel > 1:
            dist.all_reduce(gradient["loss"])
            gradient["loss"] /= layout.tp
        report[f"{name}, {text}"] = worst(gradient, wanted[name][0]) | worst(stepped, wanted[name][1])
    return report


def assert_close(reports: list[dict[str, dict[str, float]]], limit: float = 1e-12) -> None:
    wrong = {
        (rank, case, name): error
        for rank, report in enumerate(reports)
        for case, errors in report.items()
        for name, error in errors.items()
        if not error <= limit
    }
    assert not wrong


def test_gradients_and_step_equal_one_process() -> None:
    pairs = [(name, layout) for name in CASES for layout in ("tp=2", "tp=2,sp") if (name, layout) != WITHOUT_SP]
    assert_close(run_ranks(compare_toys, 2, [*pairs, ("plain", "tp=2,sp,recompute=full")]))


def test_plan_composes_with_fsdp() -> None:
    layouts = ("fsdp=2,tp=2", "fsdp=2,tp=2,sp", "tp=4,sp")
    assert_close(run_ranks(compare_toys, 4, [("tied", layout) for layout in layouts]))


REFUSED: dict[str, tuple[Toy, dict[str, str], str, bool, str]] = {
    "a norm of this rank's heads taken for replicated": (
        Toy(qk_norm=True),
        PATTERNS,
        "tp=2",
        False,
        r"q_norm\.\w+: the tp ranks found different gradients .* Use the word 'partial'",
    ),
    "a replicated norm taken for one of heads": (
        Toy(),
        without(r"(.*\.)?norm\d?") | {"norm": "partial"},
        "tp=2",
        False,
        r"norm\.\w+: the tp ranks found the same gradients .* Use the word 'replicate'",
    ),
    "the one kv head taken for replicated": (
        Toy(kv_heads=1),
        MQA | {r"blocks\.\d+\.attn\.[kv]": "replicate"},
        "tp=2",
        False,
        r"attn\.[kv]\.\w+: the tp ranks found different gradients .* 'copied'",
    ),
    "one parameter cut in two ways": (
        Toy(tied=True),
        without("head"),
        "tp=2",
        False,
        r"embed\.weight and head\.weight are one parameter but are cut differently",
    ),
    "sp with a plan beside twins": (Toy(beside_twins=True), {}, "tp=2,sp", True, "sp with twins and a plan"),
    "sp in the layout only": (Toy(), PATTERNS, "tp=2,sp", False, "the layout has sp=True, the plan was made without"),
    "a norm of this rank's heads taken for one of tokens": (
        Toy(qk_norm=True),
        PATTERNS | {r".*q_norm": "sequence"},
        "tp=2,sp",
        True,
        r"q_norm: with sp a 'sequence' module reads the residual",
    ),
}


def refusals() -> dict[str, str]:
    """Case -> what it was refused with, `` when it trained."""
    said = {}
    for name, (toy, patterns, text, sp, _) in REFUSED.items():
        plain = toy_model(toy)
        try:
            model = compose(plain, ParallelLayout.parse(text), plan=generate_layer_plan(plain, patterns, sp=sp))
            gradients(model, toy_batches(toy))
            said[name] = ""
        except LayoutError as error:
            said[name] = str(error)
    return said


def test_a_wrong_plan_is_refused_not_trained() -> None:
    for said in run_ranks(refusals, 2):
        for name, (*_, message) in REFUSED.items():
            assert re.search(message, said[name]), f"{name}: {said[name]!r}"


# ---- a model that somebody else wrote ---------------------------------------------------------------------------

LLAMA = {
    r"model\.layers\.\d+\.self_attn\.[qkv]_proj": "colwise",
    r"model\.layers\.\d+\.self_attn\.o_proj": "rowwise",
    r"model\.layers\.\d+\.mlp\.(gate|up)_proj": "colwise",
    r"model\.layers\.\d+\.mlp\.down_proj": "rowwise",
    r"model\.embed_tokens": "rowwise_embedding",
    r"lm_head": "colwise_gather",
    r"model\.(.*\.)?\w*norm": "sequence",
}


def compare_transformers_llama() -> dict[str, dict[str, float]]:
    """transformers' LlamaForCausalLM, untouched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    report = {}
    for tied in (False, True):
        config = LlamaConfig(
            vocab_size=13,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        )

        def build(config: Any = config) -> nn.Module:
            torch.manual_seed(1)
            return LlamaForCausalLM(config).double()

        batches = toy_batches(Toy())
        wanted = results(build(), batches)
        for text in ("tp=2", "tp=2,sp"):
            layout, model = ParallelLayout.parse(text), build()
            model = compose(model, layout, plan=generate_layer_plan(model, LLAMA, sp=layout.sp))
            gradient, stepped = results(model, batches)
            report[f"tied={tied}, {text}"] = worst(gradient, wanted[0]) | worst(stepped, wanted[1])
    return report


def test_transformers_llama_equals_one_process() -> None:
    pytest.importorskip("transformers")
    assert_close(run_ranks(compare_transformers_llama, 2))
