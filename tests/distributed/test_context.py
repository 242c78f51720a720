"""Sequences shared by ranks against one process: every method, with every other axis."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fms_parallel.data.feed import Batch
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError, LayoutError, TrainingError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.modules.attention import Attention, AttentionShape
from fms_parallel.modules.context import Context
from fms_parallel.modules.sequences import DropoutKey, Sequences
from fms_parallel.strategy.base import parallel_of
from fms_parallel.training import evaluate, train
from fms_parallel.training.step import backward, logits_loss
from fms_parallel.verify import TOLERANCE, Report, verify
from tests.distributed.comparison import Together, check, shaken_model
from tests.distributed.test_layouts import BIASED, ONE_KV, TINY, ranks_of, shaken_llama
from tests.distributed.test_training import DROPPING, EXACT
from tests.poison import poisoned_memory
from tests.training.runs import OPTIONS, rows, tiny

METHODS = ("ring", "allgather", "ulysses")
MHA, TIED, DROPS = {"kv_heads": 4}, {"tied": True}, {"dropout": 0.2}
NTK = {"rope_scaling": "ntk", "rope_options": {}, "rope_original": 4}
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_options": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 4,
    },
}

CASES: list[tuple[str, dict[str, Any]]] = [
    *((f"cp=2,cp_method={method}", config) for method in METHODS for config in (MHA, DROPS, ONE_KV | TIED)),
    ("cp=2", {"fused": True, **BIASED}),
    ("cp=2,recompute=full", DROPS),
    ("cp=2,recompute=selective", {}),
    ("cp=2,cp_method=ulysses", NTK),
    ("cp=2,cp_method=allgather", LLAMA3),
    ("cp=4", NTK),
    ("cp=4,cp_method=ulysses", {}),
    ("cp=4,cp_method=allgather", ONE_KV),
    ("cp=2,tp=2,sp", {**DROPS, **TIED}),
    ("cp=2,tp=2,cp_method=ulysses", ONE_KV),
    ("cp=2,tp=2,sp,cp_method=allgather", {"fused": True}),
    ("fsdp=2,cp=2", TIED),
    ("fsdp=2,cp=2,cp_method=allgather,offload=params", {}),
    ("dp=2,cp=2", DROPS),
    ("pp=2,cp=2", {**DROPS, **TIED}),
    ("pp=2,cp=2,schedule=zbv,cp_method=ulysses", {"layers": 4}),
    ("fsdp=2,cp=2,tp=2,sp", DROPS),
    ("dp=2,fsdp=2,cp=2", ONE_KV),
    ("pp=2,fsdp=2,cp=2,schedule=interleaved1f1b,recompute=full", {"layers": 4}),
]


def compare(layout: str, config: dict[str, Any], dtype: str, pieces: int) -> Report:
    with poisoned_memory():
        parsed = ParallelLayout.parse(layout)
        numbers = {"dtype": dtype, "seq_len": 13, "grad_accum_steps": pieces, "steps": 3}
        return verify(shaken_llama, parsed, **numbers, **(TINY | config))


COMPARED = Together(
    compare,
    [(layout, config, "fp64", 2 if ranks_of(layout) == 2 else 1) for layout, config in CASES],
    lambda layout, *more: ranks_of(layout),
)


@pytest.mark.parametrize(("layout", "config"), CASES, ids=[f"{layout}-{'-'.join(config)}" for layout, config in CASES])
def test_fp64_matches_one_process(layout: str, config: dict[str, Any]) -> None:
    check(COMPARED(layout, config, "fp64", 2 if ranks_of(layout) == 2 else 1))


def test_fp32_matches_one_process() -> None:
    reports = run_ranks(compare, 4, "cp=2,tp=2,sp", BIASED, "fp32", 1)
    assert all(report.worst <= TOLERANCE["fp32"] for report in reports), reports[0]


# ---- the other families -----------------------------------------------------------------------------------------

FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    *((f"cp=2,cp_method={method}", "mistral", {"window": 5}) for method in METHODS),
    ("cp=2,tp=2,sp", "mixtral", {"experts": 3, "window": 5, "std": 0.2}),
    ("fsdp=2,cp=2", "granite", {"tied": True, "dropout": 0.2}),
    ("cp=2", "gpt_bigcode", {"attention_dropout": 0.3, "dropout": 0.2}),
    ("pp=2,cp=2,cp_method=ulysses", "gpt_bigcode", {"multi_query": False}),
]


def compare_family(layout: str, family: str, config: dict[str, Any]) -> Report:
    with poisoned_memory():
        parsed, factory = ParallelLayout.parse(layout), partial(shaken_model, family)
        tiny = {name: value for name, value in TINY.items() if name != "kv_heads" or family != "gpt_bigcode"}
        return verify(factory, parsed, dtype="fp64", seq_len=13, **(tiny | config))


FAMILIES_COMPARED = Together(compare_family, FAMILIES, lambda layout, *more: ranks_of(layout))


@pytest.mark.parametrize(("layout", "family", "config"), FAMILIES, ids=[f"{case[0]}-{case[1]}" for case in FAMILIES])
def test_every_family_matches_one_process(layout: str, family: str, config: dict[str, Any]) -> None:
    check(FAMILIES_COMPARED(layout, family, config))


# ---- attention alone: what a causal model without a mask does not use -------------------------------------------


def attended(context: Context | None, masked: bool, x: Tensor, upper: Tensor, **more: Any) -> tuple[Tensor, ...]:
    """Output and gradients of an attention that sees everything, or with a mask what it says, over `x [B, S, E]`."""
    torch.manual_seed(0)
    shape = AttentionShape(24, 4, 2, 6, causal=False, std=0.3, **more)
    module = Attention(shape).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    # Rows are packed of two documents; nothing of the second is seen by the first, nor by the last query at all.
    numbers = torch.arange(x.shape[1]) // 8
    mask = (numbers[:, None] == numbers)[None, None] if masked else None
    x = x.clone() if context is None else context.cut(x, 1)
    if context is not None:
        upper, mask = context.cut(upper, 1), None if mask is None else context.cut(mask, -2)
    seq = Sequences(len(x), x.shape[1], mask=mask, dropout=DropoutKey(7), context=context)
    y = module(x.requires_grad_(), seq)
    y.backward(upper)
    assert x.grad is not None
    return y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)


def attended_by_ranks(method: str, length: int, masked: bool, drop: float) -> list[float]:
    """Largest differences from one process; gradients of parameters are those of all ranks together."""
    from torch.distributed.device_mesh import init_device_mesh

    from fms_parallel.distributed.collectives import Axis, all_reduce

    axis = Axis.of(init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    context = Context(axis, method, length)
    generator = torch.Generator().manual_seed(1)
    x, upper = (torch.randn(2, length, 24, dtype=torch.float64, generator=generator) for _ in range(2))
    with poisoned_memory():
        want, got = (attended(where, masked, x, upper, dropout=drop) for where in (None, context))
    real = context.real(axis.rank)
    pairs = [(context.cut(a, 1)[:, :real], b[:, :real]) for a, b in zip(want[:2], got[:2], strict=True)]
    pairs += [(a, all_reduce(b.clone(), axis)) for a, b in zip(want[2:], got[2:], strict=True)]
    return [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("masked", "drop"), [(False, 0.0), (True, 0.0), (False, 0.3), (True, 0.3)])
def test_full_masked_and_dropped_attention_match_one_process(method: str, masked: bool, drop: float) -> None:
    for worst in run_ranks(attended_by_ranks, 2, method, 13, masked, drop):
        assert max(worst) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_hold_nothing_but_padding_match_one_process(method: str) -> None:
    for worst in run_ranks(attended_by_ranks, 4, method, 3, False, 0.0):
        assert max(worst) <= 1e-12


# ---- packed documents in a model --------------------------------------------------------------------------------


def packed_loss(layout: str | None) -> float:
    """Summed loss of rows that hold two documents each, with positions that start again."""
    import torch.distributed as dist

    model = shaken_llama(distributed_strategy=layout, **TINY)
    ids = torch.randint(97, (3, 13), generator=torch.Generator().manual_seed(2))
    ends = torch.tensor([5, 8, 12])
    second = torch.arange(13) >= ends[:, None]
    positions = torch.arange(13) - second * ends[:, None]
    same = (second[:, :, None] == second[:, None, :])[:, None]
    mask = same & torch.ones(13, 13, dtype=torch.bool).tril()
    strategy = parallel_of(model).context
    if strategy is None:
        return float(model(ids, labels=ids, positions=positions, mask=mask).detach())
    part = strategy.share(Batch(ids, ids))
    told = {"positions": part.context.cut(positions, 1), "mask": part.context.cut(mask, -2), "context": part.context}
    loss = model(part.input_ids, labels=part.labels, **told).detach()
    dist.all_reduce(loss)
    return float(loss)


@pytest.mark.parametrize("method", METHODS)
def test_packed_documents_match_one_process(method: str) -> None:
    found = run_ranks(packed_loss, 2, f"cp=2,cp_method={method},precision=fp64")
    expected = packed_loss(ParallelLayout(precision="fp64"))  # type: ignore[arg-type]
    assert found == pytest.approx([expected] * 2, rel=1e-13)


# ---- runs -------------------------------------------------------------------------------------------------------


def run(layout: str | None, options: dict[str, Any]) -> tuple[list[float], float]:
    """Losses of four steps in fp64, and the validation loss after them."""
    told: list[float] = []
    words = f"{layout},precision=fp64" if layout else ParallelLayout(precision="fp64")
    with poisoned_memory():
        model = tiny(words, **DROPPING)  # type: ignore[arg-type]
        train(model, rows(), on_step=lambda n: told.append(n["loss"]), **(EXACT | {"steps": 4} | options))
        return told, evaluate(model, rows(11), batch_size=4)


@pytest.mark.parametrize(
    ("layout", "ranks"), [("cp=2", 2), ("cp=2,cp_method=ulysses", 2), ("pp=2,cp=2", 4), ("fsdp=2,cp=2", 4)]
)
def test_a_run_matches_one_process(layout: str, ranks: int) -> None:
    expected, validation = run(None, {})
    for losses, found in run_ranks(run, ranks, layout, {"grad_accum_steps": 2}):
        assert losses == pytest.approx(expected, rel=1e-11)
        assert found == pytest.approx(validation, rel=1e-11)


def part_of_a_run(layout: str, folder: str, steps: int) -> list[float]:
    options = {"output_path": folder, "resume": "auto", "lr_schedule": "constant", "warmup_steps": 0}
    told: list[float] = []
    model = tiny(f"{layout},precision=fp64", **DROPPING)
    train(model, rows(), on_step=lambda n: told.append(n["loss"]), **(OPTIONS | options | {"steps": steps}))
    return told


def test_a_run_moves_between_context_and_other_layouts(tmp_path: Path) -> None:
    told: list[float] = []
    model = tiny(ParallelLayout(precision="fp64"), **DROPPING)  # type: ignore[arg-type]
    options = OPTIONS | {"lr_schedule": "constant", "warmup_steps": 0}
    train(model, rows(), on_step=lambda numbers: told.append(numbers["loss"]), **options)
    found = run_ranks(part_of_a_run, 4, "fsdp=2,cp=2", str(tmp_path), 2)[0]
    found += run_ranks(part_of_a_run, 2, "tp=2,sp", str(tmp_path), 4)[0]
    found += run_ranks(part_of_a_run, 2, "cp=2", str(tmp_path), 6)[0]
    assert found == pytest.approx(told, rel=1e-11)


def bf16_losses(layout: str) -> list[float]:
    told: list[float] = []
    train(tiny(layout), rows(), on_step=lambda numbers: told.append(numbers["loss"]), **OPTIONS)
    return told


@pytest.mark.parametrize("method", METHODS)
def test_bf16_stays_near_fp32(method: str) -> None:
    exact: list[float] = []
    train(tiny(), rows(), on_step=lambda numbers: exact.append(numbers["loss"]), **OPTIONS)
    found = run_ranks(bf16_losses, 2, f"cp=2,cp_method={method},precision=bf16")[0]
    assert found == pytest.approx(exact, rel=1e-2)
    assert found != exact


def gradient_of_logits(layout: str | None) -> float:
    """Of a loss that asks the model for logits."""
    words = f"{layout},precision=fp64" if layout else ParallelLayout(precision="fp64")
    model = tiny(words)  # type: ignore[arg-type]
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    backward(model, [Batch(tokens[:, :-1], tokens[:, 1:])], 22, loss_function=logits_loss)
    gradient = model.norm.weight.grad  # type: ignore[union-attr]
    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return float(whole.square().sum())  # type: ignore[union-attr]


def test_a_loss_over_logits_matches_one_process() -> None:
    assert run_ranks(gradient_of_logits, 2, "cp=2") == pytest.approx([gradient_of_logits(None)] * 2, rel=1e-12)


# ---- what is sent -----------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Counts the operators that talk to other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def sent(method: str) -> dict[str, dict[str, int]]:
    """By forward and backward of two blocks, the gradients' own average left out."""
    model = get_model("llama", "micro", distributed_strategy=f"cp,cp_method={method}", **TINY)
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(False)
    tokens = torch.zeros(2, 13, dtype=torch.int64)
    part = parallel_of(model).context.share(Batch(tokens, tokens))
    with Sent() as ahead:
        loss = model(part.input_ids, labels=part.labels, context=part.context)
    with Sent() as back:
        loss.backward()
    return {"forward": dict(ahead.counts), "backward": dict(back.counts)}


