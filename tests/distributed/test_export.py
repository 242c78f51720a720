"""Weights out of stages, parts and shards. Oracles: the bytes of one process, transformers, memory taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fms_parallel.checkpoint import export, lazy
from fms_parallel.checkpoint.export import save_weights
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.models import get_model
from fms_parallel.models.build import save_hf
from fms_parallel.models.llama import config_to_hf, hf_adapter
from tests.checkpoint.llamas import FUSED, TIED, TINY, build

CONFIGS = {name: replace(config, layers=4) for name, config in {"plain": TINY, "tied": TIED, "fused": FUSED}.items()}
TWO = ("pp=2", "pp=2,schedule=interleaved1f1b,microbatches=4", "pp=2,schedule=zbv,microbatches=4", "cp=2")
FOUR = ("pp=2,tp=2", "pp=2,fsdp=2", "fsdp=2,tp=2", "cp=2,tp=2,sp,tp_parts=attention", "pp=2,cp=2")
LIMIT = 20_000
WRITERS = export._writers


def write(layouts: tuple[str, ...], folder: str) -> dict[str, list[int]]:
    """Exports in every layout; by layout, the rank that wrote each file of the plain one."""
    found = {}
    for layout in layouts:
        for name, config in CONFIGS.items():
            writers: list[int] = []

            def noted(*given: Any, writers: list[int] = writers) -> dict[str, int]:
                writers.extend((chosen := WRITERS(*given)).values())
                return chosen

            with patch.object(export, "_writers", noted):
                path = Path(folder, f"{name} {layout}")
                save_weights(build(config, layout), path, hf_adapter(config), max_shard_bytes=LIMIT)
            found[layout] = writers
    return found


class Exports(NamedTuple):
    folder: Path
    writers: dict[str, list[int]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    folder = tmp_path_factory.mktemp("exports")
    write(("",), str(folder))
    two, four = run_ranks(write, 2, TWO, str(folder)), run_ranks(write, 4, FOUR, str(folder))
    assert all(told == two[0] for told in two) and all(told == four[0] for told in four)
    return Exports(folder, two[0] | four[0])


@pytest.mark.parametrize("layout", [*TWO, *FOUR])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_those_of_one_process_byte_for_byte(exports: Exports, name: str, layout: str) -> None:
    expected = {path.name: path.read_bytes() for path in (exports.folder / f"{name} ").iterdir()}
    found = {path.name: path.read_bytes() for path in (exports.folder / f"{name} {layout}").iterdir()}
    assert len(expected) > 3  # several files and an index
    assert found == expected


@pytest.mark.parametrize("layout", ["pp=2", "pp=2,tp=2", "fsdp=2,tp=2"])
def test_files_are_written_by_several_ranks(exports: Exports, layout: str) -> None:
    assert len(set(exports.writers[layout])) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_export_of_stages_computes_the_same_in_transformers(exports: Exports, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config, folder = CONFIGS[name], exports.folder / f"{name} pp=2,tp=2"
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(61, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(build(config)(ids), theirs(ids).logits, rtol=1e-5, atol=1e-6)


def save_stages(folder: str) -> None:
    model = get_model("llama", "micro", distributed_strategy="pp=2", layers=4, width=32, ffn_width=48, vocab_size=61)
    save_hf(model, folder)


def test_model_of_get_model_in_stages_exports_and_loads_again(tmp_path: Path) -> None:
    run_ranks(save_stages, 2, str(tmp_path))
    expected = get_model("llama", "micro", layers=4, width=32, ffn_width=48, vocab_size=61)
    found = get_model("hf_pretrained", model_path=tmp_path)
    for (name, one), (other, two) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        assert name == other and torch.equal(one, two), name


# ---- what a rank holds of others ------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that held weights and is not the model's own."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.bytes = own, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # Plain tensors: a DTensor's memory is that of its local one.
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.bytes = max(self.bytes, storage.nbytes())
        return out


def measure(layout: str, folder: str) -> tuple[int, int, int]:
    """(bytes of the largest memory taken while exporting, of the largest shard held, of the largest tensor)."""
    model = build(CONFIGS["fused"], layout)
    own = {local_tensor(p).untyped_storage().data_ptr() for p in model.parameters()}
    with patch.object(lazy, "PIECE_BYTES", 512), Largest(own) as largest:
        save_weights(model, Path(folder), hf_adapter(CONFIGS["fused"]), max_shard_bytes=LIMIT)
    dist.barrier()
    held = max(local_tensor(p).numel() for p in model.parameters()) * 4
    return largest.bytes, held, max(p.numel() for p in model.parameters()) * 4


@pytest.mark.parametrize(("layout", "ranks"), [("fsdp=2", 2), ("pp=2", 2), ("pp=2,tp=2", 4), ("fsdp=2,tp=2", 4)])
def test_no_rank_ever_makes_more_than_a_piece(tmp_path: Path, layout: str, ranks: int) -> None:
    path = tmp_path / "out"
    records = run_ranks(measure, ranks, layout, str(path))
    assert 0 < max(made for made, _, _ in records) <= 512  # a rank that only sends takes none
    assert all(512 < held <= whole for _, held, whole in records)
