"""Damaged checkpoints: a CheckpointError, or (where the damage means nothing) the very same model. Never another.

Oracle: the weights before the damage. Which bytes and bits are struck is drawn from a fixed seed.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fms_parallel.checkpoint.files import INDEX, SINGLE, open_weights
from fms_parallel.checkpoint.lazy import MemoryTensor
from fms_parallel.checkpoint.load import load_weights
from fms_parallel.errors import CheckpointError
from fms_parallel.models.llama import hf_adapter, stored_form
from fms_parallel.models.llama_meta import meta_adapter, meta_files
from tests.checkpoint.llamas import TINY, build
from tests.checkpoint.metas import SIZES, as_meta, cut

HF = hf_adapter(TINY)
STRIKES = 3000
"""Damages of a kind that each test tries."""


def hf_tensors() -> dict[str, Tensor]:
    """The weights of seed 0 under Hugging Face's keys."""
    native = {name: MemoryTensor(tensor) for name, tensor in build(TINY).state_dict().items()}
    return {name: lazy.read_all().clone() for name, lazy in HF.from_native(dict(native)).items()}


def one_file(folder: Path) -> None:
    save_file(hf_tensors(), folder / SINGLE)


def indexed(folder: Path) -> None:
    tensors = hf_tensors()
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def torch_file(folder: Path) -> None:
    torch.save(hf_tensors(), folder / "pytorch_model.bin")


def meta(folder: Path) -> None:
    tensors = as_meta(dict(build(SIZES).state_dict()), SIZES)
    for index in range(2):
        torch.save(cut(tensors, 2, index), folder / f"consolidated.{index:02d}.pth")


FORMATS: dict[str, Callable[[Path], None]] = {"one file": one_file, "index": indexed, "bin": torch_file, "meta": meta}


def load(folder: Path) -> dict[str, Tensor]:
    """The weights that a model gets from the folder."""
    is_meta = any(folder.glob("consolidated.*"))
    config = SIZES if is_meta else TINY
    model = build(config, seed=9)
    if is_meta:
        tensors = meta_adapter(config, stored_form(config)).to_native(meta_files(config).open(folder))
    else:
        tensors = HF.to_native(open_weights(folder))
    load_weights(model, tensors, source=str(folder))
    return dict(model.state_dict())


