"""Models that the tests generate with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms_parallel import compat
from fms_parallel.inference.weights import _Trial
from fms_parallel.layout import ParallelLayout
from fms_parallel.models.llama import LLaMA, LLaMAConfig
from fms_parallel.strategy.compose import compose

PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9]]
"""Rows of unequal length; the second is as long as a model of 2 kv heads has heads, the third as one of 1."""


def tiny_llama(kv_heads: int = 2, layout: str = "", **config: Any) -> nn.Module:
    """The same global weights in every layout; initial weights are large, so that tokens are well apart."""
    sizes = {"vocab_size": 37, "width": 32, "layers": 2, "heads": 4, "ffn_width": 48, "max_positions": 64, "std": 0.4}
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig(kv_heads=kv_heads, **sizes | config))
    return compose(model, ParallelLayout.parse(layout), seed=0)


class Counting(nn.Module):
    """After token t comes t + 1, by far the likeliest; `forwards` counts the calls."""

    def __init__(self, vocab: int = 50, max_positions: int = 1000) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab, max_positions=max_positions)
        self.forwards = 0

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        first_position: int = 0,
        mask: Tensor | None = None,
        cache: Any = None,
        last: int | None = None,
    ) -> Tensor:
        self.forwards += 1
        vocab = self.config.vocab_size
        return 100.0 * F.one_hot((input_ids[:, -1:] + 1) % vocab, vocab)


@contextmanager
def compiled_wins(step: float = -1.0) -> Iterator[None]:
    """What would be compiled is called as it is, which takes no time, and what is tried last is called the fastest.

    Args:
        step: between one time and the next; positive: the first is the fastest.
    """
    times = itertools.count(1e6, step)
    with ExitStack() as stack:
        patches = (
            (compat, "compile_function", lambda function, examples: function),
            (compat, "compile_over_sizes", lambda function, examples: function),
            (compat, "compile_traced", lambda graph, examples: graph),
            (_Trial, "best", lambda *_: next(times)),
        )
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
