"""Weights out of a model of one process. Oracles: safetensors, and loading again. Other layouts: tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fms_parallel.checkpoint.export import save_weights
from fms_parallel.checkpoint.files import INDEX, SINGLE, open_weights
from fms_parallel.checkpoint.load import load_weights
from fms_parallel.errors import CheckpointError
from fms_parallel.models.llama import LLaMAConfig, hf_adapter
from tests.checkpoint.llamas import FUSED, TIED, TINY, build


@pytest.mark.parametrize("config", [TINY, TIED, FUSED], ids=["separate", "tied", "fused"])
@pytest.mark.parametrize("limit", [5 << 30, 4_000], ids=["one file", "many"])
def test_what_is_saved_as_hf_loads_bit_for_bit(tmp_path: Path, config: LLaMAConfig, limit: int) -> None:
    source, model = build(config), build(config, seed=1)
    save_weights(source, tmp_path, hf_adapter(config), max_shard_bytes=limit)
    assert (tmp_path / INDEX).exists() == (limit == 4_000)
    load_weights(model, hf_adapter(config).to_native(open_weights(tmp_path)), source="file")
    for (name, expected), found in zip(source.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def test_without_an_adapter_names_are_our_own_and_ties_are_written_once(tmp_path: Path) -> None:
    model = build(TIED)
    save_weights(model, tmp_path, None)
    found = load_file(tmp_path / SINGLE)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(found[name], parameter) for name, parameter in model.named_parameters())


def test_ties_are_written_once_under_the_formats_name(tmp_path: Path) -> None:
    save_weights(build(TIED), tmp_path, hf_adapter(TIED))
    found = load_file(tmp_path / SINGLE)
    assert "model.embed_tokens.weight" in found and "lm_head.weight" not in found


def test_extra_files_are_beside_the_weights(tmp_path: Path) -> None:
    save_weights(build(TINY), tmp_path / "new" / "folder", None, extra_files={"config.json": "{}"})
    assert (tmp_path / "new" / "folder" / "config.json").read_text() == "{}"


def test_keys_that_the_format_does_not_know_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = build(TINY)
    model.register_parameter("probe", nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"writing as 'hf': keys without a rule \(1\): probe"):
        save_weights(model, tmp_path / "out", hf_adapter(TINY))
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        save_weights(build(TINY), tmp_path / "file", None)
