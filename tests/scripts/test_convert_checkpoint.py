"""Any format to any other. Oracles: the tensors that went in, files cut by hand, transformers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fms_parallel.errors import FmsError
from fms_parallel.models import get_model, list_models, list_sources, save_hf
from scripts import convert_checkpoint
from tests.checkpoint.llamas import build
from tests.checkpoint.metas import SIZES, as_meta, cut, write_meta

CONFIG = replace(SIZES, kv_heads=4)
FIELDS = {name: getattr(CONFIG, name) for name in ("width", "layers", "heads", "kv_heads", "ffn_width", "vocab_size")}


def llama(**overrides: Any) -> list[str]:
    """The flags that say which model it is."""
    values = {**FIELDS, "max_positions": 32, "bos_id": 1, "eos_id": 2, **overrides}
    return ["--architecture", "llama", *(f"--override={name}={value}" for name, value in values.items())]


def convert(monkeypatch: pytest.MonkeyPatch, source: Path, to: str, target: Path, *words: str) -> None:
    arguments = ["--model_path", str(source), "--to", to, "--output_path", str(target), *words]
    monkeypatch.setattr(sys, "argv", [convert_checkpoint.__file__, *arguments])
    assert convert_checkpoint.main() == 0


def files_of(folder: Path) -> dict[str, Tensor]:
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("form", [{}, {"fused": True}, {"tied": True}], ids=["apart", "fused", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_native_hf_native_meta_is_bitwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype, form: dict[str, Any]
) -> None:
    unfused: dict[str, Any] = {name: value for name, value in form.items() if name != "fused"}
    weights = {name: t.to(dtype) for name, t in build(replace(CONFIG, **unfused), seed=3).state_dict().items()}
    meta = as_meta(weights, CONFIG)
    write_meta(tmp_path / "meta", meta, 2)
    words = llama(**form)
    convert(monkeypatch, tmp_path / "meta", "native", tmp_path / "native", *words)
    convert(monkeypatch, tmp_path / "native", "hf", tmp_path / "hf", "--max_shard_bytes", "20000", *words)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert(monkeypatch, tmp_path / "hf", "native", tmp_path / "again", *words)
    assert_same(files_of(tmp_path / "again"), files_of(tmp_path / "native"))
    convert(monkeypatch, tmp_path / "again", "meta", tmp_path / "back", "--shards", "4", *words)
    del meta["rope.freqs"]
    for index in range(4):
        found = torch.load(tmp_path / "back" / f"consolidated.{index:02d}.pth", weights_only=True)
        assert_same(found, cut(meta, 4, index))


def test_a_folder_that_describes_itself_needs_no_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32},
    )
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path / "hf")
    convert(monkeypatch, tmp_path / "hf", "native", tmp_path / "native")
    convert(monkeypatch, tmp_path / "native", "hf", tmp_path / "back")
    assert_same(files_of(tmp_path / "back"), files_of(tmp_path / "hf"))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = torch.randint(61, (1, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reference(ids).logits)
    model = get_model("hf_pretrained", model_path=tmp_path / "native").eval()
    assert torch.allclose(model(ids), reference(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", [name for name in list_models() if "hf" in list_sources(name)])
def test_every_architecture_goes_to_native_and_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str
) -> None:
    save_hf(get_model(architecture, "micro", layers=2, data_type="bf16"), tmp_path / "hf")
    convert(monkeypatch, tmp_path / "hf", "native", tmp_path / "native")
    convert(monkeypatch, tmp_path / "native", "hf", tmp_path / "back", "--max_shard_bytes", "1000000")
    assert_same(files_of(tmp_path / "back"), files_of(tmp_path / "hf"))
    assert (tmp_path / "back" / "config.json").read_text() == (tmp_path / "hf" / "config.json").read_text()


def test_dtype_is_that_of_the_tensors_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = dict(build(CONFIG, seed=3).state_dict())
    write_meta(tmp_path / "meta", as_meta(weights, CONFIG), 1)
    convert(monkeypatch, tmp_path / "meta", "native", tmp_path / "native", "--dtype", "bf16", *llama())
    assert_same(files_of(tmp_path / "native"), {name: t.bfloat16() for name, t in weights.items()})


@pytest.mark.parametrize(
    ("words", "model", "message"),
    [
        (["--to", "gguf"], {}, "unknown format of llama 'gguf'"),
        (["--to", "hf", "--shards", "2"], {}, "give max_shard_bytes instead"),
        (["--to", "meta", "--shards", "8"], {}, "1 to 4"),
        (["--to", "hf", "--dtype", "int3"], {}, "unknown data_type 'int3'"),
        (["--to", "hf", "--source", "hf"], {}, r"consolidated\.00\.pth and in consolidated\.01\.pth"),
        (["--to", "hf", "--max_shard_bytes", "0"], {}, "must be at least 1"),
        ([], {"layers": 3}, r"params\.json is not the model asked for \(layers: 2"),
        (["--to", "hf", "--architecture", "hf_pretrained"], {}, r"config\.json: no such file"),
        (["--to", "hf", "--output_path", "META"], {}, "choose another folder"),
        (["--to", "hf", "--model_path", "/nowhere"], {}, "/nowhere: no such file"),
    ],
)
def test_what_cannot_be_gets_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], model: dict[str, int], message: str
) -> None:
    meta = tmp_path / "meta"
    write_meta(meta, as_meta(dict(build(CONFIG, seed=3).state_dict()), CONFIG), 2)
    with pytest.raises(FmsError, match=message):
        convert(
            monkeypatch, meta, "hf", tmp_path / "out", *llama(**model), *[w.replace("META", str(meta)) for w in words]
        )


def test_the_command_says_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    words = ["--model_path", str(tmp_path), "--to", "hf", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, convert_checkpoint.__file__, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/config.json: no such file") and "Traceback" not in done.stderr
