"""One rank of many in one process. Oracles: counts by design, torch's saved-tensor hooks, closed forms, real ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel.distributed import collectives
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.simulate import Simulation, cli, simulate, stage_ranks
from fms_parallel.simulate.ledger import Ledger
from fms_parallel.simulate.recorder import Event, Recorder
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import train_step
from fms_parallel.verify import _rows

L, E, V, F, B, S = 4, 32, 96, 48, 8, 16
SIZE: dict[str, Any] = {
    **{"architecture": "llama", "variant": "micro", "vocab_size": V, "width": E, "layers": L, "heads": 4},
    **{"kv_heads": 2, "ffn_width": F, "max_positions": 64},
}
BLOCK = E * E * 2 + E * E // 2 * 2 + 3 * E * F + 2 * E
WHOLE = 2 * V * E + L * BLOCK + E
"""Parameters of a block, and of the model."""


@cache
def of(words: str, rank: int = 0, rows: int = B, **more: Any) -> Simulation:
    return simulate(get_model, ParallelLayout.parse(words), batch_size=rows, seq_len=S, rank=rank, **(SIZE | more))


def counts(one: Simulation) -> dict[tuple[str, str], int]:
    return {(c.kind, c.axis): c.count for c in one.collectives}


# ---- collectives, exactly as designed ----------------------------------------------------------------------------

TOKENS = B * S * E * 4
"""Bytes of an activation `[B, S, E]`."""


def test_one_process_sends_nothing() -> None:
    assert of("").collectives == ()


def test_tp_has_two_all_reduces_per_block_each_way_and_no_more() -> None:
    one = of("tp=2")
    # Embedding forward; in each block attention and feed-forward, each way; the head backward; then loss and norm.
    assert counts(one) == {("all_reduce", "tp"): 4 * L + 3, ("all_gather", "tp"): 1}
    assert one.sent("all_reduce", "tp").bytes == (4 * L + 2) * TOKENS + 2 * 4
    assert one.sent("all_gather", "tp").bytes == 2 * 3 * B * S * 4  # three numbers per token, from each of two ranks


def test_sp_turns_each_into_a_gather_and_a_scatter_and_hides_nothing() -> None:
    one = of("tp=2,sp")
    # Gathers: before attention, feed-forward and head, after a block's outputs on the way back, what the two regions
    # read once more (of which only a run was kept), and three numbers.
    assert counts(one) == {
        ("all_gather", "tp"): 6 * L + 2 + 1,
        ("reduce_scatter", "tp"): 4 * L + 2,
        ("all_reduce", "tp"): 2,  # all partial gradients of norms in one; loss and norm
    }
    assert one.sent("all_gather", "tp").bytes == (6 * L + 2) * TOKENS + 2 * 3 * B * S * 4
    assert one.sent("reduce_scatter", "tp").bytes == (4 * L + 2) * TOKENS
    assert one.sent("all_reduce", "tp").bytes == (2 * L + 1) * E * 4 + 2 * 4


def test_fsdp_gathers_each_block_twice_and_scatters_it_once() -> None:
    one = of("fsdp=2")
    # Once: the embedding, whose backward reads no weight, and norm with head, which stay gathered for theirs.
    assert counts(one) == {("all_gather", "fsdp"): 2 * L + 2, ("reduce_scatter", "fsdp"): L + 2} | {
        ("all_reduce", "fsdp"): 2  # tokens; loss and norm
    }
    assert one.sent("reduce_scatter", "fsdp").bytes == 4 * WHOLE
    assert one.sent("all_gather", "fsdp").bytes == 4 * (2 * WHOLE - (V + 1) * E - V * E)


def test_fsdp_with_tp_and_sp_is_both_and_one_sum_per_norm() -> None:
    one, tp, fsdp = of("fsdp=2,tp=2,sp"), of("tp=2,sp", rows=B // 2), of("fsdp=2")
    found = counts(one)
    for kind in ("all_gather", "reduce_scatter"):
        assert found.pop((kind, "tp")) == tp.sent(kind, "tp").count
        assert one.sent(kind, "tp").bytes == tp.sent(kind, "tp").bytes
        assert found.pop((kind, "fsdp")) == fsdp.sent(kind, "fsdp").count
    # FSDP2 completes a norm's partial gradient before it scatters it: one small sum for each.
    assert found == {("all_reduce", "tp"): 2 * L + 1, ("all_reduce", "all"): 2}
    assert one.sent("all_reduce", "tp").bytes == (2 * L + 1) * E * 4


@pytest.mark.parametrize(("rank", "sent", "received"), [(0, 4, 4), (1, 4, 4)])
def test_pipeline_sends_each_micro_batch_once_each_way(rank: int, sent: int, received: int) -> None:
    one = of("pp=2,microbatches=4", rank)
    assert counts(one) == {("send", "pp"): sent, ("receive", "pp"): received, ("all_reduce", "pp"): 1}
    assert one.sent("send", "pp").bytes == one.sent("receive", "pp").bytes == TOKENS


def test_ulysses_exchanges_and_ring_passes_on() -> None:
    assert of("cp=2,cp_method=ulysses").sent("all_to_all", "cp").count > 0
    ring = of("cp=2")
    assert ring.sent("send", "cp").count == ring.sent("receive", "cp").count > 0
    assert ring.sent("all_to_all", "cp").count == 0


# ---- the same on real ranks --------------------------------------------------------------------------------------


def really_sent(words: str) -> list[tuple[str, int]]:
    """(kind, bytes) of everything that a second step sends over gloo, by the backend's own collectives."""
    collectives.MEANS.clear()
    layout = ParallelLayout.parse(words)
    model = get_model(distributed_strategy=layout, **SIZE)
    optimizer = make_optimizer(model, TrainOptions())
    rows = _rows(B // layout.data_parallel, S, V, 0)
    recorder = Recorder(unreal=False)
    train_step(model, optimizer, [rows], max_grad_norm=0.5)
    with recorder.recording():
        train_step(model, optimizer, [rows], max_grad_norm=0.5)
    return [(sent.kind, sent.bytes) for sent in recorder.sent]


@pytest.mark.parametrize("words", ["tp=2", "tp=2,sp", "fsdp=2", "pp=2,microbatches=4", "cp=2", "dp=2"])
def test_real_ranks_send_what_was_simulated(words: str) -> None:
    for rank, real in enumerate(run_ranks(really_sent, 2, words)):
        one = of(words, rank)
        for kind in {kind for kind, _ in real} | {c.kind for c in one.collectives}:
            mine = [c for c in one.collectives if c.kind == kind]
            sizes = [size for name, size in real if name == kind]
            assert (len(sizes), sum(sizes)) == (sum(c.count for c in mine), sum(c.bytes for c in mine)), kind


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "shards"), [("", 1), ("dp=2", 1), ("fsdp=2", 2), ("fsdp=4", 4), ("cp=2,fsdp=2", 4)])
def test_states_are_those_of_the_closed_form(words: str, shards: int) -> None:
    one = of(words)
    tensors = L * 9 + 3
    assert one.parameters == one.gradients == 4 * WHOLE / shards
    assert one.optimizer == 2 * one.parameters + 4 * tensors  # two moments, and a step count for each tensor


