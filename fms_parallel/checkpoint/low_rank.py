"""Adapters of a spread model -> the files that peft reads, and back.

    layers.0.attention.query_lora_b.weight  <->  base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight

Where a format splits a fused matrix (query, key and value in one), each part gets its rows of B and the A that they
have in common. It knows factors, names and lazy tensors; the format's names come from an `Adapter`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fms_parallel.checkpoint.adapter import Adapter
from fms_parallel.checkpoint.agree import on_every_rank, rank_and_world
from fms_parallel.checkpoint.export import save_weights
from fms_parallel.checkpoint.files import open_weights
from fms_parallel.checkpoint.lazy import Agreeing, LazyTensor, copy_box
from fms_parallel.checkpoint.slots import slots_of
from fms_parallel.checkpoint.words import refuse_misfits
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.errors import CheckpointError, ConfigError
from fms_parallel.modules.low_rank import A, matrix_of
from fms_parallel.strategy.base import parallel_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX, _SUFFIX = "base_model.model.", ".weight"


def peft_key(matrix: str, first: bool) -> str:
    """peft's key of a factor (A when `first`) of the matrix `...weight`."""
    return f"{_PREFIX}{matrix.removesuffix(_SUFFIX)}.lora_{'A' if first else 'B'}{_SUFFIX}"


def peft_config(rank: int, alpha: float, targets: Sequence[str], transposed: bool = False) -> str:
    """Text of `adapter_config.json`."""
    words = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": list(targets)}
    words |= {"base_model_name_or_path": None, "lora_dropout": 0.0, "fan_in_fan_out": transposed}
    return json.dumps(words, indent=2) + "\n"


class PeftNames:
    """Factors under native names <-> under peft's. `names` adapts the model's own weights; None keeps their names."""

    def __init__(self, names: Adapter | None) -> None:
        self.names = names

    def from_native(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """As `Adapter.from_native`; tensors that are no factors are left out."""
        firsts, seconds = _by_matrix(tensors)
        found: dict[str, LazyTensor] = {}
        for matrix, second in seconds.items():
            parts = self.names.from_native({matrix: second}) if self.names is not None else {matrix: second}
            for part, rows in parts.items():
                found[peft_key(part, True)], found[peft_key(part, False)] = firsts[matrix], rows
        return found

    def to_native(self, stored: Mapping[str, LazyTensor], wanted: Sequence[str]) -> dict[str, LazyTensor]:
        """The factors with the names `wanted`, from what peft stored.

        Raises:
            CheckpointError: parts of a fused matrix are missing; reading an A in which its parts differ.
        """
        seconds = {key.removesuffix("lora_B.weight"): key for key in stored if key.endswith(".lora_B.weight")}
        parts = {f"{prefix.removeprefix(_PREFIX)}weight": stored[key] for prefix, key in seconds.items()}
        joined = self.names.to_native(parts) if self.names is not None else parts
        found: dict[str, LazyTensor] = {}
        for name in wanted:
            matrix = str(matrix_of(name))
            if matrix not in joined:
                continue
            if f"{A}." not in name:
                found[name] = joined[matrix]
                continue
            of_it = self.names.from_native({matrix: joined[matrix]}) if self.names is not None else [matrix]
            firsts = [stored[peft_key(part, True)] for part in of_it if peft_key(part, True) in stored]
            if firsts:
                found[name] = firsts[0] if len(firsts) == 1 else Agreeing(firsts)
        return found


def _by_matrix(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Matrix -> its A, and its B."""
    firsts: dict[str, LazyTensor] = {}
    seconds: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if (matrix := matrix_of(name)) is not None:
            (firsts if f"{A}." in name else seconds)[matrix] = tensor
    return firsts, seconds


class _Targets(PeftNames):
    """Notes which modules of the format were written."""

    def __init__(self, names: Adapter | None) -> None:
        super().__init__(names)
        self.targets: list[str] = []

    def from_native(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        found = super().from_native(tensors)
        ending = ".lora_B.weight"
        self.targets = [key.removeprefix(_PREFIX).removesuffix(ending) for key in found if key.endswith(ending)]
        return found


def save_factors(model: nn.Module, folder: str | Path, names: Adapter | None) -> None:
    """Write the adapters of a spread model alone, as peft reads them. Collective.

    Raises:
        ConfigError: it has none. CheckpointError: on every rank, when any rank failed.
    """
    folder, lora = Path(folder), getattr(model, "lora", None)
    if lora is None:
        raise ConfigError("this model has no adapters: get_model(..., adapters=LowRank(targets)).")
    adapter = _Targets(names)
    save_weights(model, folder, adapter)  # type: ignore[arg-type]
    with on_every_rank(f"writing {folder}"):
        if rank_and_world()[0] == 0:
            (folder / "model.safetensors").rename(folder / WEIGHTS)
            text = peft_config(lora["rank"], lora["alpha"], adapter.targets)
            (folder / CONFIG).write_text(text, encoding="utf-8")


@torch.no_grad()
def load_factors(model: nn.Module, folder: str | Path, names: Adapter | None) -> None:
    """Fill the adapters of a spread model from what `save_factors` (or peft) wrote; every rank reads its own pieces.

    Raises:
        CheckpointError: one that is missing, is of another matrix, or has another shape.
    """
    source = Path(folder) / WEIGHTS
    slots = [slot for slot in slots_of(model) if matrix_of(slot.names[0]) is not None]
    here = {slot.names[0]: slot for slot in slots}
    every = [*here, *(name for name in parallel_of(model).elsewhere if matrix_of(name) is not None)]
    stored = open_weights(source)
    found = PeftNames(names).to_native(stored, every)
    unfit = [
        f"{name} ({list(found[name].shape)}, the model has {list(slot.shape)})"
        for name, slot in here.items()
        if name in found and found[name].shape != slot.shape
    ]
    missing = [name for name in every if name not in found]
    written = PeftNames(names).from_native(found)
    refuse_misfits(
        str(source),
        {"missing": missing, "extra": [key for key in stored if key not in written], "of the wrong shape": unfit},
    )
    for name, slot in here.items():
        try:
            copy_box(found[name], slot.box(), local_tensor(slot.tensor))
        except CheckpointError as error:
            if not isinstance(found[name], Agreeing):
                raise CheckpointError(f"{source}: {name}: {error}") from error
            raise CheckpointError(
                f"{source}: {name}: the matrices that are one here have different A there. Build the model with "
                "fused=False."
            ) from None
