"""Meta's files, in and out. Oracles: files cut by hand, transformers' logits, torch.load."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fms_parallel.checkpoint.files import WRITING
from fms_parallel.checkpoint.lazy import MemoryTensor
from fms_parallel.checkpoint.torch_files import TorchFile
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError, ConfigError, FmsError
from fms_parallel.models import get_model, list_variants
from fms_parallel.models.llama import VARIANTS, LLaMAConfig, stored_form
from fms_parallel.models.llama_meta import config_from_meta, config_to_meta, meta_adapter, meta_files
from tests.checkpoint.llamas import build
from tests.checkpoint.metas import GROUPED, PARAMS, SIZES, as_meta, cut, write_meta

FIELDS = {name: getattr(SIZES, name) for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "ffn_width")}


def weights(config: LLaMAConfig = SIZES) -> dict[str, Tensor]:
    return dict(build(config, seed=3).state_dict())


def load(folder: Path, **options: Any) -> dict[str, Tensor]:
    return get_model("llama", "micro", folder, **(FIELDS | options)).state_dict()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ---- in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["meta", None], ids=["named", "found out"])
@pytest.mark.parametrize("files", [1, 2, 4, 8])
def test_any_number_of_files_gives_the_weights_they_were_cut_from(
    tmp_path: Path, files: int, source: str | None
) -> None:
    native = weights()
    write_meta(tmp_path, as_meta(native, SIZES), files)
    assert_same(load(tmp_path, source=source), native)


@pytest.mark.parametrize("options", [GROUPED, {"tied": True}, {"fused": True, **GROUPED}], ids=["gqa", "tied", "fused"])
def test_every_stored_form_is_filled(tmp_path: Path, options: dict[str, Any]) -> None:
    config = replace(SIZES, **(options | {"fused": False}))
    native = weights(config)
    write_meta(tmp_path, as_meta(native, config), 2)
    expected = dict(native)
    if options.get("fused"):
        tensors = {name: MemoryTensor(tensor) for name, tensor in native.items()}
        for step in stored_form(replace(config, fused=True)):
            tensors = step.to_native(tensors)  # type: ignore[assignment, arg-type]
        expected = {name: tensor.read_all() for name, tensor in tensors.items()}
    assert_same(load(tmp_path, **options), expected)


@pytest.mark.parametrize("vocab", [64, 96])
def test_embedding_cut_along_the_vocabulary_is_seen(tmp_path: Path, vocab: int) -> None:
    """As Llama 3's files are."""
    native = weights(replace(SIZES, vocab_size=vocab))
    write_meta(tmp_path, as_meta(native, SIZES), 4, embedding_dim=0)
    assert_same(load(tmp_path, vocab_size=vocab), native)


def test_logits_are_those_of_transformers_with_permuted_heads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8},
        **{"num_key_value_heads": 2, "intermediate_size": 192, "max_position_embeddings": 32, "rms_norm_eps": 1e-5},
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    reference = transformers.LlamaForCausalLM(config).eval()
    names = {
        **{"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj"},
        **{"attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm"},
        **{"ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj"},
        **{"feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"},
    }
    theirs = reference.state_dict()
    meta = {"output.weight": theirs["lm_head.weight"], "norm.weight": theirs["model.norm.weight"]}
    meta["tok_embeddings.weight"] = theirs["model.embed_tokens.weight"]
    for n in range(2):
        for name, hf in names.items():
            weight = theirs[f"model.layers.{n}.{hf}.weight"]
            if name.endswith(("wq", "wk")):  # the inverse of transformers' published `permute`
                weight = weight.view(-1, 2, 4, 64).transpose(1, 2).reshape(weight.shape)
            meta[f"layers.{n}.{name}.weight"] = weight
    write_meta(tmp_path, meta, 2)
    model = get_model("llama", "micro", tmp_path, **(FIELDS | GROUPED)).eval()
    ids = torch.randint(64, (2, 20))
    with torch.no_grad():
        gap = (model(ids) - reference(ids).logits).abs().max() / reference(ids).logits.abs().max()
    assert gap <= 1e-5


def test_only_the_wanted_box_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_meta(tmp_path, as_meta(weights(), SIZES), 4)
    tensors = meta_adapter(SIZES, stored_form(SIZES)).to_native(meta_files(SIZES).open(tmp_path))
    read: list[tuple[str, Box]] = []
    original = TorchFile.read

    def spy(file: TorchFile, key: str, box: Box) -> Tensor:
        read.append((file.path.name, box))
        return original(file, key, box)

    monkeypatch.setattr(TorchFile, "read", spy)
    tensors["layers.0.attention.query.weight"].read(Box((8, 0), (8, 64)))  # head 1, in the first file
    tensors["layers.0.feed_forward.down.weight"].read(Box((3, 40), (2, 16)))
    assert read == [
        ("consolidated.00.pth", Box((8, 0), (8, 64))),
        ("consolidated.00.pth", Box((3, 40), (2, 8))),  # 192 columns over 4 files: 48 each
        ("consolidated.01.pth", Box((3, 0), (2, 8))),
    ]


# ---- in, torn ---------------------------------------------------------------------------------------------------


def other_norm(folder: Path) -> None:
    tensors = torch.load(folder / "consolidated.01.pth")
    tensors["norm.weight"] += 1
    torch.save(tensors, folder / "consolidated.01.pth")


def fewer_keys(folder: Path) -> None:
    tensors = torch.load(folder / "consolidated.01.pth")
    del tensors["layers.1.attention.wo.weight"]
    torch.save(tensors, folder / "consolidated.01.pth")


