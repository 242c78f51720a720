"""Where a model's weights come from and go to: whose keys the files have, whether they are of this model, and back out.

It knows adapters and the files beside the weights (`config.json`, `params.json`); it distributes nothing and fills
nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fms_parallel.checkpoint.files import open_weights, write_text, write_weights
from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.checkpoint.words import refuse_misfits
from fms_parallel.errors import CheckpointError, ConfigError, unknown
from fms_parallel.modules.feedforward import ACTIVATIONS

from .checked import config_from_hf
from .hf.config import read_config_json, read_json
from .registry import Architecture, list_sources

logger = logging.getLogger("fms_parallel.models")


def open_native(known: Architecture, config: Any, path: Path, source: str | None) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint under our names; no element is read.

    Args:
        source: whose keys and files these are; None finds out.
    Raises:
        CheckpointError: files that are torn, or whose keys are nobody's.
    """
    tensors, source = _open(known, config, path, source)
    source = source or _guess_source(known, config, tensors)
    return tensors if source == "native" else known.adapters[source](config).to_native(tensors)


def _open(known: Architecture, config: Any, path: Path, source: str | None) -> tuple[dict[str, LazyTensor], str | None]:
    """The tensors under their own keys, and the source where its files tell."""
    if source is not None and source in known.files:
        return known.files[source](config).open(path), source
    if source is None:
        fitting = [name for name, files in known.files.items() if files(config).fits(path)]
        if len(fitting) == 1 and not list(path.glob("*.safetensors")):
            return known.files[fitting[0]](config).open(path), fitting[0]
    return open_weights(path), source


def _guess_source(known: Architecture, config: Any, tensors: Mapping[str, Any]) -> str:
    """The one source whose keys these are."""
    with torch.device("meta"):
        native = {name for name, _ in known.build(config).named_parameters(remove_duplicate=False)}
    if set(tensors) <= native:
        return "native"
    fitting = []
    for name, adapter in known.adapters.items():
        try:
            adapter(config).to_native(dict(tensors))
            fitting.append(name)
        except CheckpointError as error:
            logger.debug("not a %s checkpoint: %s", name, error)
    if len(fitting) != 1:
        raise CheckpointError(
            f"cannot tell whose keys these are ({', '.join(sorted(tensors)[:3])}, ...): fits "
            f"{fitting or 'no source'} of {known.name}. Name one with source=: {', '.join(list_sources(known.name))}."
        )
    return fitting[0]


# ---- is it this model? ------------------------------------------------------------------------------------------

NOT_COMPARED = (
    *("fused", "std", "dropout", "embedding_dropout", "attention_dropout", "max_positions", "bos_id", "eos_id"),
    "pad_id",
)
"""Config fields that may differ between the files and the request: they change no weight's meaning."""


def check_described(known: Architecture, config: Any, path: Path) -> None:
    """Weights trained under other rotary positions or norms fit every shape and are silently wrong: compare configs.

    Raises:
        ConfigError: naming every field in which the file beside the weights differs from the config asked for.
    """
    folder = path if path.is_dir() else path.parent
    raw = read_config_json(folder)
    if raw is not None and known.from_hf is not None:
        _compare(folder / "config.json", config_from_hf(known, raw, folder / "config.json"), config)
    elif raw is None and known.from_meta is not None:
        params = read_json(folder / "params.json")
        if params is not None:
            _compare(folder / "params.json", known.from_meta(params, config), config)


def _compare(file: Path, theirs: Any, ours: Any) -> None:
    different = [
        f"{f.name}: {getattr(theirs, f.name)} in the file, {getattr(ours, f.name)} asked for"
        for f in fields(ours)
        if f.name not in NOT_COMPARED and not _same(f.name, theirs, ours)
    ]
    if different:
        raise ConfigError(
            f"{file} is not the model asked for ({'; '.join(different)}). Choose the variant that it is, or override "
            "these fields."
        )


def _same(name: str, one: Any, other: Any) -> bool:
    """Derived values (K, D, F) are compared, not how they were written; activations by what they compute."""
    written_as = {"kv_heads": "k", "head_width": "d", "ffn_width": "f"}
    values = [getattr(config, written_as.get(name, name), getattr(config, name)) for config in (one, other)]
    if name == "activation":
        return ACTIVATIONS.get(one.activation) is ACTIVATIONS.get(other.activation)
    if name == "rope_original":
        values = [value or config.max_positions for value, config in zip(values, (one, other), strict=True)]
        return values[0] == values[1] or one.rope_scaling not in ("ntk", "dynamic", "yarn")
    return bool(values[0] == values[1])


# ---- back out ---------------------------------------------------------------------------------------------------


def whole_model(
    known: Architecture, config: Any, tensors: Mapping[str, LazyTensor], where: str
) -> dict[str, LazyTensor]:
    """Native tensors that are a whole model: in its order, tied ones once.

    Raises:
        CheckpointError: with everything that is missing, extra or of another shape.
    """
    with torch.device("meta"):
        model = known.build(config)
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    found = {group[0]: next((tensors[name] for name in group if name in tensors), None) for group in names.values()}
    misfits = {
        "missing": [name for name, tensor in found.items() if tensor is None],
        "extra": [name for name in tensors if name not in parameters],
        "of the wrong shape": [
            f"{name} ({list(tensor.shape)}, the model has {list(parameters[name].shape)})"
            for name, tensor in found.items()
            if tensor is not None and tensor.shape != tuple(parameters[name].shape)
        ],
    }
    refuse_misfits(where, misfits)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def write_as(
    known: Architecture,
    config: Any,
    tensors: Mapping[str, LazyTensor],
    source: str,
    directory: Path,
    *,
    files: int | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write native tensors as a checkpoint of `source`, with the file that describes it; one tensor is in memory.

    Args:
        files: how many, for a source that cuts tensors over numbered files (`meta`).
        max_shard_bytes: of a safetensors file.
    Raises:
        ConfigError: a source that is unknown or cannot express the config. CheckpointError: the disk's errors.
    """
    if source not in list_sources(known.name):
        raise ConfigError(unknown(f"format of {known.name}", source, list_sources(known.name)))
    if files is not None and source not in known.files:
        raise ConfigError(f"{source} files are cut at a size, not into {files}: give max_shard_bytes instead.")
    texts = _descriptions(known, config, source)
    named = tensors if source == "native" else known.adapters[source](config).from_native(tensors)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(directory / name, text)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written to: {error}.") from error
    if source in known.files:
        known.files[source](config).write(directory, named, files or 1)
    else:
        write_weights(directory, named, max_shard_bytes=max_shard_bytes)


def _descriptions(known: Architecture, config: Any, source: str) -> dict[str, str]:
    """Name -> text of the file beside the weights that says which model they are.

    Native weights get Hugging Face's, where it can say what they are: then loading compares it.
    """
    if source == "meta" and known.to_meta is not None:
        return {"params.json": json.dumps(known.to_meta(config), indent=2)}
    if known.to_hf is None:
        return {}
    try:
        return {"config.json": json.dumps(known.to_hf(config), indent=2)}
    except ConfigError:
        if source == "native":
            return {}
        raise
