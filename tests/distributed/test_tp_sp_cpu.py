"""The TP-versus-SP study's claims that need no clock: the same loss, the same weights per rank, fewer activations."""

from __future__ import annotations

import pytest

from benchmarks.tp_vs_sp import LAYOUTS, measure, worst_rank
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.models import get_config

SIZES = {"width": 64, "heads": 4, "ffn_width": 96, "layers": 2, "vocab_size": 128, "max_positions": 64}


@pytest.mark.parametrize("ranks", [2, 4])
def test_activations_with_and_without_sp_are_those_of_the_formula(ranks: int) -> None:
    tp, sp = worst_rank(run_ranks(measure, ranks, LAYOUTS, SIZES, 64, 2, 1))
    assert tp.weight_bytes == sp.weight_bytes
    assert tp.loss == pytest.approx(sp.loss, rel=1e-6)
    shape = get_config("llama", "micro", **SIZES).shape()
    expected = [shape.activation_bytes(2, 64, bytes_per_element=4, tp=ranks, sp=on) for on in (False, True)]
    assert tp.activation_bytes == pytest.approx(expected[0], rel=0.1)
    assert sp.activation_bytes == pytest.approx(expected[1], rel=0.1)
    assert sp.activation_bytes < tp.activation_bytes
