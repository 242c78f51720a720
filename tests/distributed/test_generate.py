"""Generation on several ranks: every rank has the tokens of one process, whatever the layout.

All layouts of one world size run in one job: starting ranks costs more than what they do here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel.data.feed import Batch
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.mesh import build_mesh
from fms_parallel.errors import ConfigError
from fms_parallel.inference import generate
from fms_parallel.inference.cache import KVCache
from fms_parallel.inference.ranks import SameOnAllRanks
from fms_parallel.layout import ParallelLayout
from fms_parallel.training import mean_loss
from tests.inference.models import PROMPTS, tiny_llama
from tests.poison import poisoned_memory

KV_HEADS = (1, 2)
CASES = [
    *((2, "tp=2", 1), (2, "tp=2", 2), (2, "tp=2,sp", 1), (2, "tp=2,sp", 2), (2, "fsdp=2", 2), (2, "dp=2", 2)),
    *((2, "tp=2,sp,tp_parts=attention", 2), (2, "cp=2", 2)),
    *((4, "tp=4", 1), (4, "tp=4", 2), (4, "fsdp=2,tp=2,sp", 1), (4, "cp=2,tp=2,sp", 2)),
]
"""World size, layout, kv heads."""

CALLS: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "greedy": (PROMPTS, {}),
    "greedy, one row of one token": ([[9]], {}),
    "greedy without a cache": (PROMPTS, {"use_cache": False}),
    "greedy to eos": (PROMPTS, {"eos_id": [5, 24]}),
    "sampled": (PROMPTS, {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3}),
}

Results = dict[Any, Any]


def tokens_of_every_call(model: nn.Module) -> dict[str, list[list[int]]]:
    return {name: generate(model, prompts, max_new_tokens=6, **options) for name, (prompts, options) in CALLS.items()}


def training_works(model: nn.Module) -> bool:
    """Generation must leave nothing behind that a backward pass cannot use."""
    model.train()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    mean_loss(model, Batch(ids, ids), ids.numel()).backward()
    return all(parameter.grad is not None for parameter in model.parameters())


def cache_bytes(model: nn.Module) -> int:
    cache = KVCache(capacity=10)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache=cache, last=1)
    return cache.memory_bytes


def run_layouts(world: int) -> Results:
    results: Results = {}
    with poisoned_memory():
        for layout, kv in [case[1:] for case in CASES if case[0] == world]:
            model = tiny_llama(kv, layout)
            results[layout, kv] = (tokens_of_every_call(model), cache_bytes(model), training_works(model))
    return results


def run_disagreements() -> Results:
    """What happens when ranks differ: in logits, in what they pass, in what they hold."""
    rank = dist.get_rank()
    model = tiny_llama(2, "tp=2")

    def noise(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(rank)
        return logits + rank * 50 * torch.randn(logits.shape, generator=generator)

    hook = model.get_submodule("head").register_forward_hook(noise)
    results: Results = {"noisy": tokens_of_every_call(model)}
    hook.remove()
    for name, prompts in {
        "different": [[1, 2], [3 + rank]],
        "bad on one": [[1], [] if rank else [2]],
        "bad on both": [[1], []],
    }.items():
        try:
            generate(model, prompts, max_new_tokens=2)
        except ConfigError as error:
            results[name] = str(error)
    return results


def tokens_of_the_first_rank() -> list[int]:
    """Each rank brings its own number to a mesh of two dimensions."""
    ranks = SameOnAllRanks(build_mesh(ParallelLayout.parse("fsdp=2,tp=2")), torch.device("cpu"))
    return ranks.first(torch.tensor([10 + dist.get_rank(), 20])).tolist()


def run_four() -> Results:
    return {**run_layouts(4), "first": tokens_of_the_first_rank()}


def run_two() -> Results:
    return {**run_layouts(2), **run_disagreements()}


@pytest.fixture(scope="module")
def by_world() -> dict[int, list[Results]]:
    """World size -> what each rank found."""
    return {2: run_ranks(run_two, 2), 4: run_ranks(run_four, 4)}


@pytest.fixture(scope="module")
def one_process() -> dict[int, Results]:
    """kv heads -> tokens of every call."""
    return {kv: tokens_of_every_call(tiny_llama(kv)) for kv in KV_HEADS}


@pytest.mark.parametrize(("world", "layout", "kv"), CASES)
def test_every_rank_has_the_tokens_of_one_process(
    world: int, layout: str, kv: int, by_world: dict[int, list[Results]], one_process: dict[int, Results]
) -> None:
    for found in by_world[world]:
        assert found[layout, kv][0] == one_process[kv]


def test_calls_differ_so_that_equality_means_something(one_process: dict[int, Results]) -> None:
    for tokens in one_process.values():
        assert tokens["greedy"] == tokens["greedy without a cache"] != tokens["sampled"]
        assert any(len(row) < 6 for row in tokens["greedy to eos"])
    assert one_process[1]["greedy"] != one_process[2]["greedy"]


@pytest.mark.parametrize(("world", "layout", "kv"), CASES)
def test_cache_holds_this_ranks_kv_heads_only(
    world: int, layout: str, kv: int, by_world: dict[int, list[Results]]
) -> None:
    heads_here = max(1, kv // ParallelLayout.parse(layout).tp)
    wanted = 2 * 2 * heads_here * 10 * 8 * 4  # layers, keys and values, heads, capacity, D, bytes
    assert [found[layout, kv][1] for found in by_world[world]] == [wanted] * world


@pytest.mark.parametrize(("world", "layout", "kv"), CASES)
def test_model_still_trains_afterwards(world: int, layout: str, kv: int, by_world: dict[int, list[Results]]) -> None:
    assert all(found[layout, kv][2] for found in by_world[world])


def test_ranks_with_different_logits_go_on_with_the_first_ranks_tokens(
    by_world: dict[int, list[Results]], one_process: dict[int, Results]
) -> None:
    """The noise of rank 0 is zero, so its tokens are those of one process."""
    assert [found["noisy"] for found in by_world[2]] == [one_process[2]] * 2


def test_first_rank_of_a_mesh_of_two_dimensions_is_heard_by_all(by_world: dict[int, list[Results]]) -> None:
    assert [found["first"] for found in by_world[4]] == [[10, 20]] * 4


@pytest.mark.parametrize("name", ["different", "bad on one"])
def test_requests_that_differ_are_refused_on_every_rank(name: str, by_world: dict[int, list[Results]]) -> None:
    sentence = "the prompts or settings of generate differ between ranks: all ranks of a model must be given the same."
    assert [found.get(name) for found in by_world[2]] == [sentence] * 2


def test_bad_request_is_named_on_every_rank(by_world: dict[int, list[Results]]) -> None:
    sentences = [found.get("bad on both", "") for found in by_world[2]]
    assert all(sentence.startswith("prompt 1 of 2 is empty") for sentence in sentences)
