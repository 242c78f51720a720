"""Views translate boxes. Oracle: the same operation on whole tensors, then indexing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fms_parallel.checkpoint import lazy
from fms_parallel.checkpoint.lazy import (
    Agreeing,
    Concatenated,
    FileTensor,
    Flattened,
    LazyTensor,
    MemoryTensor,
    RotaryPermuted,
    Section,
    Stacked,
    Unflattened,
    Unstacked,
)
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError


class Recorder(LazyTensor):
    """A tensor in memory that counts the elements read of it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self.tensor = tensor
        self.count = 0

    def _read(self, box: Box) -> Tensor:
        self.count += box.numel
        return self.tensor[box.slices]


def boxes(shape: Sequence[int]) -> Iterator[Box]:
    """Every box of a small shape, empty ones included."""
    runs = [[(start, stop - start) for start in range(n + 1) for stop in range(start, n + 1)] for n in shape]
    for chosen in product(*runs):
        yield Box(tuple(start for start, _ in chosen), tuple(count for _, count in chosen))


def numbered(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def halves(rows: Tensor, heads: int, width: int) -> Tensor:
    """Interleaved rotary pairs (2i, 2i + 1) -> half-split pairs (i, i + D/2), one row at a time."""
    order = [head * width + (2 * i + half) for head in range(heads) for half in (0, 1) for i in range(width // 2)]
    return rows[torch.tensor(order)]


A, B, C = numbered(2, 3), numbered(4, 3, start=100), numbered(2, 3, start=200)
QKV = numbered(2, 3, 2, 2)
GRID = [QKV[:, :1], QKV[:, 1:]]

CASES: dict[str, tuple[list[Tensor], Callable[..., LazyTensor], Tensor]] = {
    "concatenated rows": ([A, B, C], lambda *p: Concatenated(p, 0), torch.cat([A, B, C])),
    "concatenated columns": ([A, C], lambda *p: Concatenated(p, 1), torch.cat([A, C], 1)),
    "concatenated in the middle": (GRID, lambda *p: Concatenated(p, 1), QKV),
    "stacked in front": ([A, C], lambda *p: Stacked(p, 0), torch.stack([A, C])),
    "stacked behind": ([A, C], lambda *p: Stacked(p, 2), torch.stack([A, C], 2)),
    "unstacked": ([QKV], lambda t: Unstacked(t, 1, 2), QKV[:, 2]),
    "section": ([QKV], lambda t: Section.along(t, 1, 1, 2), QKV[:, 1:3]),
    "unflattened": ([QKV.flatten(0, 2)], lambda t: Unflattened(t, (2, 3, 2)), QKV),
    "flattened": ([QKV], lambda t: Flattened(t, 3), QKV.flatten(0, 2)),
    "flattened whole": ([QKV], lambda t: Flattened(t, 4), QKV.flatten()),
    "flattened section": ([QKV], lambda t: Flattened(Section.along(t, 1, 1, 2), 2), QKV[:, 1:3].flatten(0, 1)),
    "agreeing": ([A], lambda t: Agreeing([t]), A),
}


@pytest.mark.parametrize("name", CASES)
def test_every_box_is_that_of_the_whole_tensor_and_no_more_is_read(name: str) -> None:
    tensors, view_of, expected = CASES[name]
    for box in boxes(expected.shape):
        sources = [Recorder(tensor) for tensor in tensors]
        view = view_of(*sources)
        assert view.shape == expected.shape and view.dtype == expected.dtype
        found = view.read(box)
        assert torch.equal(found, expected[box.slices]) and found.dtype == expected.dtype, box
        assert sum(source.count for source in sources) == box.numel, box


@pytest.mark.parametrize("columns", [(), (2,)], ids=["bias", "weight"])
def test_rotary_rows_move_as_pair_by_pair_indexing_moves_them(columns: tuple[int, ...]) -> None:
    rows = numbered(3 * 4, *columns)
    there = RotaryPermuted(MemoryTensor(rows), 3, 4, to_halves=True)
    back = RotaryPermuted(there, 3, 4, to_halves=False)
    for box in boxes(rows.shape):
        assert torch.equal(there.read(box), halves(rows, 3, 4)[box.slices]), box
        assert torch.equal(back.read(box), rows[box.slices]), box


def test_rotary_reads_the_heads_that_cover_the_box() -> None:
    source = Recorder(numbered(3 * 4, 2))
    RotaryPermuted(source, 3, 4, to_halves=True).read(Box((5, 0), (2, 1)))
    assert source.count == 4  # one head of four rows, one column


def test_box_outside_is_refused() -> None:
    tensor = MemoryTensor(numbered(4, 3))
    for box in (Box((3, 0), (2, 3)), Box((0,), (4,)), Box((-1, 0), (2, 3)), Box((0, 0), (2, -1))):
        with pytest.raises(CheckpointError, match="lies outside a tensor of shape"):
            tensor.read(box)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Concatenated([MemoryTensor(A), MemoryTensor(B.T)], 0),
        lambda: Concatenated([MemoryTensor(A), MemoryTensor(C.double())], 0),
        lambda: Stacked([MemoryTensor(A), MemoryTensor(B)], 0),
        lambda: Unflattened(MemoryTensor(A), (2, 2)),
        lambda: RotaryPermuted(MemoryTensor(B), 2, 4, to_halves=True),
        lambda: RotaryPermuted(MemoryTensor(numbered(6, 2)), 2, 3, to_halves=True),
    ],
    ids=["columns differ", "dtypes differ", "shapes differ", "other rows", "other heads", "odd width"],
)
def test_parts_that_do_not_fit_are_refused(make: Callable[[], LazyTensor]) -> None:
    with pytest.raises(CheckpointError):
        make()


def test_copies_agree_by_bytes() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert Agreeing([MemoryTensor(nan), MemoryTensor(nan.clone())]).read_all()[1] == 1.0
    zeros = Agreeing([MemoryTensor(torch.tensor([0.0, 1.0])), MemoryTensor(torch.tensor([-0.0, 1.0]))])
    assert zeros.read(Box((1,), (1,))).item() == 1.0
    with pytest.raises(CheckpointError, match="different contents"):
        zeros.read_all()


# ---- files ------------------------------------------------------------------------------------------------------


def test_file_boxes_are_those_of_safetensors(tmp_path: Path) -> None:
    tensor = numbered(4, 3)
    save_file({"t": tensor}, path := tmp_path / "t.safetensors")
    held = FileTensor(path, "t", (4, 3), torch.int64)
    for box in boxes(tensor.shape):
        found = held.read(box)
        assert torch.equal(found, tensor[box.slices])
        assert found.untyped_storage().nbytes() == found.nbytes  # nothing keeps the mapped file


def test_file_read_asks_safetensors_for_the_box_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"q": numbered(4, 3), "k": numbered(2, 3)}, path := tmp_path / "t.safetensors")
    asked: list[tuple[str, Any]] = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.opened = real(*args, **kwargs)

        def __enter__(self) -> Watched:
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.opened.__exit__(*args)

        def get_slice(self, name: str) -> Watched:
            self.name = name
            return self

        def __getitem__(self, slices: Any) -> Tensor:
            asked.append((self.name, slices))
            found: Tensor = self.file.get_slice(self.name)[slices]
            return found

    real = lazy.safe_open
    monkeypatch.setattr(lazy, "safe_open", Watched)
    parts = [FileTensor(path, "q", (4, 3), torch.int64), FileTensor(path, "k", (2, 3), torch.int64)]
    Concatenated(parts, 0).read(Box((3, 1), (2, 2)))
    assert asked == [("q", (slice(3, 4), slice(1, 3))), ("k", (slice(0, 1), slice(1, 3)))]


