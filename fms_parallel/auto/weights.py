"""Weights of any model by the names of its parameters: in from safetensors, out as Hugging Face lays them out.

A rank opens headers and reads the boxes that it holds. Where transformers renames or joins tensors between disk and
module (the experts of a mixture, say), its own table of conversions is followed, both ways; a joined tensor is made
whole for a moment, nothing else is. It knows names, files and boxes; it knows no stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.auto.blocks import canonical_names
from fms_parallel.checkpoint.files import open_weights
from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError


def open_named(path: str | Path, skeleton: nn.Module) -> dict[str, LazyTensor]:
    """First parameter (or persistent buffer) name -> tensor in the file or folder. Only headers are read.

    Raises:
        CheckpointError: what `open_weights` refuses, or a tensor of another shape than the model's.
    """
    first = canonical_names(skeleton)
    wanted = dict(skeleton.state_dict())
    found: dict[str, LazyTensor] = {}
    for name, tensor in _renamed(open_weights(path), skeleton, wanted).items():
        if name not in wanted:
            continue
        if tensor.shape != tuple(wanted[name].shape):
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model's is {list(wanted[name].shape)}: another "
                "config than the one the weights were trained with."
            )
        found.setdefault(first.get(name, name), tensor)
    return found


def _renamed(stored: dict[str, LazyTensor], skeleton: nn.Module, wanted: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Keys on disk -> names in the module, joined where transformers joins."""
    rename = _transformers_names(skeleton)
    if rename is None:
        return stored
    found: dict[str, LazyTensor] = {}
    joined: dict[str, tuple[Any, dict[str, tuple[str, LazyTensor]]]] = {}
    for key in sorted(stored, key=_natural):
        name, converter, pattern = rename(key, wanted)
        if converter is None:
            found[name] = stored[key]
        else:
            joined.setdefault(name, (converter, {}))[1][key] = (pattern, stored[key])
    for name, (converter, sources) in joined.items():
        targets = [name.replace(converter.target_patterns[0], other) for other in converter.target_patterns]
        for target in targets:
            if target in wanted:
                found[target] = Converted(wanted[target], name, target, converter, sources, skeleton)
    return found


class Converted(LazyTensor):
    """A tensor that transformers makes of several on disk. Any read makes it whole for a moment."""

    def __init__(
        self,
        like: Tensor,
        name: str,
        target: str,
        converter: Any,
        sources: Mapping[str, tuple[str, LazyTensor]],
        model: nn.Module,
    ) -> None:
        super().__init__(tuple(like.shape), next(iter(sources.values()))[1].dtype)
        self.name, self.target, self.converter, self.sources, self.model = name, target, converter, sources, model

    def _read(self, box: Box) -> Tensor:
        converter = deepcopy(self.converter)
        for key, (pattern, tensor) in self.sources.items():
            converter.add_tensor(self.name, key, pattern, tensor.read_all)
        made = converter.convert(self.name, model=self.model, config=getattr(self.model, "config", None))
        whole = made.get(self.target)
        whole = whole[0] if isinstance(whole, list) else whole
        if whole is None or tuple(whole.shape) != self.shape:
            raise CheckpointError(
                f"{self.target}: transformers' conversion of {', '.join(self.sources)} did not give it."
            )
        return whole[box.slices]  # type: ignore[no-any-return]


Rename = Callable[[str, Mapping[str, Tensor]], tuple[str, Any, str]]


def _transformers_names(skeleton: nn.Module) -> Rename | None:
    """(key on disk, names in the model) -> (name, converter or None, its pattern); None for a plain module."""
    if not hasattr(skeleton, "base_model_prefix"):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix = skeleton.base_model_prefix

    def rename(key: str, wanted: Mapping[str, Tensor]) -> tuple[str, Any, str]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, dict(wanted))  # type: ignore[arg-type]
        if name not in wanted and key in wanted:
            return key, None, ""
        return name, (by_pattern[pattern] if pattern is not None else None), pattern or ""

    return rename


def _natural(key: str) -> list[Any]:
    """Experts in the order of their numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


# ---- out --------------------------------------------------------------------------------------------------------


def disk_names(skeleton: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Name in the module -> (key, shape) of the tensors that it is written as."""
    state = skeleton.state_dict()
    return {name: [(key, tuple(t.shape)) for key, t in to_disk(skeleton, name, state[name]).items()] for name in names}


def to_disk(skeleton: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that one of the module is written as, by key; meta tensors give meta tensors.

    Raises:
        CheckpointError: transformers writes it together with others.
    """
    if not hasattr(skeleton, "base_model_prefix"):
        return {name: tensor}
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.no_grad():
            return dict(revert_weight_conversion(skeleton, {name: tensor}))  # type: ignore[arg-type]
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}: transformers writes it together with others ({error}): not supported."
        ) from error
