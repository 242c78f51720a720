from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fms_parallel.distributed.boxes import Box
from fms_parallel.modules import initial as room
from fms_parallel.modules.initial import Fill, Init, Normal, Uniform

SHAPE = (10, 3, 4)
INITS = [Normal(0.02), Uniform(0.5), Fill(1.0)]


def draw(init: Init, box: Box, shape: tuple[int, ...] = SHAPE, key: str = "0/weight") -> Tensor:
    piece = torch.full(box.size, torch.nan)
    init.fill(piece, box, shape, key)
    return piece


def whole(init: Init, shape: tuple[int, ...] = SHAPE, key: str = "0/weight") -> Tensor:
    return draw(init, Box.whole(shape), shape, key)


@pytest.mark.parametrize("init", INITS, ids=lambda init: type(init).__name__)
@pytest.mark.parametrize("elements", [1, 24, 36, 1 << 20], ids=lambda n: f"{n} a block")
def test_any_box_holds_the_same_bits_as_the_whole(init: Init, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same (seed, name): bitwise the same values for every split, whatever blocks they were drawn in."""
    monkeypatch.setattr(room, "BLOCK_ELEMENTS", elements)
    full = whole(init)
    cuts = [
        [(o, n) for o in range(size + 1) for n in range(size + 1 - o)] for size in SHAPE
    ]  # every (offset, length), empty ones too
    torch.manual_seed(3)
    boxes = list(itertools.product(*cuts))
    for index in torch.randperm(len(boxes))[:300].tolist():
        box = Box(*zip(*boxes[index], strict=True))
        assert torch.equal(draw(init, box), full[box.slices])


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_shards_of_every_rank_make_up_the_whole(ranks: int, dim: int) -> None:
    pieces, step = [], -(-SHAPE[dim] // ranks)
    for rank in range(ranks):
        start, stop = min(rank * step, SHAPE[dim]), min((rank + 1) * step, SHAPE[dim])
        offset, size = [0, 0, 0], list(SHAPE)
        offset[dim], size[dim] = start, stop - start
        pieces.append(draw(Normal(1.0), Box(tuple(offset), tuple(size))))
    assert torch.equal(torch.cat(pieces, dim), whole(Normal(1.0)))


def test_other_seeds_names_and_blocks_draw_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK_ELEMENTS", 12)  # one row a block
    base = whole(Normal(1.0))
    assert not (base == whole(Normal(1.0), key="1/weight")).any()
    assert not (base == whole(Normal(1.0), key="0/bias")).any()
    assert len({tuple(row.flatten().tolist()) for row in base}) == SHAPE[0]


def test_values_have_the_moments_that_were_asked_for() -> None:
    shape = (512, 512)
    normal, uniform = whole(Normal(0.02), shape), whole(Uniform(0.3), shape)
    n = normal.numel()
    assert abs(normal.mean()) < 5 * 0.02 / n**0.5
    assert normal.std() == pytest.approx(0.02, rel=5 / (2 * n) ** 0.5)
    assert uniform.abs().max() <= 0.3 and uniform.std() == pytest.approx(0.3 / math.sqrt(3), rel=0.01)
    assert (whole(Fill(2.5)) == 2.5).all()


@pytest.mark.parametrize("shape", [(5,), (1, 9), (3, 0), ()])
def test_vectors_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    assert whole(Normal(1.0), shape).isfinite().all()


def test_dtype_and_device_of_the_piece_do_not_change_the_draw() -> None:
    rounded = torch.empty(SHAPE, dtype=torch.bfloat16)
    Normal(1.0).fill(rounded, Box.whole(SHAPE), SHAPE, "0/weight")
    assert torch.equal(rounded, whole(Normal(1.0)).bfloat16())


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    first = whole(Normal(1.0))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, whole(Normal(1.0)))


@pytest.mark.parametrize("init", INITS, ids=lambda init: type(init).__name__)
def test_nothing_is_left_unwritten(init: Init) -> None:
    """Defect W3 of the reference: parameters that kept what the memory held before."""
    assert not whole(init).isnan().any()
