"""Weight files. Oracles: safetensors itself on what we write, our reader on what it writes; every tear is named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fms_parallel.checkpoint import files
from fms_parallel.checkpoint.files import DTYPES, INDEX, SINGLE, WRITING, open_weights, write_text, write_weights
from fms_parallel.checkpoint.lazy import MemoryTensor
from fms_parallel.errors import CheckpointError

WEIGHTS = {"b": torch.randn(3, 4), "a": torch.arange(5), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}


def read(path: Path) -> dict[str, Tensor]:
    return {key: tensor.read_all() for key, tensor in open_weights(path).items()}


def write(folder: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    write_weights(folder, {key: MemoryTensor(tensor) for key, tensor in tensors.items()}, **options)


def shard(folder: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    """Files with an index, as Hugging Face lays them out."""
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor), key


# ---- reading what is whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_folder", [True, False])
def test_one_file_reads_as_safetensors_wrote_it(tmp_path: Path, whole_folder: bool) -> None:
    save_file(WEIGHTS, tmp_path / SINGLE)
    assert_same(read(tmp_path if whole_folder else tmp_path / SINGLE), WEIGHTS)


def test_indexed_files_read_as_safetensors_wrote_them(tmp_path: Path) -> None:
    shard(tmp_path, {"one.safetensors": {"a": WEIGHTS["a"]}, "two.safetensors": {"b": WEIGHTS["b"]}})
    assert_same(read(tmp_path), {"a": WEIGHTS["a"], "b": WEIGHTS["b"]})


def test_files_without_an_index_belong_together(tmp_path: Path) -> None:
    save_file({"a": WEIGHTS["a"]}, tmp_path / "x.safetensors")
    save_file({"b": WEIGHTS["b"]}, tmp_path / "y.safetensors")
    torch.save({"c": WEIGHTS["b"]}, tmp_path / "pytorch_model.bin")  # safetensors are preferred
    assert_same(read(tmp_path), {"a": WEIGHTS["a"], "b": WEIGHTS["b"]})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "weights.pt"])
def test_torch_files_read_as_torch_wrote_them(tmp_path: Path, name: str) -> None:
    torch.save(WEIGHTS, tmp_path / name)
    assert_same(read(tmp_path), WEIGHTS)


def test_indexed_torch_files_read_as_torch_wrote_them(tmp_path: Path) -> None:
    torch.save({"a": WEIGHTS["a"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({"training": 1}, tmp_path / "optimizer.bin")  # not listed, so not read
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    assert_same(read(tmp_path), {"a": WEIGHTS["a"]})


# ---- reading what is torn ---------------------------------------------------------------------------------------


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    evil = {"a": WEIGHTS["a"], "b": Malicious(tmp_path / "ran")}
    if zipped:
        torch.save(evil, tmp_path / "model.bin")
    else:
        (tmp_path / "model.bin").write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"model\.bin was not loaded.*Convert it to safetensors"):
        open_weights(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([WEIGHTS["a"]], "holds a list, not a dict"),
        ({"step": 3}, "'step' is a int, not a plain tensor"),
        ({1: WEIGHTS["a"]}, "1 is a Tensor, not a plain tensor under a name"),
        ({"model": WEIGHTS}, "'model' is a dict"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is a Tensor, not a plain tensor"),
    ],
)
def test_pickle_of_anything_but_plain_tensors_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def point_outside(folder: Path) -> None:
    save_file({"a": WEIGHTS["a"]}, folder.parent / "x.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}')


@pytest.mark.parametrize("name", [SINGLE, "model.bin"])
def test_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (save_file if name == SINGLE else torch.save)(WEIGHTS, path)
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=name):
            open_weights(tmp_path)


def test_header_that_lies_is_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,12]}}'
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "two.safetensors").unlink(), r"lists 'two\.safetensors', and there is no such file"),
        (lambda f: cut(f / "two.safetensors", 60), r"two\.safetensors is not a whole"),
        (
            lambda f: save_file({"b": WEIGHTS["b"], "c": WEIGHTS["a"]}, f / "two.safetensors"),
            "c is in the file but not",
        ),
        (lambda f: save_file({"c": WEIGHTS["b"]}, f / "two.safetensors"), "2 keys differ, b is in the index but not"),
        (lambda f: (f / INDEX).write_text("{"), "not readable as JSON"),
        (lambda f: (f / INDEX).write_text("[]"), "needs a 'weight_map'"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "needs a 'weight_map'"),
        (lambda f: point_outside(f), r"lists '\.\./x\.safetensors', and there is no such file beside it"),
        (lambda f: (f / "other.safetensors.index.json").write_text("{}"), "holds 2 indices"),
    ],
    ids=["missing", "cut", "key more", "other key", "no JSON", "no map", "empty map", "outside", "two indices"],
)
def test_index_that_does_not_hold_is_named(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    shard(tmp_path, {"one.safetensors": {"a": WEIGHTS["a"]}, "two.safetensors": {"b": WEIGHTS["b"]}})
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


def test_key_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": WEIGHTS["a"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in .*x\.safetensors and in y\.safetensors"):
        open_weights(tmp_path)


def test_unlisted_file_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard(tmp_path, {"one.safetensors": {"a": WEIGHTS["a"]}})
    save_file({"b": WEIGHTS["b"]}, tmp_path / "old.safetensors")
    assert read(tmp_path).keys() == {"a"}
    assert "does not list old.safetensors" in caplog.text


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_weights(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds no weights; looked for \*\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "weights.h5").touch()
    with pytest.raises(CheckpointError, match=r"unknown kind of weight file; known are \.safetensors, \.bin"):
        open_weights(tmp_path / "weights.h5")


# ---- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read_back_by_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).to(dtype)
    write(tmp_path, {"odd": torch.ones(3, dtype=torch.uint8), "t": tensor.T})  # bytes before, and not contiguous
    found = load_file(tmp_path / SINGLE)["t"]
    assert found.dtype == dtype
    assert torch.equal(found.contiguous().view(torch.uint8), tensor.T.contiguous().view(torch.uint8))
    assert_same(read(tmp_path), load_file(tmp_path / SINGLE))
    assert starts(tmp_path / SINGLE)["t"] % dtype.itemsize == 0  # readers that map the file need it


def starts(path: Path) -> dict[str, int]:
    """Where each tensor begins, in bytes from the start of the file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def test_single_file_is_read_back_by_safetensors(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS, metadata={"made": "here"})
    assert_same(load_file(tmp_path / SINGLE), WEIGHTS)
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_shards_are_cut_at_the_limit_and_listed(tmp_path: Path) -> None:
    tensors = {name: torch.randn(4) for name in "abcde"} | {"large": torch.randn(100)}
    write(tmp_path, tensors, max_shard_bytes=32)
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, INDEX]
    held = [list(load_file(tmp_path / name)) for name in names]
    assert held == [["a", "b"], ["c", "d"], ["e"], ["large"]]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {key: name for name, keys in zip(names, held, strict=True) for key in keys}
    assert_same(read(tmp_path), tensors)