def test_states_of_stages_add_up_to_the_model() -> None:
    layout = ParallelLayout.parse("pp=2,fsdp=2")
    assert stage_ranks(layout) == [0, 2]
    assert sum(of("pp=2,fsdp=2", rank).parameters for rank in stage_ranks(layout)) == 4 * WHOLE / 2


def saved_by_first_block(**more: Any) -> int:
    """Bytes of the storages that autograd keeps of a real block, parameters aside."""
    model = get_model(**(SIZE | more))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    inside: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    block = next(iter(model.layers))  # type: ignore[arg-type]
    x = torch.randn(B, S, E, requires_grad=True)
    seq = model.sequences(B, S, torch.arange(S))  # type: ignore[operator]
    tables = {t.untyped_storage().data_ptr() for t in _all_tensors(seq)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        inside.append(True)
        block(x, seq)
    return sum(size for address, size in kept.items() if address not in tables)


def _all_tensors(seq: Any) -> Iterator[Tensor]:
    for value in vars(seq).values():
        yield from (v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Tensor))


def test_block_keeps_what_torch_saves_for_it() -> None:
    """Hooks count what each graph node saves; a block's input, made before it, stands for the output it hands on."""
    assert of("").kept_per_block["layers.1"] == saved_by_first_block()


def test_recomputed_blocks_keep_their_input_alone() -> None:
    one = of("recompute=full")
    assert set(one.kept_per_block.values()) == {B * S * E * 4}


