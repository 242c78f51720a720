"""Plans on simulated ranks: nothing lost, nothing sent twice, nothing sent that was there."""

from __future__ import annotations

import random
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor

from fms_parallel.distributed.boxes import Box
from fms_parallel.dynamic.plan import Item, Move, Table, TransferPlan, plan_transfer, split, subtract
from fms_parallel.dynamic.predict import predict_tables
from fms_parallel.errors import ConfigError, FmsError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_config
from fms_parallel.models.llama import LLaMA

WIDTH = 12
ROUND = 4096


def model(**overrides: object) -> torch.nn.Module:
    sizes = {"vocab_size": 61, "width": 24, "layers": 5, "heads": 4, "kv_heads": 2, "ffn_width": 38}
    with torch.device("meta"):
        return LLaMA(get_config("llama", "micro", **(sizes | overrides)))


def items_of(module: torch.nn.Module) -> dict[str, Item]:
    return {name: Item(tuple(p.shape), WIDTH) for name, p in module.named_parameters()}


def drawn_layout(random_source: random.Random, ranks: int, layers: int) -> ParallelLayout:
    """Any layout of up to `ranks` ranks that the model can be cut to, uneven stages included."""
    while True:
        degrees = {axis: random_source.choice((1, 1, 2, 3, 4, 5, 8)) for axis in ("pp", "dp", "fsdp", "cp", "tp")}
        if not 1 < prod(degrees.values()) <= ranks:
            continue
        words = ",".join(f"{axis}={degree}" for axis, degree in degrees.items())
        sizes: list[int] = []
        if 1 < degrees["pp"] < layers and random_source.random() < 0.5:
            cuts = sorted(random_source.sample(range(1, layers), degrees["pp"] - 1))
            sizes = [end - start for start, end in zip([0, *cuts], [*cuts, layers], strict=True)]
        try:
            layout = ParallelLayout.parse(words)
            if sizes:
                layout = replace(layout, stage_split=tuple(sizes))
            layout.validate(
                get_config("llama", "micro", width=24, layers=layers, heads=4, kv_heads=2, ffn_width=38).shape()
            )
        except FmsError:
            continue
        return layout


def played(
    plan: TransferPlan, items: dict[str, Item], held: list[Table], wanted: list[Table]
) -> list[dict[str, list[Tensor]]]:
    """What every rank ends with, when each begins with the numbers of its own boxes and nothing else."""
    full = {name: torch.arange(prod(item.shape)).view(item.shape) for name, item in items.items()}
    before = [{name: [full[name][b.slices].clone() for b in bs] for name, bs in table.items()} for table in held]
    after = [{name: [torch.full(b.size, -1) for b in bs] for name, bs in table.items()} for table in wanted]
    for move in (*plan.copies, *plan.moves):
        box = next(b for b in held[move.source][move.name] if b.intersect(move.box) == move.box)
        index = held[move.source][move.name].index(box)
        piece = before[move.source][move.name][index][move.box.shifted(box.offset).slices]
        for place, target in zip(wanted[move.target][move.name], after[move.target][move.name], strict=True):
            if place.intersect(move.box) == move.box:
                spot = target[move.box.shifted(place.offset).slices]
                assert (spot == -1).all(), f"{move} writes what is there already"
                spot.copy_(piece)
    for table, found in zip(wanted, after, strict=True):
        for name, boxes in table.items():
            assert all(torch.equal(x, full[name][b.slices]) for x, b in zip(found[name], boxes, strict=True))
    return after


def lacking_bytes(items: dict[str, Item], held: list[Table], wanted: list[Table]) -> int:
    """The lower bound, counted element by element."""
    count = 0
    for have, want in zip(held, wanted, strict=True):
        for name, boxes in want.items():
            missing = torch.zeros(items[name].shape, dtype=torch.bool)
            for box in boxes:
                missing[box.slices] = True
            for box in have.get(name, ()):
                missing[box.slices] = False
            count += int(missing.sum()) * items[name].width
    return count


@pytest.mark.parametrize("seed", range(8))
def test_random_pairs_of_layouts_move_the_lower_bound_and_cover_everything(seed: int) -> None:
    """25 pairs a seed, 200 in all; on different numbers of ranks too: those that leave or join have empty tables."""
    source = random.Random(seed)
    module = model(tied=seed % 2 == 0)
    items = items_of(module)
    for _ in range(25):
        ranks = source.choice((2, 3, 4, 5, 6, 8))
        before, after = (drawn_layout(source, ranks, 5) for _ in range(2))
        held, wanted = predict_tables(module, before), predict_tables(module, after)
        held += [{}] * (len(wanted) - len(held))
        wanted += [{}] * (len(held) - len(wanted))
        plan = plan_transfer(items, held, wanted, ROUND)
        played(plan, items, held, wanted)
        assert plan.total == plan.lower_bound == lacking_bytes(items, held, wanted), (before, after)


