"""The cost model against hand computation, against itself row by row, and against published step times."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from fms_parallel.layout import ParallelLayout
from fms_parallel.planner import Workload
from fms_parallel.planner.api import Planner
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.cost import CostModel
from fms_parallel.planner.efficiency import DEFAULT, matmul_efficiency
from fms_parallel.planner.hardware import GIB, load_devices
from fms_parallel.planner.measured import gpt
from fms_parallel.planner.memory import activation_bytes_per_token
from fms_parallel.planner.schedule import blocks_of_stages, stage_split
from fms_parallel.planner.simulate import makespan, simulate
from fms_parallel.planner.software import load_software
from fms_parallel.planner.space import Space, candidates
from fms_parallel.planner.topology import Group
from fms_parallel.shape import ModelShape

LLAMA = ModelShape(
    layers=12, width=1024, heads=16, kv_heads=4, head_width=64, ffn_width=4096, vocab=32000, max_positions=4096
)


def model(
    software: str = "native", device: str = "a100", sequence: int = 2048, uneven: bool = True, **habits: Any
) -> CostModel:
    workload = Workload(64, sequence)
    return CostModel(LLAMA, load_devices()[device], workload, replace(load_software(software), **habits), uneven=uneven)


ALL_AT_ONE_MOMENT = {"gradient_buffers": True, "logits_at_once": 0, "replicas_copy": False}


def test_operators_hold_the_blocks_matrices_and_flops() -> None:
    columns = Columns.of([{"micro": 2}, {"micro": 2, "tp": 4}])
    ops = model().block_operators(columns)
    weights = np.asarray(sum(op.weight for op in ops))
    assert weights[0] == LLAMA.block_parameters - 2 * LLAMA.norm_parameters
    assert weights[1] == weights[0] / 4
    tokens = 2 * 2048
    head = 2 * LLAMA.vocab * LLAMA.width
    per_token = (LLAMA.flops_per_token(2048, training=False) - head) / LLAMA.layers
    assert np.asarray(sum(op.flops for op in ops))[0] == pytest.approx(per_token * tokens, rel=1e-12)


def test_vectorised_rows_equal_single_rows() -> None:
    columns = candidates(16, 64, Space(max_virtual=2))
    columns = columns.take((columns.pp * columns.virtual <= LLAMA.layers) & (columns.tp <= 16))
    together = model().evaluate(columns)
    for row in np.random.default_rng(0).choice(len(columns), 25, replace=False):
        alone = model().evaluate(columns.take(np.array([row])))
        for part in ("times", "memory"):
            for f in fields(getattr(together, part)):
                got = getattr(getattr(together, part), f.name)[row]
                assert got == pytest.approx(getattr(getattr(alone, part), f.name)[0], rel=1e-12, abs=1e-15), f.name


@pytest.mark.parametrize(
    "layout",
    [
        "pp=4,microbatches=16",
        "pp=4,microbatches=16,schedule=gpipe",
        "pp=2,dp=2,microbatches=8",
        "pp=4,microbatches=16,schedule=interleaved1f1b,virtual_stages=3",
    ],
)
def test_closed_form_equals_the_simulated_pipeline(layout: str) -> None:
    planner = Planner.of("llama:3.2-1b", "a100:4", Workload(16, 1024))
    chosen = ParallelLayout.parse(layout)
    shape = planner.model.shape
    assert shape.layers % (chosen.pp) == 0
    estimate = planner.estimate(chosen)
    events = simulate(chosen.schedule, chosen.pp, estimate.micro_batches, planner.stages(estimate.layout))
    parts = estimate.breakdown
    pipeline = estimate.step_time_s - parts["dp"] - parts["optimizer"] - parts["other"] - parts["fsdp"]
    assert makespan(events) == pytest.approx(pipeline, rel=0.04)


def test_parts_add_up_to_the_step() -> None:
    columns = candidates(8, 16, Space())
    costs = model().evaluate(columns.take(columns.pp <= 4))
    total = sum(getattr(costs.times, f.name) for f in fields(costs.times))
    assert np.allclose(total, costs.times.total, rtol=1e-12)
    assert all((getattr(costs.times, f.name) >= 0).all() for f in fields(costs.times))


@pytest.mark.parametrize("layers", [7, 12, 33])
def test_stages_hold_every_block_once(layers: int) -> None:
    columns = Columns.of(
        [{"pp": p, "virtual": v} for p in range(1, layers + 1) for v in (1, 2) if p * v <= layers and (p > 1 or v == 1)]
    )
    for head in (0.0, 0.4, 2.5, 9.0):
        most, last, full = blocks_of_stages(layers, columns, head)
        for row in range(len(columns)):
            stages = int(columns.pp[row] * columns.virtual[row])
            split = stage_split(layers, int(most[row]), int(last[row]), int(full[row]), stages)
            assert sum(split) == layers and len(split) == stages and min(split) >= 1, (stages, head, split)
            assert max(split[:-1] or split) - min(split[:-1] or split) <= 1


def test_memory_of_states_follows_the_definitions() -> None:
    """fp32 parameters, gradients and two moments: 16 bytes per parameter, cut by fsdp and tp; norms are whole in tp."""
    rows = [{}, {"fsdp": 8}, {"tp": 4}, {"dp": 8}]
    memory = model(**ALL_AT_ONE_MOMENT).evaluate(Columns.of(rows)).memory
    states = memory.parameters + memory.gradients + memory.optimizer
    assert states[0] == pytest.approx(16 * LLAMA.parameters(), rel=1e-3)
    assert states[1] == pytest.approx(states[0] / 8, rel=1e-9)
    assert states[2] == pytest.approx(states[0] / 4, rel=1e-3)
    assert states[3] == states[0]


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (4, False), (4, True)])
def test_activations_match_the_shape_modules_count(tp: int, sp: bool) -> None:
    """`ModelShape.activation_bytes` counts what this library's modules save; both are from arXiv 2205.05198."""
    found = model().evaluate(Columns.of([{"micro": 4, "tp": tp, "sp": int(sp)}])).memory.activations[0]
    saved = LLAMA.activation_bytes(4, 2048, tp=tp, sp=sp)
    assert saved * 0.98 < found < saved * 1.12