def test_peak_is_what_its_purposes_add_up_to_and_no_less_than_states() -> None:
    one = of("fsdp=2,tp=2,sp")
    assert one.peak == sum(one.peak_by_purpose.values())
    assert one.peak >= one.parameters + one.optimizer + max(one.kept_per_block.values()) * L
    assert one.gathered >= 4 * BLOCK // 2 and one.waiting_gradients >= one.gradients


def test_more_micro_batches_in_flight_keep_more() -> None:
    first, last = of("pp=2,microbatches=4"), of("pp=2,microbatches=4", 1)
    assert first.activations > 1.5 * last.kept_per_block["layers.2"] * 2


def test_ledger_finds_the_fullest_moment_and_each_purposes_own() -> None:
    events = [Event(0, 10), Event(1, 5), Event(-1, 0, "+a"), Event(2, 7), Event(1, -5), Event(-1, 0, "-a"), Event(3, 1)]
    ledger = Ledger.of(events, {0: "parameters", 3: "parameters"})
    assert ledger.peak == {"parameters": 10, "activations": 12}
    assert ledger.most == {"parameters": 11, "activations": 12}
    assert list(ledger.kept_between()) == [("a", 2)]


# ---- a model too big for any machine, words, mistakes ------------------------------------------------------------


def test_seventy_billion_parameters_on_1024_ranks() -> None:
    layout = ParallelLayout.parse("pp=8,fsdp=16,tp=8,sp,microbatches=8,precision=bf16")
    one = simulate(get_model, layout, batch_size=128, seq_len=2048, architecture="llama", variant="70b")
    e, f, tp, fsdp, layers = 8192, 28672, 8, 16, 10
    matrices = e * e * 2 + 2 * e * 1024 + 3 * e * f
    held = (layers * (matrices // tp + 2 * e) + 32000 // tp * e) // fsdp
    assert one.parameters == one.gradients == 4 * held
    assert one.sent("all_gather", "tp").count == 8 * 6 * layers + 8  # and the embedding's way back
    assert one.sent("all_gather", "fsdp").bytes == 2 * fsdp * held


def plain(distributed_strategy: Any = None, **_: Any) -> nn.Module:
    """A factory that is not of the house: no `fill`, weights in memory."""
    return get_model(distributed_strategy=distributed_strategy, **SIZE)


def test_factory_without_fill_is_enough() -> None:
    one = simulate(plain, ParallelLayout.parse("tp=2"), batch_size=B, seq_len=S)
    assert one == replace(of("tp=2"), layout=one.layout)


def test_dropout_is_simulated_too() -> None:
    assert of("tp=2,sp", dropout=0.1).kept_per_block["layers.0"] > of("tp=2,sp").kept_per_block["layers.0"]


@pytest.mark.parametrize(
    ("words", "more", "error", "match"),
    [
        ("fsdp=4", {"batch_size": 6}, ConfigError, "batch_size=6 does not divide into 4 shards x 1 .* 8 would"),
        ("tp=2", {"seq_len": -1}, ConfigError, "seq_len=-1.* must be >= 1"),
        ("tp=2", {"grad_accum_steps": 0}, ConfigError, "grad_accum_steps=0.* must be >= 1"),
        ("tp=2", {"rank": 2}, ConfigError, r"rank 2: tp=2 has ranks 0 \.\. 1"),
        ("tp", {}, LayoutError, "tp"),
        ("tp=3", {}, LayoutError, "3"),
    ],
)
def test_mistakes_are_named(words: str, more: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {"batch_size": B, "seq_len": S} | more
    with pytest.raises(error, match=match):
        simulate(get_model, ParallelLayout.parse(words), **given, **SIZE)
    assert not dist.is_initialized()


WORDS = ["--factory", "fms_parallel.models:get_model", "--batch_size", "8", "--seq_len", "16", "--distributed"]
MORE = ["--architecture", "llama", "--width", "32", "--ffn_width", "48", "--layers", "4"]


def test_command_prints_first_and_last_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "pp=4", *MORE]) == 0
    out = capsys.readouterr().out
    assert "rank 0 (pp 0" in out and "rank 3 (pp 3" in out and "rank 1 " not in out
    assert "kept by layers.0" in out and "all_reduce" in out


def test_command_as_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "tp=2", "--rank", "1", "--json", *MORE]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found.keys() == Simulation.__dataclass_fields__.keys()
    assert found["coordinates"]["tp"] == 1 and found["parameters"] > 0