def test_rounds_hold_what_a_rank_may_send_and_receive() -> None:
    module = model()
    held = predict_tables(module, ParallelLayout.parse("fsdp=4"))
    wanted = predict_tables(module, ParallelLayout.parse("tp=4"))
    plan = plan_transfer(items_of(module), held, wanted, ROUND)
    assert len(plan.rounds) > 5
    for moves in plan.rounds:
        for rank in range(4):
            assert sum(plan.size(move) for move in moves if move.source == rank) <= ROUND // 2
            assert sum(plan.size(move) for move in moves if move.target == rank) <= ROUND // 2


def test_replicas_share_the_sending() -> None:
    """Four copies, four more ranks that want one: each copy sends a quarter."""
    module = model()
    whole = {name: (Box.whole(item.shape),) for name, item in items_of(module).items()}
    plan = plan_transfer(items_of(module), [whole] * 4 + [{}] * 4, [whole] * 8, ROUND)
    mean = plan.total / 4
    assert plan.sent[4:] == (0,) * 4
    assert all(0.8 * mean < sent < 1.2 * mean for sent in plan.sent[:4])


def test_a_packed_tensor_is_several_boxes() -> None:
    """q, k and v rows of one matrix, each cut in two, to one matrix cut in two."""
    items = {"qkv": Item((12, 4), WIDTH)}
    held: list[Table] = [
        {"qkv": tuple(Box((part * 4 + rank * 2, 0), (2, 4)) for part in range(3))} for rank in range(2)
    ]
    wanted: list[Table] = [{"qkv": (Box((rank * 6, 0), (6, 4)),)} for rank in range(2)]
    for one, other in ((held, wanted), (wanted, held)):
        plan = plan_transfer(items, one, other)
        played(plan, items, one, other)
        assert plan.total == plan.lower_bound == 4 * 4 * WIDTH


def test_scalars_and_empty_shards_travel() -> None:
    items = {"step": Item((), 4), "bias": Item((2,), WIDTH)}
    held: list[Table] = [
        {"step": (Box((), ()),), "bias": (Box((rank,), (1 if rank < 2 else 0,)),)} for rank in range(3)
    ]
    wanted: list[Table] = [{"step": (Box((), ()),), "bias": (Box((0,), (2,)),)}] * 4
    plan = plan_transfer(items, [*held, {}], wanted)
    played(plan, items, [*held, {}], wanted)
    assert plan.total == 4 + (1 + 1 + 2 + 2) * WIDTH


WHOLE: Table = {"w": (Box((0, 0), (4, 4)),)}


@pytest.mark.parametrize(
    ("held", "wanted", "message"),
    [
        ([WHOLE], [{"w": (Box((0, 0), (3, 4)),)}], r"^w: the part at \(3, 0\) of size \(1, 4\).* would be lost"),
        (
            [{"w": (Box((0, 0), (4, 2)),)}],
            [WHOLE],
            r"^w: rank 0 needs the part at \(0, 2\) of size \(4, 2\).*no rank holds",
        ),
        ([WHOLE], [{}], r"^w: .* has no home"),
        ([{}], [WHOLE], r"^w: rank 0 needs .* no rank holds"),
        ([WHOLE], [{**WHOLE, "new": WHOLE["w"]}], r"^new is wanted by a rank but is no tensor"),
        ([WHOLE, WHOLE], [WHOLE], r"^2 ranks hold and 1 ranks want"),
    ],
)
def test_a_plan_that_would_lose_or_invent_is_refused_by_name(
    held: list[Table], wanted: list[Table], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        plan_transfer({"w": Item((4, 4), WIDTH)}, held, wanted)


def test_a_round_too_small_for_an_element_is_refused() -> None:
    with pytest.raises(ConfigError, match="give at least 24"):
        plan_transfer({"w": Item((4, 4), WIDTH)}, [WHOLE, {}], [WHOLE, WHOLE], 16)


def test_subtraction_and_splitting_keep_every_element_once() -> None:
    source = random.Random(1)
    for _ in range(100):
        box, other = (
            Box(tuple(source.randrange(4) for _ in range(3)), tuple(source.randrange(1, 5) for _ in range(3)))
            for _ in range(2)
        )
        count = torch.zeros(8, 8, 8, dtype=torch.int64)
        for piece in (part for left in subtract([box], [other]) for part in split(left, 5)):
            assert piece.numel <= 5
            count[piece.slices] += 1
        expected = torch.zeros_like(count)
        expected[box.slices] = 1
        expected[other.slices] = 0
        assert torch.equal(count, expected)


def test_moves_name_whole_pieces() -> None:
    """The order is by name, so that what belongs together arrives together."""
    plan = plan_transfer(
        {"a": Item((4, 4), 4), "w": Item((4, 4), 4)}, [WHOLE | {"a": WHOLE["w"]}, {}], [{}, WHOLE | {"a": WHOLE["w"]}]
    )
    assert plan.rounds == ((Move("a", WHOLE["w"][0], 0, 1), Move("w", WHOLE["w"][0], 0, 1)),)