def test_earlier_weights_are_replaced_and_other_files_stay(tmp_path: Path) -> None:
    write(tmp_path, {name: torch.randn(4) for name in "abcde"}, max_shard_bytes=32)
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, WEIGHTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SINGLE]
    assert_same(read(tmp_path), WEIGHTS)


def test_failure_leaves_the_earlier_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, WEIGHTS)
    written: list[Tensor] = []

    def full_disk(file: Any, tensor: Tensor) -> None:
        written.append(tensor)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_tensor", full_disk)
    with pytest.raises(CheckpointError, match=r"weights were not written: .* No space left on device"):
        write(tmp_path, {key: tensor + 1 for key, tensor in WEIGHTS.items()}, max_shard_bytes=8)
    assert_same(read(tmp_path), WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_unwritable_place_and_dtype_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: weights were not written"):
        write(tmp_path / "file", WEIGHTS)
    with pytest.raises(CheckpointError, match=r"c is of type torch\.complex128"):
        write(tmp_path, {"c": torch.zeros(1, dtype=torch.complex128)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_text_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "before")
    (tmp_path / f"a.json{WRITING}").mkdir()  # the name to write under is taken
    with pytest.raises(OSError):
        write_text(tmp_path / "a.json", "after")
    assert (tmp_path / "a.json").read_text() == "before"