def test_korthikanti_activations_are_34_plus_scores() -> None:
    """Table 2 of arXiv 2205.05198: s b h (34 + 5 a s / h) without parallelism, and its tp and sp forms."""
    shape, s = gpt(6144, 48, 64, 2048), 2048
    rows = [{}, {"tp": 8}, {"tp": 8, "sp": 1}, {"tp": 8, "sp": 1, "recompute": 1}, {"tp": 8, "sp": 1, "recompute": 2}]
    found = activation_bytes_per_token(shape, Columns.of(rows), s, load_software("megatron-2022")) / 6144
    scores = 5 * 64 * s / 6144
    assert found.tolist() == pytest.approx([34 + scores, 10 + 24 / 8 + scores / 8, (34 + scores) / 8, 34 / 8, 2 / 8])


# arXiv 2205.05198 Table 5: width, layers, heads, tp, pp, virtual, batch, micro, s with full, s with sp and selective
KORTHIKANTI = [
    (6144, 48, 64, 8, 1, 1, 4, 4, 1.42, 1.10),
    (12288, 96, 96, 8, 8, 3, 64, 1, 18.13, 13.75),
    (20480, 105, 128, 8, 35, 3, 280, 1, 49.05, 37.83),
    (25600, 128, 160, 8, 64, 1, 512, 1, 94.42, 71.49),
]


