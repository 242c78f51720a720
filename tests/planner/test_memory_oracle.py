"""The planner's memory against an oracle that knows no formulas: `simulate` runs the library's own training step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.models.build import get_shape
from fms_parallel.planner import Cluster, Planner, Workload, cost, memory
from fms_parallel.planner.catalog import Model
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.flight import flights
from fms_parallel.planner.hardware import GIB
from fms_parallel.planner.software import Software, load_software
from fms_parallel.simulate import Simulation, simulate, stage_ranks

SIZE: dict[str, Any] = {"vocab_size": 256, "width": 128, "layers": 4, "heads": 8, "kv_heads": 4, "ffn_width": 384}
B, S = 8, 256
TENSORS_PER_BLOCK, OUTSIDE = 9, 3

WHOLE = "tp=4,sp,tp_parts=attention"
SHARDED = ["", "tp=2", "tp=4,sp", WHOLE, "dp=2", "fsdp=2", "fsdp=2,tp=2,sp", "dp=2,fsdp=2,tp=2", "cp=2,fsdp=2"]
STAGED = ["pp=2,microbatches=4", "pp=4,tp=2,microbatches=4", "pp=2,fsdp=2,tp=2,sp,microbatches=2"]
POLICIES = ["recompute=selective", "recompute=full", "tp=2,sp,recompute=full"]


@cache
def simulated(words: str, rank: int = 0) -> Simulation:
    layout = ParallelLayout.parse(words)
    return simulate(get_model, layout, batch_size=B, seq_len=S, rank=rank, architecture="llama", **SIZE)


def planned(words: str, first: bool = True) -> tuple[float, float, float, float]:
    """(parameters, gradients, optimizer state of one rank; activations that a block keeps per micro-batch)."""
    layout = ParallelLayout.parse(words)
    shape, columns = get_shape("llama", **SIZE), Columns.of_layout(layout, B)
    software = load_software("native").with_precision(layout.precision)
    states = memory.States(shape, columns, software, None)
    ends = {"embedding": first or layout.pp == 1, "head": np.array([not first or layout.pp == 1])}
    held = states.rank(np.array([shape.layers / layout.pp]), **ends)
    rows = int(columns.micro[0]) if layout.pp > 1 else B // layout.data_parallel
    per_token = memory.activation_bytes_per_token(shape, columns, S, software)
    kept = float(per_token[0]) * rows * S / layout.cp
    parameters, gradients, optimizer = (float(np.asarray(value).flat[0]) for value in held[:3])
    return parameters, gradients, optimizer, kept


@pytest.mark.parametrize("words", [*SHARDED, *STAGED])
def test_parameters_and_optimizer_are_exact(words: str) -> None:
    layout = ParallelLayout.parse(words)
    for rank in {stage_ranks(layout)[0], stage_ranks(layout)[-1]}:
        one = simulated(words, rank)
        parameters, _, optimizer, _ = planned(words, first=rank == 0)
        outside = OUTSIDE if layout.pp == 1 else (1 if rank == 0 else 2)
        steps = 4 * (TENSORS_PER_BLOCK * SIZE["layers"] // layout.pp + outside)  # AdamW counts steps for each tensor
        assert (one.parameters, one.optimizer) == (parameters, optimizer + steps)


@pytest.mark.parametrize("words", SHARDED)
def test_gradients_are_exact(words: str) -> None:
    assert simulated(words).gradients == planned(words)[1]


@pytest.mark.parametrize("words", ["pp=2,fsdp=2,microbatches=4", "pp=2,fsdp=2,tp=2,sp,microbatches=2"])
def test_gradients_that_wait_for_the_last_micro_batch_are_counted_whole(words: str) -> None:
    """The fullest moment also has the buffer of a stage's first reduction."""
    waiting, planned_bytes = simulated(words).waiting_gradients, planned(words)[1]
    assert planned_bytes <= waiting <= planned_bytes * (1 + 2 / SIZE["layers"])


KEPT = ["", "tp=2", "tp=4,sp", WHOLE, "fsdp=2", "fsdp=2,tp=2,sp", *STAGED, *POLICIES]


@pytest.mark.parametrize("words", [*KEPT, *(f"{words},precision=bf16" for words in KEPT[1::3])])
def test_what_a_block_keeps_is_within_two_hundredths(words: str) -> None:
    one = simulated(words)
    # The last block of the first rank: what is made for all blocks, such as rotary tables, is there by then.
    kept = list(one.kept_per_block.values())[-1]
    assert kept == pytest.approx(planned(words)[3], rel=0.02)


