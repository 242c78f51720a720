"""Checkpoints across layouts and ranks. Oracles: bytes (SHA-256 of full tensors, of files), the loss of going on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.checkpoint import files, lazy
from fms_parallel.checkpoint.export import save_weights
from fms_parallel.checkpoint.files import open_weights
from fms_parallel.checkpoint.load import load_weights
from fms_parallel.checkpoint.manifest import FileMark, Manifest
from fms_parallel.checkpoint.named import named_state, named_weights
from fms_parallel.checkpoint.training_state import (
    latest_training_state,
    load_model_state,
    load_training_state,
    save_training_state,
)
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.mesh import data_shard
from fms_parallel.errors import CheckpointError, RankFailed
from fms_parallel.models.llama import config_to_hf, hf_adapter
from fms_parallel.strategy.base import parallel_of
from fms_parallel.training.step import train_step
from tests.checkpoint.llamas import FUSED, TIED, TINY, build
from tests.poison import poisoned_memory

Digests = dict[str, str]
TWO = [("", "tp=2"), ("fsdp=2", "tp=2"), ("tp=2,sp", "fsdp=2"), ("fsdp=2,tp=2", "fsdp=2"), ("tp=2,sp", "dp=2")]
TWO += [("tp=2,sp,tp_parts=attention", "fsdp=2"), ("fsdp=2", "tp=2,sp,tp_parts=attention")]
FOUR = [("tp=2,sp", "fsdp=2,tp=2"), ("dp=2", "dp=2,tp=2,sp"), ("fsdp=2", "dp=2,fsdp=2")]
ONE = [(writer, "") for writer in ("tp=2,sp", "fsdp=2", "dp=2", "fsdp=2,tp=2")]
"""(layout that writes a checkpoint, layout that reads it), by the reader's number of ranks."""


class Batch(NamedTuple):
    input_ids: Tensor
    labels: Tensor


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step on the same global batch in every layout; the mean loss before it."""
    ids = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(step))
    index, count = data_shard(parallel_of(model).mesh)
    mine = ids.chunk(count)[index]
    return train_step(model, optimizer, [Batch(mine, mine.roll(-1, 1))]).loss


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """As the trainer makes it: two groups, fused."""
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> Digests:
    """SHA-256 of every full weight and moment, by name."""
    found = {**named_weights(model), **named_state(model, optimizer)[0]}
    whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in found.items()}
    return {key: hashlib.sha256(lazy.as_bytes(t).numpy().tobytes()).hexdigest() for key, t in whole.items()}


# ---- training state: every layout to every other ---------------------------------------------------------------


def write(layout: str, folder: str) -> tuple[Digests, float]:
    """Two steps, saved; then (what was saved, loss of the third step)."""
    model = build(TIED, layout)
    optimizer = adam(model)
    for step in range(2):
        train(model, optimizer, step)
    save_training_state(Path(folder, layout), step=2, model=model, optimizer=optimizer, numbers={"layout": layout})
    return digests(model, optimizer), train(model, optimizer, 2)


def read(layout: str, path: str) -> tuple[dict[str, Any], Digests, float]:
    """What a run in this layout finds, and the loss of its next step. Memory that nobody fills is NaN."""
    with poisoned_memory():
        model = build(TIED, layout, seed=1)
        optimizer = adam(model)
        numbers = load_training_state(Path(path), model, optimizer)
        return numbers, digests(model, optimizer), train(model, optimizer, 2)


def write_all(layouts: tuple[str, ...], folder: str) -> dict[str, Any]:
    return {layout: write(layout, folder) for layout in layouts}


def read_all(pairs: list[tuple[str, str]], folder: str) -> dict[tuple[str, str], Any]:
    return {pair: read(pair[1], f"{folder}/{pair[0]}/step-00000002") for pair in pairs}


def write_and_read_four(folder: str) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    return write_all(("fsdp=2,tp=2",), folder), read_all(FOUR, folder)


class Runs(NamedTuple):
    written: dict[str, Any]
    found: dict[tuple[str, str], Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every writer's checkpoint as every reader finds it."""
    folder = str(tmp_path_factory.mktemp("runs"))
    two = ("tp=2,sp", "tp=2,sp,tp_parts=attention", "fsdp=2", "dp=2")
    written = {**write_all(("",), folder), **run_ranks(write_all, 2, two, folder)[0]}
    more, found = run_ranks(write_and_read_four, 4, folder)[0]
    found |= run_ranks(read_all, 2, TWO, folder)[0] | read_all(ONE, folder)
    return Runs(written | more, found)


