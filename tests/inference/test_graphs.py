from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fms_parallel.inference import generate
from fms_parallel.inference.block_pieces import Pieces
from fms_parallel.inference.graphs import Graphs, Recorded
from fms_parallel.inference.weights import prepare_for_decode
from tests.inference.models import PROMPTS, compiled_wins, tiny_llama


def as_a_graph_does(function: Callable[[], Any]) -> Recorded:
    """Without a GPU: it reads the same addresses each time, and leaves its results at the same ones."""
    results = function()
    places = results if isinstance(results, tuple) else (results,)

    def replay() -> None:
        again = function()
        for place, found in zip(places, again if isinstance(again, tuple) else (again,), strict=True):
            place.copy_(found)

    for place in places:
        place.zero_()  # recording computes nothing
    return replay, results


def test_a_recorded_function_reads_what_each_call_brings() -> None:
    weight, seen = torch.randn(3, 3), []

    def function(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((x.data_ptr(), w.data_ptr()))
        return w @ x, x + y

    graphed = Graphs(as_a_graph_does).of(function, [torch.zeros(3), weight, torch.zeros(3)], [weight])
    for _ in range(2):
        x, y = torch.randn(3), torch.randn(3)
        product, total = graphed(x, weight, y)
        assert torch.equal(product, weight @ x) and torch.equal(total, x + y)
        weight.mul_(2)  # where it lies, not as it was
    assert len(set(seen)) == 1 and seen[0][1] == weight.data_ptr()


def test_a_model_of_recorded_pieces_gives_the_tokens_of_the_model() -> None:
    model = tiny_llama()
    want = [generate(model, few, max_new_tokens=8) for few in (PROMPTS[:1], PROMPTS)]
    recorded = mock.patch("fms_parallel.inference.blocks.Pieces", lambda: Pieces(Graphs(as_a_graph_does)))
    with compiled_wins(), recorded, prepare_for_decode(model, rows=3, compiled=True) as prepared:
        assert [choice.reason for choice in prepared.blocks] == ["", ""]
        assert [generate(model, few, max_new_tokens=8) for few in (PROMPTS[:1], PROMPTS)] == want


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_recorded_pieces_give_the_tokens_of_the_model() -> None:
    model = tiny_llama().cuda()
    want = generate(model, PROMPTS[:1], max_new_tokens=8)
    with prepare_for_decode(model, compiled=True) as prepared:
        assert all(choice.compiled is not None for choice in prepared.blocks)
        assert generate(model, PROMPTS[:1], max_new_tokens=8) == want