def test_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: t can no longer be read"):
        FileTensor(tmp_path / "gone.safetensors", "t", (1,), torch.int64).read_all()


# ---- piece by piece ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3), (5,), (1, 40), (0, 3), (4, 0), (), (3, 2, 5)])
@pytest.mark.parametrize("limit", [1, 24, 100, 1 << 20])
def test_pieces_make_the_whole_and_keep_to_the_limit(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], limit: int
) -> None:
    monkeypatch.setattr(lazy, "PIECE_BYTES", limit)
    whole = torch.randn(shape)
    row = whole[:1].nbytes if shape else 4
    rows = list(MemoryTensor(whole).read_rows())
    assert torch.equal(torch.cat(rows) if shape else rows[0], whole)
    assert all(piece.nbytes <= max(limit, row) for piece in rows)
    target = torch.full(shape, 9.0)
    lazy.copy_box(MemoryTensor(whole), Box.whole(shape), target)
    assert torch.equal(target, whole)


def test_a_box_inside_is_copied_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "PIECE_BYTES", 16)
    whole, box = torch.randn(9, 6), Box((2, 1), (5, 3))
    target = torch.empty(5, 3)
    lazy.copy_box(MemoryTensor(whole), box, target)
    assert torch.equal(target, whole[2:7, 1:4])