@pytest.mark.parametrize(
    ("width", "layers", "heads", "tp", "pp", "v", "batch", "micro", "full", "selective"), KORTHIKANTI
)
def test_korthikanti_step_times_within_six_percent(
    width: int, layers: int, heads: int, tp: int, pp: int, v: int, batch: int, micro: int, full: float, selective: float
) -> None:
    row = {"tp": tp, "pp": pp, "virtual": v, "schedule": 2 * (v > 1), "micro": micro, "count": batch // micro}
    columns = Columns.of([{**row, "recompute": 2}, {**row, "recompute": 1, "sp": 1}])
    device, shape = load_devices()["a100"], gpt(width, layers, heads, 2048)
    costs = CostModel(shape, device, Workload(batch, 2048), load_software("megatron-2022"), uneven=False).evaluate(
        columns
    )
    assert costs.times.total.tolist() == pytest.approx([full, selective], rel=0.06)
    assert (costs.memory.total < 80 * GIB).all()


def test_a_product_loses_half_a_wave_of_its_tiles() -> None:
    """A100: 108 cores times a tile of 128 x 256 is a wave; half of one is lost on average, less with smaller tiles."""
    constants = DEFAULT.having({"best": 1.0, "half": 0.0})
    half_wave = 108 * 128 * 256 / 2
    assert constants.wave == half_wave
    large, small = np.array(1e5), np.array(1e3)
    many = matmul_efficiency(large, large, large, constants)
    assert many == pytest.approx(1 / (1 + half_wave / 1e10), rel=1e-12)
    few = matmul_efficiency(small, small, large, constants)
    assert few == pytest.approx(0.72 / (1 + half_wave / 8 / 1e6), rel=1e-12)
    assert matmul_efficiency(small, small, small, DEFAULT.having({"best": 1.0, "half": 0.0, "wave": 0.0})) == 1


@pytest.mark.parametrize(("every", "blocks"), [(1, 12), (2, 6), (5, 3), (12, 1)])
def test_every_nth_block_is_recomputed_and_kept_as_such(every: int, blocks: int) -> None:
    rows = [{"micro": 2}, {"micro": 2, "recompute": 2}, {"micro": 2, "recompute": 2, "every": every}]
    costs = model(**ALL_AT_ONE_MOMENT).evaluate(Columns.of(rows))
    none, full, some = costs.times.recompute
    assert none == 0 and some == pytest.approx(full * blocks / 12, rel=1e-12)
    kept = costs.memory.activations
    # A recomputed block keeps its input; the others keep everything, as one does while it is recomputed.
    token = activation_bytes_per_token(LLAMA, Columns.of(rows[:2]), 2048, load_software("native")) * 2 * 2048
    assert token[1] == 2 * 2048 * LLAMA.width * 2
    assert kept[1] - kept[0] == pytest.approx(-11 * (token[0] - token[1]), rel=1e-9)
    assert kept[2] - kept[1] == pytest.approx((12 - blocks) * (token[0] - token[1]), rel=1e-9)


def test_torchs_checkpoint_spares_the_last_product_and_its_exchange() -> None:
    row = Columns.of([{"micro": 2, "tp": 4, "sp": 1, "recompute": 2}])
    early = replace(load_software("native"), gather_again=False)
    whole = replace(early, early_stop=False)
    steps = [replace(model(), software=software).step(row) for software in (early, whole)]
    assert float((steps[1].again() - steps[0].again())[0]) == pytest.approx(float(steps[0].block.last[0]), rel=1e-9)
    assert float(steps[0].tensor_talk()[0] / steps[1].tensor_talk()[0]) == pytest.approx(2.75 / 3, rel=1e-12)


def test_fsdp_shards_over_context_parallel_ranks_too() -> None:
    """As `shard_mesh` does: with fsdp parameters are cut over fsdp * cp, without it every cp rank has them whole."""
    memory = model().evaluate(Columns.of([{}, {"cp": 4}, {"fsdp": 2, "cp": 4}, {"fsdp": 8}])).memory
    assert memory.parameters[0] == memory.parameters[1]
    assert memory.parameters[2] == memory.parameters[3] == memory.parameters[0] / 8


def test_sequence_parallel_inputs_are_gathered_again_in_the_backward_pass() -> None:
    """Of 2 L + 1 regions each, behind the products that find its input's gradient; a simulated step counts as many."""
    row = Columns.of([{"micro": 2, "tp": 4, "sp": 1}, {"micro": 2, "tp": 4}])
    nothing_hides = DEFAULT.having({"overlap": 0.0})
    again, once = (
        replace(model(gather_again=words, reserve_gb=0.0), constants=nothing_hides).evaluate(row).times
        for words in (True, False)
    )
    size = 2 * 2048 * LLAMA.width * 2
    gather = float(model().collective("allgather", size, Group.of(np.array([4]), 1, 8))[0])
    more = (again.total - once.total)[0]
    assert more == pytest.approx(int(row.count[0]) * (2 * LLAMA.layers + 1) * gather, rel=1e-9)
    assert again.total[1] == once.total[1]


def test_a_processor_hides_nothing_of_what_its_host_does() -> None:
    """On a GPU a slow host is waited for; where processors compute, its time comes on top, and axes add theirs."""
    row = Columns.of([{"micro": 2, "dp": 2}])
    source = model().time_source
    ops = model().block_operators(row)
    launched = sum(op.kernels[0] for op in ops) * 1e-3

    def forward(hidden: float, host_us: float) -> float:
        constants = DEFAULT.having({"hidden": hidden, "host_us": host_us})
        return float(replace(source, constants=constants).total(ops).forward[0])  # type: ignore[type-var]

    alone = forward(1.0, 0.0)
    assert forward(1.0, 1000.0) == pytest.approx(max(launched, alone))
    assert forward(0.0, 1000.0) == pytest.approx(launched + alone)
    others = [
        replace(model(host_of={"dp": 10.0}, host=2.0), constants=DEFAULT.having({"hidden": hidden, "host_us": 1000.0}))
        .evaluate(row)
        .times.other[0]
        for hidden in (1.0, 0.0)
    ]
    assert others[1] - others[0] == pytest.approx(LLAMA.layers * 10 * 2e-3)
