"""Meta's files made by hand, from the published rules: the oracle for what reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fms_parallel.models.llama import LLaMAConfig
from fms_parallel.models.llama_meta import META_NAMES

SIZES = LLaMAConfig(vocab_size=64, width=64, layers=2, heads=8, kv_heads=8, ffn_width=192, max_positions=32)
GROUPED = {"kv_heads": 2}
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-5, "multiple_of": 64, "vocab_size": -1}
ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
COLUMNS = ("wo.weight", "w2.weight", "tok_embeddings.weight")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to (first, second, first, second, ...)."""
    halves = weight.view(heads, 2, -1, weight.shape[-1])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)


def as_meta(native: Mapping[str, Tensor], config: LLaMAConfig) -> dict[str, Tensor]:
    """Our tensors as Meta's code would hold them on one device."""
    found = {"rope.freqs": torch.ones(config.d // 2)}
    for theirs, ours in META_NAMES:
        for n in range(config.layers):
            key = theirs.format(n=n)
            found[key] = native[ours.format(n=n)]
            if key.endswith(("wq.weight", "wk.weight")):
                found[key] = interleaved(found[key], config.heads if "wq" in key else config.k)
    return found


def cut(tensors: Mapping[str, Tensor], files: int, index: int, embedding_dim: int = 1) -> dict[str, Tensor]:
    """What file `index` of `files` holds."""
    dims = dict.fromkeys(ROWS, 0) | dict.fromkeys(COLUMNS, 1) | {"tok_embeddings.weight": embedding_dim}
    found = {}
    for key, tensor in tensors.items():
        dim = next((d for ending, d in dims.items() if key.endswith(ending)), None)
        found[key] = tensor.clone() if dim is None else tensor.chunk(files, dim)[index].clone()
    return found


def write_meta(folder: Path, tensors: Mapping[str, Tensor], files: int, embedding_dim: int = 1) -> None:
    """A folder as Meta publishes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        torch.save(cut(tensors, files, index, embedding_dim), folder / f"consolidated.{index:02d}.pth")
    kv_heads = next(t for key, t in tensors.items() if key.endswith("wk.weight")).shape[0] // 8
    (folder / "params.json").write_text(json.dumps({**PARAMS, "n_kv_heads": kv_heads}))
