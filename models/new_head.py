"""The body of one checkpoint under a new head: what fine-tuning a masked language model for another task starts from.

It knows adapters, names and how parameters start; it knows no task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.checkpoint.load import load_weights
from fms_parallel.distributed.boxes import Box
from fms_parallel.modules.initial import Init
from fms_parallel.strategy.materialise import initial_values

from .build import find_model
from .hf.pretrained import PRETRAINED
from .registry import REGISTRY, replaced
from .sources import open_native

HEADS = ("head.", "head_dense.", "head_norm.", "classifier.")
"""How names of heads begin; everything else is the body."""


def with_new_head(
    architecture: str, model_path: str | Path, *, seed: int = 0, source: str | None = None, **overrides: Any
) -> tuple[dict[str, Any], Callable[[nn.Module], None]]:
    """What makes `architecture` of another task's checkpoint: `get_model(architecture, fill=fill, **config)`.

    Args:
        model_path: a folder with a Hugging Face config.json. overrides: config fields to replace, those of the new
            head among them. seed: of the new head's weights.
    Returns:
        config fields, and what fills the model: its body from the files, its head drawn.
    Raises:
        ConfigError, CheckpointError: as of `get_model`.
    """
    known, config = find_model(PRETRAINED, None, model_path, {})
    wanted = REGISTRY.get(architecture)
    target = next(iter(wanted.variants.values()))
    names = {field.name for field in fields(target)}
    shared = {f.name: getattr(config, f.name) for f in fields(config) if f.name in names and f.name != "tied"}
    made = replaced(wanted, target, shared | overrides)

    def fill(model: nn.Module) -> None:
        tensors = open_native(known, config, Path(model_path), source)
        load_weights(model, {**_body(tensors), **_drawn_head(model, seed)}, source=str(model_path))

    return {field.name: getattr(made, field.name) for field in fields(made)}, fill


def _body(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}


def _drawn_head(model: nn.Module, seed: int) -> dict[str, LazyTensor]:
    return {
        name: Drawn(parameter, init, f"{seed}/{name}")
        for name, parameter, init in initial_values(model)
        if name.startswith(HEADS)
    }


class Drawn(LazyTensor):
    """Initial values, drawn for the box that is asked for: the same in every layout."""

    def __init__(self, like: Tensor, init: Init, key: str) -> None:
        super().__init__(like.shape, like.dtype)
        self._init, self._key = init, key

    def _read(self, box: Box) -> Tensor:
        piece = torch.empty(box.size, dtype=self.dtype)
        self._init.fill(piece, box, self.shape, self._key)
        return piece