PEAKS = ["", "tp=2", "tp=4,sp", WHOLE, "fsdp=2", "dp=2", "cp=2", "cp=2,fsdp=2", "recompute=full", "pp=2,microbatches=4"]
PEAKS += ["precision=bf16", "tp=2,sp,precision=bf16"]
# What a pipeline keeps of what it hands on, and which gradients are there when all activations are.
PEAKS += ["pp=4,microbatches=8", "pp=2,fsdp=2,microbatches=4"]
INTERLEAVED = "microbatches=4,schedule=interleaved1f1b,virtual_stages=2"
# What a backward pass in two halves keeps between them: all of the graph, also where it recomputes, and gradients.
ZERO_BUBBLE = "schedule=interleaved_zero_bubble,virtual_stages=2"
PEAKS += ["pp=2,microbatches=4,schedule=dualpipev", "pp=2,tp=2,sp,microbatches=4,schedule=zbv"]
PEAKS += [f"pp=2,microbatches=8,{ZERO_BUBBLE}", f"pp=2,fsdp=2,recompute=full,microbatches=4,{ZERO_BUBBLE}"]
PEAKS += ["pp=2,recompute=full,microbatches=4,schedule=zbv,precision=bf16"]
PEAKS += ["pp=2,microbatches=4,schedule=gpipe", f"pp=2,{INTERLEAVED}", f"pp=2,fsdp=2,recompute=full,{INTERLEAVED}"]


def in_use(words: str) -> Software:
    """The library's habits as the simulation counts them."""
    native = load_software("native").with_precision(ParallelLayout.parse(words).precision)
    # What an allocator has reserved besides belongs to devices, and processors cut the loss into smaller pieces.
    return replace(native, reserve_gb=0, stream_pools=False, logits_at_once=1 << 23)


@pytest.mark.parametrize("words", PEAKS)
def test_the_fullest_moment_is_within_a_twentieth(words: str) -> None:
    layout = ParallelLayout.parse(words)
    work = Workload(global_batch=B, sequence=S, precision=layout.precision)
    planner = Planner(Model("small", get_shape("llama", **SIZE)), Cluster.parse("h100:2"), work, in_use(words))
    ranks = {stage_ranks(layout)[0], stage_ranks(layout)[-1]}
    found = max(simulated(words, rank).peak for rank in ranks)
    assert planner.estimate(layout).memory_gb * GIB == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("words", ["pp=2,microbatches=8,recompute=full", f"pp=2,microbatches=8,{ZERO_BUBBLE}"])
def test_each_end_of_a_pipeline_is_within_a_twentieth(words: str, last: bool) -> None:
    """Also the end that is not the fullest: there most of what is handed on waits in buffers of its own."""
    layout, shape = ParallelLayout.parse(words), get_shape("llama", **SIZE)
    columns = Columns.of_layout(layout, B)
    moments, blocks = flights(columns, last), np.array([SIZE["layers"] / layout.pp])
    known = (shape, columns, S, in_use(words), None)
    found = memory.of_stage(*known, blocks, moments, np.array([not last]), np.array([last]))
    assert found.total[0] == pytest.approx(simulated(words, stage_ranks(layout)[-last]).peak, rel=0.05)


def planned_sizes(words: str, kind: str) -> set[float]:
    """Bytes of every collective of a kind that the planner puts a time to."""
    layout, sizes, timed = ParallelLayout.parse(words), set(), cost.CostModel.collective

    def noted(self: Any, name: str, size: Any, *more: Any) -> Any:
        if name == kind:
            sizes.add(float(np.asarray(size).flat[0]))
        return timed(self, name, size, *more)

    software = load_software("native").with_precision("bf16")
    work = Workload(global_batch=B, sequence=S)
    with patch.object(cost.CostModel, "collective", noted):
        Planner(Model("small", get_shape("llama", **SIZE)), Cluster.parse("h100:2"), work, software).estimate(layout)
    return sizes


OF_BLOCKS = 4 * SIZE["layers"] + 2  # each way around attention and feed-forward, and at embedding and head


@pytest.mark.parametrize(
    ("words", "kind", "axis", "planned_kind", "count", "outside"),
    [
        ("tp=2", "all_reduce", "tp", "allreduce", OF_BLOCKS, 8),
        ("tp=2,sp", "reduce_scatter", "tp", "reducescatter", OF_BLOCKS, 0),
        ("tp=2,sp,tp_parts=attention", "reduce_scatter", "tp", "reducescatter", 2 * SIZE["layers"] + 2, 0),
        # Gradients of feed-forwards, and of norms.
        ("tp=2,sp,tp_parts=attention", "all_reduce", "tp", "allreduce", 1, 8 + 4 * 128 * (2 * SIZE["layers"] + 1)),
        ("fsdp=2", "reduce_scatter", "fsdp", "reducescatter", SIZE["layers"], 4 * (2 * 256 + 1) * 128),
        ("pp=2,microbatches=4", "send", "pp", "p2p", 4, 0),
    ],
)
def test_sizes_of_collectives_are_those_sent(
    words: str, kind: str, axis: str, planned_kind: str, count: int, outside: int
) -> None:
    """`outside`: bytes that are not of blocks: loss and norm, tables and last norm."""
    words = f"{words},precision=bf16"
    each = (simulated(words).sent(kind, axis).bytes - outside) / count
    assert each in planned_sizes(words, planned_kind)