def both_ways(count: int) -> dict[str, int]:
    return {"send": count, "recv_": count}


EXPECTED: list[tuple[str, int, dict[str, int], dict[str, int]]] = [
    # Per block: keys and values travel cp - 1 times; back again so, with cp - 1 hops of their gradients.
    ("ring", 2, both_ways(2), both_ways(4)),
    ("ring", 4, both_ways(6), both_ways(12)),
    # Gathered once, their gradients summed once; over gloo by sends and receives (`distributed/direct.py`).
    ("allgather", 2, both_ways(2), both_ways(2)),
    # Queries, keys and values there in one, the result back in another.
    ("ulysses", 2, {"alltoall_base_": 4}, {"alltoall_base_": 4}),
]


@pytest.mark.parametrize(("method", "ranks", "forward", "backward_"), EXPECTED)
def test_nothing_else_is_sent(method: str, ranks: int, forward: dict[str, int], backward_: dict[str, int]) -> None:
    for counts in run_ranks(sent, ranks, method):
        assert counts == {"forward": forward, "backward": backward_}


# ---- refusals ---------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Knows nothing of parts of sequences."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_layouts_that_cannot_be_are_refused_before_anything() -> None:
    from fms_parallel.strategy import compose

    with pytest.raises(LayoutError, match="cp=2: Plain computes whole sequences only"):
        compose(Plain(), ParallelLayout(cp=2))
    with pytest.raises(LayoutError, match=r"cp=2,tp=4,cp_method=ulysses: a rank's 1 of 4 heads do not divide by 2"):
        ParallelLayout.parse("cp=2,tp=4,cp_method=ulysses").validate(get_model("llama", "micro").config.shape())


def refusals() -> list[str]:
    model, said = tiny("cp=2"), []
    asked: list[Any] = [
        partial(train, model, rows(), loss_function=lambda *_: 0, **OPTIONS),
        partial(evaluate, model, rows(), loss_function=lambda *_: 0),
        partial(backward, model, [Batch(torch.zeros(1, 40, dtype=torch.int64), torch.zeros(1, 40).long())], 40),
    ]
    for ask in asked:
        try:
            ask()
            said.append("nothing")
        except (LayoutError, TrainingError, ConfigError) as error:
            said.append(str(error))
    return said


def test_what_ranks_cannot_do_together_is_said() -> None:
    for training, evaluation, positions in run_ranks(refusals, 2):
        assert "a loss_function of its own does not run with cp" in training and training == evaluation
        assert "position 40 is beyond max_positions=32" in positions
