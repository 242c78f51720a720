"""What twins declare, without ranks. What they compute: tests/distributed/test_modules.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from fms_parallel.distributed.collectives import Axis
from fms_parallel.errors import LayoutError
from fms_parallel.modules.attention import Attention, AttentionShape, TPAttention
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.embedding import Embedding, Head
from fms_parallel.modules.feedforward import FeedForward, TPFeedForward
from fms_parallel.modules.norm import LayerNorm, RMSNorm, TPRMSNorm
from fms_parallel.modules.tp import TPModule, adopt, local, own_parameters, twin_of


def attention(**options: Any) -> Attention:
    return Attention(AttentionShape(8, 32, options.pop("kv_heads", 8), 2, **options))


def twin(module: nn.Module, size: int = 2, rank: int = 0) -> TPModule:
    """The twin of `module` on one rank of an axis that nobody else is on, its parameters whole."""
    cls = twin_of(module)
    assert cls is not None
    module.__class__ = cls
    assert isinstance(module, TPModule)
    module.axis, module.sp = Axis(None, size, rank, "gloo"), False  # type: ignore[arg-type]
    return module


NATIVES = {
    "attention": attention(qkv_bias=True, out_bias=True, qk_norm_eps=1e-5),
    "fused attention": attention(qkv_bias=True, fused=True),
    "gated": FeedForward(8, 6, bias=True),
    "plain": FeedForward(8, 6, gated=False),
    "fused gate": FeedForward(8, 6, fused=True, bias=True),
    "embedding": Embedding(7, 8),
    "head": Head(7, 8),
    "rms": RMSNorm(8),
    "layer": LayerNorm(8),
    "dropout": Dropout(0.1),
}


@pytest.mark.parametrize("name", NATIVES)
def test_a_twin_says_where_every_parameter_is_cut(name: str) -> None:
    module = twin(NATIVES[name])
    assert set(own_parameters(module)) <= set(module.placements())


@pytest.mark.parametrize("name", NATIVES)
def test_a_native_says_how_every_parameter_starts(name: str) -> None:
    """Defect W3 of the reference: parameters that no reset touched kept what the memory held."""
    module = NATIVES[name]
    known = module.initial() if hasattr(module, "initial") else {}  # type: ignore[operator]
    assert {parameter for parameter, _ in module.named_parameters()} <= set(known)


@pytest.mark.parametrize("tp", [2, 4, 8, 16, 32])
def test_each_rank_takes_its_queries_and_the_kv_heads_they_read(tp: int) -> None:
    """32 query heads, 8 kv heads: beyond tp=8 a kv head is copied to the ranks whose queries read it."""
    module = attention()
    place = twin(module, tp).placements()
    assert place["query.weight"] == Shard(0) and place["out.weight"] == Shard(1)
    assert place["key.weight"] == place["value.weight"] == (Shard(0) if tp <= 8 else Replicate())
    module.adopted()  # type: ignore[operator]
    if tp > 8:
        rows = torch.arange(8).repeat_interleave(2)[:, None].float()  # the number of each row's head
        heads = [int(copied_head(tp, rank, rows)[0, 0]) for rank in range(tp)]
        assert heads == [rank * 32 // tp * 8 // 32 for rank in range(tp)]


def copied_head(tp: int, rank: int, parameter: Tensor) -> Tensor:
    module = twin(attention(), tp, rank)
    assert isinstance(module, TPAttention)
    return module._copied_head(parameter, parameter)


@pytest.mark.parametrize(("tp", "heads", "kv_heads"), [(64, 32, 8), (3, 32, 8), (4, 24, 6)])
def test_heads_that_no_rank_could_hold_whole_are_refused(tp: int, heads: int, kv_heads: int) -> None:
    module = twin(Attention(AttentionShape(8, heads, kv_heads, 2)), tp)
    with pytest.raises(LayoutError, match=f"tp={tp} cannot cut {heads} heads with {kv_heads} kv heads"):
        module.adopted()


def test_twins_are_found_by_exact_class() -> None:
    """A subclass that changed something must bring its own twin."""

    class Changed(RMSNorm):
        pass

    assert twin_of(RMSNorm(8)) is TPRMSNorm
    assert twin_of(Changed(8)) is None and twin_of(nn.Linear(8, 8)) is None
    assert twin_of(twin(FeedForward(8, 6))) is None
    assert issubclass(TPFeedForward, FeedForward)


def test_adopting_what_has_no_twin_is_refused() -> None:
    with pytest.raises(LayoutError, match="Linear has no tensor-parallel twin"):
        adopt(nn.Linear(2, 2), None, sp=False)  # type: ignore[arg-type]


def test_a_twin_must_say_where_its_parameters_are_cut() -> None:
    class Native(nn.Module):
        pass

    class Twin(TPModule, Native):
        pass

    with pytest.raises(NotImplementedError, match="Twin must say"):
        twin(Native()).placements()


def test_own_parameters_leave_out_those_of_nested_twins() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.plain = nn.Linear(2, 2, bias=False)
            self.norm = RMSNorm(2)
            self.nested = nn.Sequential(LayerNorm(2), nn.Linear(2, 2, bias=False))

    assert own_parameters(Outer()) == ["scale", "plain.weight", "nested.1.weight"]


def test_a_plain_parameter_is_its_own_piece() -> None:
    parameter = nn.Parameter(torch.ones(2))
    placement: Placement = Replicate()
    assert local(parameter, placement) is parameter
