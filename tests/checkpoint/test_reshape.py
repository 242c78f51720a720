from __future__ import annotations

import pytest
import torch

from fms_parallel.checkpoint.adapter import Adapter, GroupQKV
from fms_parallel.checkpoint.lazy import LazyTensor, MemoryTensor
from fms_parallel.checkpoint.reshape import FirstOf, Grid, OlderEndings, Reversed
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError

H, K, D, E = 6, 2, 4, 5
QKV = "layers.{n}.qkv.{kind}"
Q, KEY, V = (f"layers.{{n}}.{name}.{{kind}}" for name in ("q", "k", "v"))


def held(**shapes: tuple[int, ...]) -> dict[str, LazyTensor]:
    return {name.replace("__", "."): MemoryTensor(torch.randn(shape)) for name, shape in shapes.items()}


def values(tensors: dict[str, LazyTensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.read_all() for name, tensor in tensors.items()}


def same(one: dict[str, LazyTensor], other: dict[str, LazyTensor]) -> bool:
    a, b = values(one), values(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_grid_is_a_view_and_comes_back() -> None:
    flat = held(layers__3__qkv__weight=((H + 2 * K) * D, E), layers__3__qkv__bias=((H + 2 * K) * D,), norm=(E,))
    step = Grid((QKV,), (K, H // K + 2, D))
    grids = step.to_native(flat)
    whole = flat["layers.3.qkv.weight"].read_all().view(K, H // K + 2, D, E)
    assert torch.equal(grids["layers.3.qkv.weight"].read_all(), whole)
    box = Box((1, 2, 1, 0), (1, 2, 3, 2))
    assert torch.equal(grids["layers.3.qkv.weight"].read(box), whole[box.slices])
    assert same(step.from_native(grids), flat)


def test_a_grid_of_another_shape_is_named() -> None:
    step = Grid((QKV,), (K, H // K + 2, D))
    with pytest.raises(CheckpointError, match=r"40 rows"):
        step.to_native(held(layers__0__qkv__weight=(39, E)))
    with pytest.raises(CheckpointError, match=r"layers\.0\.qkv\.weight: shape \(2, 5, 3, 5\) does not begin with"):
        step.from_native(held(layers__0__qkv__weight=(K, H // K + 2, 3, E)))


@pytest.mark.parametrize("kv_heads", [1, H])
def test_fused_rows_are_split_into_query_key_value(kv_heads: int) -> None:
    """GPT-BigCode's c_attn: [q of all heads | k | v], or [q k v] head by head."""
    group = H // kv_heads
    join = GroupQKV(Q, KEY, V, QKV, H, kv_heads, D)
    adapter = Adapter("hf", (Grid((QKV,), (kv_heads, group + 2, D)), Reversed(join)))
    flat = held(layers__0__qkv__weight=((H + 2 * kv_heads) * D, E), layers__0__qkv__bias=((H + 2 * kv_heads) * D,))
    rows = flat["layers.0.qkv.weight"].read_all()
    parts = values(adapter.to_native(flat))
    if kv_heads == 1:
        q, k, v = rows.split([H * D, D, D])
    else:
        q, k, v = (rows.view(H, 3, D, E)[:, i].reshape(H * D, E) for i in range(3))
    for name, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(parts[f"layers.0.{name}.weight"], expected)
    assert same(adapter.from_native(adapter.to_native(flat)), flat)


@pytest.mark.parametrize(("names", "expected"), [(("a", "b"), "a"), (("b",), "b"), (("a",), "a")])
def test_the_first_name_present_counts_and_all_are_written(names: tuple[str, ...], expected: str) -> None:
    tensors, step = held(**dict.fromkeys(names, (2,)), other=(3,)), FirstOf(("a", "b"), under="b")
    native = step.to_native(tensors)
    assert native.keys() == {"b", "other"} and native["b"] is tensors[expected]
    assert step.from_native(native).keys() == {"a", "b", "other"}
    assert step.to_native(held(other=(3,))).keys() == {"other"}


def test_older_endings_are_read_and_not_written() -> None:
    step, tensors = OlderEndings(((".gamma", ".weight"), (".beta", ".bias"))), held(n__gamma=(2,), n__beta=(2,), m=(1,))
    native = step.to_native(tensors)
    assert list(native) == ["n.weight", "n.bias", "m"]
    assert same(step.from_native(native), native)
    with pytest.raises(CheckpointError, match=r"two tensors would be called n\.weight"):
        step.to_native(held(n__gamma=(2,), n__weight=(2,)))