def assert_refused_or_the_same(folder: Path, what: str) -> bool:
    """Whether it was refused; any other exception, and any other weight, fails the test."""
    config = SIZES if any(folder.glob("consolidated.*")) else TINY
    try:
        found = load(folder)
    except CheckpointError as error:
        assert str(error)
        return True
    for name, tensor in build(config).state_dict().items():
        assert torch.equal(found[name], tensor), f"{what}: {name} is another"
    return False


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def header_bytes(path: Path) -> list[int]:
    """Places in a file that hold no elements: their damage can be noticed without a check sum."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return list(range(8 + int.from_bytes(content[:8], "little")))
    if path.suffix == ".json":
        return list(range(len(content)))
    elements: set[int] = set()
    with ZipFile(path) as archive:
        for info in archive.infolist():
            head = info.header_offset
            lengths = [int.from_bytes(content[head + at : head + at + 2], "little") for at in (26, 28)]
            if "/data/" in info.filename:
                start = head + 30 + sum(lengths)
                elements |= set(range(start, start + info.file_size))
    return [place for place in range(len(content)) if place not in elements]


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_files_give_their_weights(tmp_path: Path, kind: str) -> None:
    FORMATS[kind](tmp_path)
    assert not assert_refused_or_the_same(tmp_path, "undamaged")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bits_outside_the_elements(tmp_path: Path, kind: str) -> None:
    FORMATS[kind](tmp_path)
    draw, places = random.Random(101), {path: header_bytes(path) for path in files_of(tmp_path)}
    refused = 0
    for _ in range(STRIKES):
        path = draw.choice(list(places))
        whole = path.read_bytes()
        place, bit = draw.choice(places[path]), draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        refused += assert_refused_or_the_same(tmp_path, f"{path.name}, byte {place}, bit {bit}")
        path.write_bytes(whole)
    assert refused > STRIKES // 10


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", FORMATS)
def test_overwritten_runs_of_bytes(tmp_path: Path, kind: str) -> None:
    FORMATS[kind](tmp_path)
    draw, places = random.Random(102), {path: header_bytes(path) for path in files_of(tmp_path)}
    for _ in range(STRIKES // 2):
        path = draw.choice(list(places))
        whole = path.read_bytes()
        place = draw.choice(places[path])
        run = draw.choice((b"\x00", b"\xff" * 4, b"9", b'"', draw.randbytes(8)))
        if not set(range(place, place + len(run))) <= set(places[path]):
            continue
        path.write_bytes(whole[:place] + run + whole[place + len(run) :])
        assert_refused_or_the_same(tmp_path, f"{path.name}, {run!r} at {place}")
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_and_grown_files(tmp_path: Path, kind: str) -> None:
    FORMATS[kind](tmp_path)
    draw = random.Random(103)
    for _ in range(STRIKES // 4):
        path = draw.choice(files_of(tmp_path))
        whole = path.read_bytes()
        length = draw.choice((0, 1, 8, len(whole) - 1, draw.randrange(len(whole))))
        path.write_bytes(whole[:length])
        assert assert_refused_or_the_same(tmp_path, f"{path.name} cut to {length}"), (path.name, length)
        path.write_bytes(whole + bytes(draw.randrange(1, 9)))
        assert_refused_or_the_same(tmp_path, f"{path.name} grown")
        path.write_bytes(whole)


# ---- whole files with the wrong contents ------------------------------------------------------------------------


def change(tensors: dict[str, Tensor], kind: str, draw: random.Random) -> dict[str, Tensor]:
    """The tensors with one of them wrong."""
    key = draw.choice(sorted(tensors))
    tensor = tensors[key]
    others = {name: t for name, t in tensors.items() if name != key}
    changes: dict[str, Callable[[], dict[str, Tensor]]] = {
        "missing": lambda: others,
        "renamed": lambda: {**others, key.replace("e", "a", 1): tensor},  # each key has an e
        "of a layer that is not": lambda: {**tensors, f"model.layers.{len(key)}.mlp.up_proj.weight": tensor.clone()},
        "extra": lambda: {**tensors, f"{key}_scale": tensor.clone()},
        "cut": lambda: {**tensors, key: tensor[:-1].clone()},
        "with a dimension more": lambda: {**tensors, key: tensor.unsqueeze(0)},
        "empty": lambda: {**tensors, key: tensor[:0].clone()},
        "whole numbers": lambda: {**tensors, key: tensor.to(torch.int32)},
        "bool": lambda: {**tensors, key: tensor > 0},
        "complex": lambda: {**tensors, key: tensor.to(torch.complex64)},
    }
    return changes[kind]()


CHANGES = (
    *("missing", "renamed", "of a layer that is not", "extra", "cut", "with a dimension more", "empty"),
    *("whole numbers", "bool", "complex"),
)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", CHANGES)
def test_wrong_tensors_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    draw = random.Random(4)
    for _ in range(8):
        tensors = change(hf_tensors(), kind, draw)
        if suffix == "bin":
            torch.save(tensors, tmp_path / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / SINGLE)
        with pytest.raises(CheckpointError):
            load(tmp_path)


def copy_of_a_file(folder: Path) -> None:
    tensors = load_file(folder / "one.safetensors")
    (folder / INDEX).unlink()
    save_file(tensors, folder / "three.safetensors")


def rename_a_file(folder: Path) -> None:
    (folder / "two.safetensors").rename(folder / "zwei.safetensors")


def swap_the_files(folder: Path) -> None:
    one, two = ((folder / f"{name}.safetensors").read_bytes() for name in ("one", "two"))
    (folder / "one.safetensors").write_bytes(two)
    (folder / "two.safetensors").write_bytes(one)


def folder_for_a_file(folder: Path) -> None:
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").mkdir()


def edit_the_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(edit(content)))


def edited(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: edit_the_index(folder, lambda content: {**content, **entries})


def mapped(change_map: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "weight_map": change_map(content["weight_map"])}

    return lambda folder: edit_the_index(folder, edit)


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "a key in two files": copy_of_a_file,
    "a file by another name": rename_a_file,
    "files in each other's place": swap_the_files,
    "one file empty": lambda folder: (folder / "one.safetensors").write_bytes(b""),
    "one file a folder": folder_for_a_file,
    "no map": lambda folder: edit_the_index(folder, lambda content: {"metadata": {}}),
    "a list": lambda folder: edit_the_index(folder, lambda content: [1, 2]),
    "map of numbers": edited(weight_map={"model.norm.weight": 3}),
    "map of lists": edited(weight_map={"model.norm.weight": ["one.safetensors"]}),
    "null map": edited(weight_map=None),
    "file outside": mapped(lambda m: {key: f"../{name}" for key, name in m.items()}),
    "absolute file": mapped(lambda m: {key: f"/{name}" for key, name in m.items()}),
    "a name with a null": mapped(lambda m: {key: f"{name}\0" for key, name in m.items()}),
    "itself": mapped(lambda m: dict.fromkeys(m, INDEX)),
    "half of the keys": mapped(lambda m: dict(list(m.items())[::3])),
    "keys swapped": mapped(lambda m: dict(zip(m, reversed(list(m.values())), strict=True))),
    "one key more": mapped(lambda m: {**m, "model.layers.9.input_layernorm.weight": "one.safetensors"}),
    "not text": lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe\x00{"),
    "deeply nested": lambda folder: (folder / INDEX).write_text("[" * 100_000),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_do_not_hold_together_are_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    indexed(folder)
    FOLDERS[kind](folder)
    with pytest.raises(CheckpointError):
        load(folder)


# ---- code -------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: Path, how: int) -> None:
        self.path, self.how = str(path), how

    def __reduce__(self) -> Any:
        ways: list[Any] = [
            (open, (self.path, "w")),
            (eval, (f"open({self.path!r}, 'w')",)),
            (exec, (f"open({self.path!r}, 'w')",)),
            (os.mkdir, (self.path,)),
            (map, (eval, [f"open({self.path!r}, 'w')"])),
        ]
        return ways[self.how]


@pytest.mark.parametrize("how", range(5))
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", SINGLE])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path: Path, name: str, how: int) -> None:
    trap = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    contents: list[Any] = [Runs(trap, how), {"a": Runs(trap, how)}, {Runs(trap, how): torch.ones(1)}, [Runs(trap, how)]]
    for content in contents:
        for legacy in (False, True):
            torch.save(content, folder / name, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(CheckpointError):
                load(folder)
        (folder / name).write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError):
            load(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 2),
        torch.empty(2, device="meta"),
        torch.eye(2).to_sparse(),
        {"nested": torch.ones(2)},
        None,
    ],
    ids=["module", "meta", "sparse", "nested", "nothing"],
)
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save({**hf_tensors(), "lm_head.weight": value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load(tmp_path)
