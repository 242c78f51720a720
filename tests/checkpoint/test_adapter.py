"""Adapters. Oracles: torch on whole tensors, and from_native undoing to_native bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fms_parallel.checkpoint.adapter import Adapter, Drop, Fuse, GroupQKV, PermuteRotary, Rename, Stack, Step, Tied
from fms_parallel.checkpoint.lazy import LazyTensor, MemoryTensor
from fms_parallel.errors import CheckpointError
from fms_parallel.models.llama import LLaMAConfig, hf_adapter
from tests.checkpoint.llamas import FUSED, TIED, TINY, build


def lazily(**tensors: Tensor) -> dict[str, LazyTensor]:
    return {key: MemoryTensor(tensor) for key, tensor in tensors.items()}


def to_native(adapter: Adapter | Step, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.read_all() for key, t in adapter.to_native(lazily(**tensors)).items()}


def from_native(adapter: Adapter | Step, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.read_all() for key, t in adapter.from_native(lazily(**tensors)).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


# ---- whole adapters ---------------------------------------------------------------------------------------------

CONFIGS = {
    "separate": TINY,
    "fused": FUSED,
    "fused, as many kv heads": replace(FUSED, kv_heads=4),
    "fused, one kv head": replace(FUSED, kv_heads=1),
    "tied": TIED,
    "qk norm": replace(TINY, qk_norm=True),
}


def weights(config: LLaMAConfig) -> dict[str, Tensor]:
    return {key: tensor.detach() for key, tensor in build(config).state_dict().items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_to_native_undoes_from_native_bit_for_bit(config: LLaMAConfig) -> None:
    model = build(config)
    slots: dict[int, MemoryTensor] = {}
    # Tied names share one lazy tensor, as an export hands them over.
    tensors = {k: slots.setdefault(t.data_ptr(), MemoryTensor(t)) for k, t in model.state_dict().items()}
    there = hf_adapter(config).from_native(tensors)
    back = hf_adapter(config).to_native(there)
    assert_same({key: tensor.read_all() for key, tensor in back.items()}, weights(config))


def test_separate_and_fused_models_have_the_same_hf_tensors() -> None:
    separate = replace(FUSED, fused=False)
    theirs = from_native(hf_adapter(separate), weights(separate))
    assert_same(from_native(hf_adapter(FUSED), to_native(hf_adapter(FUSED), theirs)), theirs)


def test_fused_weights_compute_what_separate_ones_do() -> None:
    separate, ids = replace(FUSED, fused=False), torch.randint(61, (2, 7))
    model, fused = build(separate), build(FUSED, seed=1)
    theirs = from_native(hf_adapter(separate), weights(separate))
    fused.load_state_dict(to_native(hf_adapter(FUSED), theirs))
    torch.testing.assert_close(fused(ids), model(ids))


# ---- steps ------------------------------------------------------------------------------------------------------

Q, K, V = torch.randn(4 * 6, 5), torch.randn(2 * 6, 5), torch.randn(2 * 6, 5)
GROUPS = GroupQKV("q.{kind}", "k.{kind}", "v.{kind}", "qkv.{kind}", heads=4, kv_heads=2, head_width=6)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_group_qkv_puts_each_kv_head_behind_its_queries(kind: str) -> None:
    q, k, v = (t if kind == "weight" else t[:, 0] for t in (Q, K, V))
    rows = []
    for group in range(2):  # two query heads of six rows each per kv head
        rows += [q[12 * group : 12 * (group + 1)], k[6 * group : 6 * (group + 1)], v[6 * group : 6 * (group + 1)]]
    expected = torch.cat(rows).reshape(2, 4, 6, *q.shape[1:])
    assert_same(to_native(GROUPS, {f"q.{kind}": q, f"k.{kind}": k, f"v.{kind}": v}), {f"qkv.{kind}": expected})
    assert_same(from_native(GROUPS, {f"qkv.{kind}": expected}), {f"q.{kind}": q, f"k.{kind}": k, f"v.{kind}": v})


def test_fuse_concatenates_and_stack_stacks() -> None:
    a, b = torch.randn(2, 3), torch.randn(4, 3)
    fuse = Fuse(("a", "b"), "ab", dim=0, sizes=(2, 4))
    assert_same(to_native(fuse, {"a": a, "b": b, "c": a}), {"ab": torch.cat([a, b]), "c": a})
    assert_same(from_native(fuse, {"ab": torch.cat([a, b])}), {"a": a, "b": b})
    stack = Stack(("a", "b"), "ab", dim=1)
    assert_same(to_native(stack, {"b": -a, "a": a}), {"ab": torch.stack([a, -a], 1)})
    assert_same(from_native(stack, {"ab": torch.stack([a, -a], 1)}), {"a": a, "b": -a})


def test_permuted_rotary_keeps_every_attention_score() -> None:
    """Oracle: scores of pairs turned as Meta turns them equal those turned as we do, on permuted rows."""
    from fms_parallel.modules.positions import Rotary, rotate

    x, heads, width = torch.randn(7, 5), 4, 6
    cos, sin = (table[:7] for table in Rotary(width).tables(torch.arange(7), 7))
    angles = torch.outer(torch.arange(7.0), 10000.0 ** (-torch.arange(0, width, 2) / width))
    turn = torch.polar(torch.ones_like(angles), angles)

    def interleaved(rows: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ rows.T).view(7, -1, width // 2, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    def ours(rows: Tensor) -> Tensor:
        return rotate((x @ rows.T).view(1, 7, -1, width), cos, sin)[0]

    key = torch.randn(heads * width, 5)
    step = PermuteRotary(("q", "k"), heads, width)
    moved = to_native(step, {"q": Q, "k": key, "v": V})
    expected = torch.einsum("shd,thd->hst", interleaved(Q), interleaved(key))
    torch.testing.assert_close(torch.einsum("shd,thd->hst", ours(moved["q"]), ours(moved["k"])), expected)
    assert torch.equal(moved["v"], V)
    assert_same(from_native(step, moved), {"q": Q, "k": key, "v": V})


def test_drop_forgets_by_pattern() -> None:
    step = Drop(("*.inv_freq",))
    assert step.to_native(lazily(**{"a.inv_freq": Q, "a.weight": K})).keys() == {"a.weight"}
    assert step.from_native(lazily(**{"a.weight": K})).keys() == {"a.weight"}


def test_tied_names_are_one_tensor() -> None:
    step = Tied("head", "embedding")
    for held in ({"embedding": Q}, {"head": Q}, {"head": Q, "embedding": Q.clone()}):
        assert_same(to_native(step, held), {"embedding": Q, "head": Q})
    one: LazyTensor = MemoryTensor(Q)
    assert step.from_native({"embedding": one, "head": one}) == {"embedding": one}
    with pytest.raises(CheckpointError, match="different contents"):
        to_native(step, {"head": Q, "embedding": Q + 1})
    with pytest.raises(CheckpointError, match="two tensors"):
        step.from_native(lazily(head=Q, embedding=Q))
    with pytest.raises(CheckpointError, match="head, tied to embedding"):
        to_native(step, {"head": Q, "embedding": K})


def test_steps_leave_their_input_as_it_is() -> None:
    tensors = {key: MemoryTensor(t) for key, t in weights(TIED).items()}
    before = dict(tensors)
    shared = {**tensors, "head.weight": tensors["embedding.weight"]}
    theirs = hf_adapter(TIED).from_native(shared)
    names = list(theirs)
    hf_adapter(TIED).to_native(theirs)
    assert tensors == before and list(theirs) == names


# ---- what does not fit ------------------------------------------------------------------------------------------

RENAME = Rename((("a.{n}", "x.{n}"), ("b", "y")))


@pytest.mark.parametrize(
    ("steps", "tensors", "message"),
    [
        (
            (RENAME,),
            {"a.1": Q, "c": Q, "d": Q},
            r"reading as 'hf': keys without a rule \(2\): c, d\. Is this the right format",
        ),
        ((Rename((("a.{n}", "x.{n}"), ("a.1", "y"))),), {"a.1": Q}, r"a\.1 is claimed by 2 rules: x\.1, y"),
        ((Rename((("a", "x"), ("b", "x"))),), {"a": Q, "b": Q}, "two tensors would be called x"),
        ((GROUPS,), {"q.weight": Q, "k.weight": K}, r"to make qkv\.\{kind\}, keys are missing \(1\): v\.weight"),
        (
            (GROUPS,),
            {"q.weight": K, "k.weight": K, "v.weight": V},
            r"qkv\.weight: a tensor of shape \(12, 5\) has not 2",
        ),
        ((Stack(("a", "b"), "ab"),), {"a": Q, "b": K}, "ab: parts of shape .* do not fit together"),
        ((Fuse(("a", "b"), "ab", 0, (1, 2)),), {"a": K, "b": V}, r"ab: 24 along dim 0 is not the sum"),
        ((Fuse(("a", "b"), "ab", 0),), {"a": Q, "b": K}, r"ab: parts have sizes \(24, 12\) along dim 0, expected"),
        ((Stack(("a", "b"), "ab"),), {"a": Q, "b": Q, "ab": Q}, "two tensors would be called ab"),
    ],
)
def test_misfit_on_the_way_in_is_named(steps: tuple[Step, ...], tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        to_native(Adapter("hf", steps), tensors)


@pytest.mark.parametrize(
    ("steps", "tensors", "message"),
    [
        ((RENAME,), {"x.1": Q, "z": Q}, "writing as 'hf': keys without a rule \\(1\\): z"),
        ((GROUPS,), {"qkv.weight": Q}, r"qkv\.weight: shape \(24, 5\) does not begin with \(2, 4, 6\)"),
        ((Stack(("a", "b"), "ab"),), {"ab": Q}, r"ab: shape \(24, 5\) has not 2 parts along dim 0"),
        ((Stack(("a", "b"), "ab", dim=2),), {"ab": Q}, r"ab: shape \(24, 5\) has not 2 parts along dim 2"),
    ],
)
def test_misfit_on_the_way_out_is_named(steps: tuple[Step, ...], tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_native(Adapter("hf", steps), tensors)