def stranger(folder: Path) -> None:
    for index in range(2):
        path = folder / f"consolidated.{index:02d}.pth"
        torch.save(torch.load(path) | {"layers.0.lora.weight": torch.ones(2)}, path)


def params(folder: Path, **changes: Any) -> None:
    (folder / "params.json").write_text(json.dumps({**PARAMS, **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "consolidated.00.pth").unlink(), r"has files \[1\] of Meta's numbered ones: one is missing"),
        (
            lambda f: (f / "consolidated.01.pth").unlink(),
            r"query\.weight: a tensor of shape \(32, 64\) has not 8 heads",
        ),
        (other_norm, r"norm\.weight.*the 2 files hold it whole, with different contents"),
        (fewer_keys, r"must have the same keys; differing \(1\): layers\.1\.attention\.wo\.weight"),
        (stranger, r"layers\.0\.lora\.weight is no key of Meta's"),
        (lambda f: (f / "consolidated.01.pth").write_bytes(b""), "is empty"),
        (lambda f: params(f, rope_theta=500000.0), r"params\.json is not the model.*rope_base: 500000\.0 in the file"),
        (lambda f: params(f, n_kv_heads=4), r"kv_heads: 4 in the file, 8 asked"),
        (lambda f: params(f, ffn_dim_multiplier=2), r"ffn_width: 384 in the file, 192 asked"),
        (lambda f: params(f, use_scaled_rope=True), r"use_scaled_rope=True, rope_scaling='default' was asked"),
        (lambda f: params(f, moe=True), r"not supported: moe"),
        (lambda f: (f / "params.json").write_text("{}"), r"params\.json lacks dim"),
        (lambda f: (f / "params.json").write_text("{"), "is not JSON"),
    ],
)
def test_what_does_not_hold_is_named(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    write_meta(tmp_path, as_meta(weights(), SIZES), 2)
    spoil(tmp_path)
    with pytest.raises(FmsError, match=message):
        load(tmp_path)


def test_a_folder_without_metas_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no consolidated\.00\.pth"):
        load(tmp_path, source="meta")


# ---- out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 2, 8])
def test_files_written_are_those_cut_by_hand(tmp_path: Path, files: int) -> None:
    native = weights()
    (tmp_path / "consolidated.09.pth").touch()  # of an earlier model
    tensors = {name: MemoryTensor(tensor) for name, tensor in native.items()}
    meta_files(SIZES).write(tmp_path, meta_adapter(SIZES, stored_form(SIZES)).from_native(tensors), files)
    expected = as_meta(native, SIZES)
    del expected["rope.freqs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"consolidated.{i:02d}.pth" for i in range(files)]
    for index in range(files):
        found = torch.load(tmp_path / f"consolidated.{index:02d}.pth", weights_only=True)
        assert_same(found, cut(expected, files, index))


def test_llama3s_embedding_is_cut_along_the_vocabulary(tmp_path: Path) -> None:
    config = replace(SIZES, vocab_size=128256, width=16, heads=2, kv_heads=2, layers=1)
    embedding = torch.arange(128256 * 16, dtype=torch.float32).view(128256, 16)
    meta_files(config).write(tmp_path, {"tok_embeddings.weight": MemoryTensor(embedding)}, 2)
    second = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)["tok_embeddings.weight"]
    assert torch.equal(second, embedding[64128:])
    assert torch.equal(meta_files(config).open(tmp_path)["tok_embeddings.weight"].read_all(), embedding)


def test_a_failed_write_leaves_the_earlier_files(tmp_path: Path) -> None:
    write_meta(tmp_path, as_meta(weights(), SIZES), 2)

    class Unreadable(MemoryTensor):
        def _read(self, box: Box) -> Tensor:
            raise CheckpointError("gone")

    tensors = {"norm.weight": MemoryTensor(torch.ones(4)), "output.weight": Unreadable(torch.ones(4, 4))}
    with pytest.raises(CheckpointError, match="gone"):
        meta_files(SIZES).write(tmp_path, tensors)
    assert_same(load(tmp_path), weights())
    assert not list(tmp_path.glob(f"*{WRITING}"))


def test_a_disk_without_room_is_an_error_and_no_fault_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing through a mapping of a file that the disk has no room for would end the process."""
    write_meta(tmp_path, as_meta(weights(), SIZES), 2)
    tensors = {"norm.weight": MemoryTensor(torch.ones(100))}

    def full(file: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device") if length > 400 else AssertionError(length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"weights were not written: .*No space left"):
        meta_files(SIZES).write(tmp_path, tensors)
    monkeypatch.undo()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(CheckpointError, match="weights were not written, the disk may be full"):
            meta_files(SIZES).write(tmp_path, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(load(tmp_path), weights())
    assert not list(tmp_path.glob(f"*{WRITING}"))


@pytest.mark.parametrize(("files", "message"), [(0, "1 to 8"), (16, "1 to 8"), (3, "does not divide by 3 files")])
def test_files_that_cannot_be_are_named(tmp_path: Path, files: int, message: str) -> None:
    tensors = {name: MemoryTensor(tensor) for name, tensor in weights().items()}
    with pytest.raises(ConfigError, match=message):
        meta_files(SIZES).write(tmp_path, meta_adapter(SIZES, ()).from_native(tensors), files)


@pytest.mark.parametrize("variant", [name for name in list_variants("llama") if "code" not in name])
def test_params_survive_the_round_trip(variant: str) -> None:
    config = VARIANTS[variant]
    assert config_from_meta(config_to_meta(config), config).shape() == config.shape()


def test_what_metas_code_has_no_word_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attention_bias, ffn_bias"):
        config_to_meta(VARIANTS["granite.code-3b"])