@pytest.mark.parametrize(("writer", "reader"), [*TWO, *FOUR, *ONE])
def test_weights_and_moments_are_the_bits_that_were_saved(runs: Runs, writer: str, reader: str) -> None:
    numbers, found, _ = runs.found[writer, reader]
    assert found == runs.written[writer][0]
    assert numbers == {"layout": writer, "step": 2}


@pytest.mark.parametrize(("writer", "reader"), [*TWO, *FOUR, *ONE])
def test_next_loss_is_that_of_going_on(runs: Runs, writer: str, reader: str) -> None:
    assert runs.found[writer, reader][2] == pytest.approx(runs.written[writer][1], rel=1e-6)


# ---- training state: failures ----------------------------------------------------------------------------------


def caught(work: Callable[[], object]) -> str | None:
    """The message of the CheckpointError, or None when there was none."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


@contextmanager
def broken(owner: Any, name: str, rank: int) -> Iterator[None]:
    """The disk is full for this method, on one rank."""
    if dist.get_rank() != rank:
        yield
        return
    with patch.object(owner, name, full_disk):
        yield


def fail_saving(folder: str) -> dict[str, Any]:
    model = build(TINY, "fsdp=2")
    optimizer = adam(model)
    train(model, optimizer, 0)
    path = Path(folder)

    def save(numbers: dict[str, int]) -> object:
        return save_training_state(path, step=1, model=model, optimizer=optimizer, numbers=numbers)

    found: dict[str, Any] = {}
    for name, owner, method, rank in (
        ("shard on rank 1", dcp.FileSystemWriter, "write_data", 1),
        ("digest on rank 1", FileMark, "of", 1),
        ("manifest on rank 0", Manifest, "write", 0),
        ("rename on rank 0", Path, "rename", 0),
    ):
        with broken(owner, method, rank):
            message = caught(lambda: save({}))
        dist.barrier()
        found[name] = (message, latest_training_state(path), [p.name for p in path.iterdir()])
    found["numbers differ"] = (caught(lambda: save({"rank": dist.get_rank()})), latest_training_state(path), [])
    if dist.get_rank() == 1:
        next(iter(optimizer.state.values()))["note"] = "only here"
    found["state on rank 1"] = (caught(lambda: save({})), latest_training_state(path), [])
    optimizer.state[next(iter(optimizer.state))].pop("note", None)
    own = path / f"node {dist.get_rank()}"  # as on machines that do not share their disks
    options: dict[str, Any] = {"step": 1, "model": model, "optimizer": optimizer, "numbers": {}}
    message = caught(lambda: save_training_state(own, **options))
    found["folders differ"] = (message, latest_training_state(own), [])
    dist.barrier()
    found["afterwards"] = save({})
    with broken(FileMark, "of", 1):
        found["reading on rank 1"] = caught(lambda: load_training_state(path / "step-00000001", model, optimizer))
    with broken(dcp.FileSystemReader, "read_data", 1):
        found["filling on rank 1"] = caught(lambda: load_model_state(path / "step-00000001", model))
    return found


def test_failure_on_one_rank_is_an_error_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    records = run_ranks(fail_saving, 2, str(tmp_path))
    for record in records:
        for name in ("shard on rank 1", "digest on rank 1", "manifest on rank 0", "rename on rank 0"):
            message, latest, left = record[name]
            assert message is not None and "No space left" in message, name
            assert (latest, left) == (None, []), name
        words = {
            "numbers differ": "same on every rank",
            "state on rank 1": "only tensors",
            "folders differ": "shared file",
        }
        for name, word in words.items():
            message, latest, _ = record[name]
            assert message is not None and word in message and latest is None, name
        assert record["afterwards"] == tmp_path / "step-00000001"
        assert "No space left" in record["reading on rank 1"]
        assert "No space left" in record["filling on rank 1"]
    assert latest_training_state(tmp_path) == tmp_path / "step-00000001"


def die_while_saving(folder: str) -> None:
    model = build(TINY, "fsdp=2")
    optimizer = adam(model)
    save_training_state(Path(folder), step=1, model=model, optimizer=optimizer, numbers={})

    def die(*args: Any) -> None:
        import os

        os._exit(3)

    if dist.get_rank() == 1:
        with patch.object(FileMark, "of", die):
            save_training_state(Path(folder), step=2, model=model, optimizer=optimizer, numbers={})
    save_training_state(Path(folder), step=2, model=model, optimizer=optimizer, numbers={})


def test_rank_that_dies_while_saving_leaves_the_earlier_checkpoint_as_latest(tmp_path: Path) -> None:
    with pytest.raises(RankFailed):
        run_ranks(die_while_saving, 2, str(tmp_path))
    assert latest_training_state(tmp_path) == tmp_path / "step-00000001"


# ---- weights in and out of other formats -----------------------------------------------------------------------

CONFIGS = {"separate": TINY, "tied": TIED, "fused": FUSED, "copied": replace(FUSED, kv_heads=1)}


def export(layouts: tuple[str, ...], folder: str) -> None:
    for layout in layouts:
        for name, config in CONFIGS.items():
            path = Path(folder, f"{name} {layout}")
            save_weights(build(config, layout), path, hf_adapter(config), max_shard_bytes=20_000)


def fail_exporting(folder: str) -> tuple[str | None, str | None]:
    """A file stands where the folder should be; then the disk is full in the middle."""
    model = build(FUSED, "tp=2")
    at_start = caught(lambda: save_weights(model, Path(folder, "file"), hf_adapter(FUSED)))
    with broken(files, "_write_tensor", 0):
        return at_start, caught(lambda: save_weights(model, Path(folder, "out"), hf_adapter(FUSED)))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    export(("",), str(folder))
    run_ranks(export, 2, ("tp=2", "fsdp=2"), str(folder))
    run_ranks(export, 4, ("fsdp=2,tp=2",), str(folder))
    return folder


@pytest.mark.parametrize("layout", ["tp=2", "fsdp=2", "fsdp=2,tp=2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_export_is_that_of_one_process_byte_for_byte(exports: Path, name: str, layout: str) -> None:
    expected = {path.name: path.read_bytes() for path in (exports / f"{name} ").iterdir()}
    found = {path.name: path.read_bytes() for path in (exports / f"{name} {layout}").iterdir()}
    assert len(expected) > 2  # several files and an index
    assert found == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_export_computes_the_same_in_transformers(exports: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config, folder = CONFIGS[name], exports / f"{name} fsdp=2,tp=2"
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(61, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(build(config)(ids), theirs(ids).logits, rtol=1e-5, atol=1e-6)


def test_failed_export_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for at_start, in_the_middle in run_ranks(fail_exporting, 2, str(tmp_path)):
        assert at_start is not None and "file" in at_start
        assert in_the_middle is not None and "No space left" in in_the_middle
    assert list((tmp_path / "out").iterdir()) == []


class CountingFile:
    """`safe_open` that counts the elements that are read."""

    read = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.opened = safe_open(*args, **kwargs)

    def __enter__(self) -> CountingFile:
        self.file = self.opened.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.opened.__exit__(*args)

    def get_slice(self, name: str) -> CountingFile:
        self.slice = self.file.get_slice(name)
        return self

    def __getitem__(self, slices: Any) -> Tensor:
        tensor: Tensor = self.slice[slices]
        type(self).read += tensor.numel()
        return tensor


safe_open = lazy.safe_open


def read_slices(layout: str, folder: str) -> list[tuple[int, int, int, bool]]:
    """Per config: elements read, held here, in the whole model; whether the weights are those of the writer."""
    records = []
    for name, config in CONFIGS.items():
        model = build(config, layout, seed=1)
        CountingFile.read = 0
        with patch.object(lazy, "safe_open", CountingFile):
            tensors = hf_adapter(config).to_native(open_weights(Path(folder, f"{name} ")))
            load_weights(model, tensors, source=name)
        held = sum(local_tensor(p).numel() for p in model.parameters())
        same = all(map(torch.equal, locals_of(model), locals_of(build(config, layout))))
        records.append((CountingFile.read, held, sum(p.numel() for p in model.parameters()), same))
    return records


def locals_of(model: nn.Module) -> list[Tensor]:
    return [local_tensor(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("layout", ["tp=2", "fsdp=2"])
def test_loading_reads_only_what_this_rank_holds(exports: Path, layout: str) -> None:
    for records in run_ranks(read_slices, 2, layout, str(exports)):
        for read_count, held, whole, same in records:
            assert same
            assert read_count == held < whole
