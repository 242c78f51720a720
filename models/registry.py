"""`get_model`: from an architecture's name to a model that is spread over the ranks and filled.

A model file registers its variants and its checkpoint sources here; this file knows no architecture. Everything that
can be wrong with a request is said before a process group starts or a byte is read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.checkpoint.adapter import Adapter
from fms_parallel.checkpoint.export import save_weights
from fms_parallel.checkpoint.files import open_weights
from fms_parallel.checkpoint.load import load_weights
from fms_parallel.distributed.start import Launch, pick_device
from fms_parallel.errors import CheckpointError, ConfigError, LayoutError, suggest, unknown
from fms_parallel.layout import ParallelLayout
from fms_parallel.shape import ModelShape
from fms_parallel.strategy.base import Strategy
from fms_parallel.strategy.compose import compose, refuse_unimplemented
from fms_parallel.strategy.materialise import initialise, materialise

from .hf.config import read_config_json

logger = logging.getLogger("fms_parallel.models")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class ModelConfig(Protocol):
    """What a model's config can answer."""

    def shape(self) -> ModelShape:
        """Sizes for planning and validation."""
        ...


Config = TypeVar("Config", bound=ModelConfig)


@dataclass(frozen=True)
class Architecture:
    """One registered architecture.

    Attributes:
        build: config -> native module. variants: name -> config.
        adapters: source name -> config -> adapter between that source's keys and ours.
        from_hf: Hugging Face config.json as a mapping -> config. to_hf: the way back.
    """

    name: str
    build: Callable[[Any], nn.Module]
    variants: Mapping[str, Any]
    adapters: Mapping[str, Callable[[Any], Adapter]] = field(default_factory=dict)
    from_hf: Callable[[Mapping[str, Any]], Any] | None = None
    to_hf: Callable[[Any], dict[str, Any]] | None = None


class Registry:
    """Architectures by name."""

    def __init__(self) -> None:
        self._known: dict[str, Architecture] = {}

    def add(self, architecture: Architecture) -> None:
        """Register; a second registration of a name is an error."""
        if architecture.name in self._known:
            raise ConfigError(f"architecture {architecture.name!r} is registered already.")
        self._known[architecture.name] = architecture

    def get(self, name: str) -> Architecture:
        """The architecture of this name."""
        if name not in self._known:
            raise ConfigError(unknown("architecture", name, self._known))
        return self._known[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._known)


REGISTRY = Registry()


def register_model(architecture: Architecture) -> None:
    """Make an architecture known to `get_model`."""
    REGISTRY.add(architecture)


def list_models() -> list[str]:
    """Names of the registered architectures."""
    return REGISTRY.names()


def list_variants(architecture: str) -> list[str]:
    """Names of an architecture's variants."""
    return list(REGISTRY.get(architecture).variants)


def list_sources(architecture: str) -> list[str]:
    """Names of the checkpoint sources that an architecture reads; `native` is always among them."""
    return sorted({"native", *REGISTRY.get(architecture).adapters})


def get_config(architecture: str, variant: str | None = None, **overrides: Any) -> Any:
    """A variant's config with some fields replaced.

    Raises:
        ConfigError: unknown architecture, variant or field, with the nearest known name.
    """
    known = REGISTRY.get(architecture)
    variant = variant if variant is not None else next(iter(known.variants))
    if variant not in known.variants:
        raise ConfigError(unknown(f"variant of {architecture}", variant, known.variants))
    config = known.variants[variant]
    names = [f.name for f in fields(config)]
    for name in overrides:
        if name not in names:
            raise ConfigError(
                f"{architecture} has no config field {name!r}.{suggest(name, names)} Fields: {', '.join(names)}."
            )
    return replace(config, **overrides)


def get_shape(architecture: str, variant: str | None = None, **overrides: Any) -> ModelShape:
    """The sizes of a variant, without building it."""
    shape: ModelShape = get_config(architecture, variant, **overrides).shape()
    return shape


def get_model(
    architecture: str,
    variant: str | None = None,
    model_path: str | Path | None = None,
    source: str | None = None,
    device_type: str = "cpu",
    data_type: str | torch.dtype | None = None,
    distributed_strategy: str | ParallelLayout | Strategy | None = None,
    checkpoint_sharding: str | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    seed: int = 0,
    compile_blocks: bool = False,
    fill: Callable[[nn.Module], None] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model, spread it over the ranks, and fill it.

    Args:
        architecture: a registered name. variant: one of its variants; the first one when None.
        model_path: weights to load (a safetensors file, or a folder of them); None draws weights from `seed`.
        source: whose keys the files have: `hf`, `native`; None finds out from the keys.
        device_type: `cpu` or `cuda`. data_type: of the parameters (`fp32`, `bf16`, ... or a torch dtype); None is what
            the layout's precision asks for.
        distributed_strategy: None (one process), a layout string, a `ParallelLayout`, or a `Strategy` object.
        checkpoint_sharding: None or `layer`: how the files are cut is read from them; another word is refused.
        group: the ranks to spread over; only the whole world (None) is supported.
        seed: of the initial weights: the same seed gives the same global weights in every layout.
        compile_blocks: torch.compile each block.
        fill: writes the weights instead, say from a training checkpoint.
        overrides: config fields to replace.
    Returns:
        the module, holding this rank's shards, with `.config` and `.parallel`.
    Raises:
        ConfigError, LayoutError, CheckpointError: naming the number, the rule and the way out.
    """
    known = REGISTRY.get(architecture)
    config = get_config(architecture, variant, **overrides)
    _check_request(known, model_path, source, checkpoint_sharding, group)
    dtype = _dtype(data_type)
    launch = Launch.read()
    strategy = distributed_strategy if isinstance(distributed_strategy, Strategy) else None
    layout = ParallelLayout() if strategy else _layout(distributed_strategy, launch)  # type: ignore[arg-type]
    layout.validate(config.shape())
    refuse_unimplemented(layout)
    _check_config_json(known, config, model_path)
    if layout.world_size > 1 and not dist.is_initialized():
        raise LayoutError(f"layout {str(layout)!r} needs {layout.world_size} ranks: start a process group first.")
    device = pick_device(device_type, launch)
    with torch.device("meta"):
        model = known.build(config)
    if fill is not None and model_path is not None:
        raise ConfigError(f"model_path={str(model_path)!r} and fill both write the weights: give one of them.")
    fill = fill or _filler(known, config, model_path, source, seed)
    if strategy is not None:
        model = strategy.distribute(model if dtype is None else model.to(dtype))
        materialise(model, device)
        fill(model)
    else:
        model = compose(model, layout, device=device, fill=fill, compile_blocks=compile_blocks, dtype=dtype)
    model.architecture = known.name  # type: ignore[assignment]
    return model


def save_hf(model: nn.Module, folder: str | Path) -> None:
    """Write a model of `get_model` as a Hugging Face folder (config.json and safetensors). Collective over all ranks.

    Raises:
        ConfigError: its architecture or a field of its config has no Hugging Face form.
        CheckpointError: on every rank when any rank failed to write.
    """
    known = REGISTRY.get(getattr(model, "architecture", ""))
    if known.to_hf is None or "hf" not in known.adapters:
        raise ConfigError(f"{known.name} has no Hugging Face form.")
    text = json.dumps(known.to_hf(model.config), indent=2)
    save_weights(model, folder, known.adapters["hf"](model.config), extra_files={"config.json": text})


def _layout(word: str | ParallelLayout | None, launch: Launch) -> ParallelLayout:
    """None, and a `ParallelLayout` of one process, are one process whatever the launcher started."""
    if word is None or word == "":
        return ParallelLayout()
    if isinstance(word, ParallelLayout) and set(word.degrees) == {1}:
        return word
    world = dist.get_world_size() if dist.is_initialized() else launch.world_size
    return ParallelLayout.parse(word).resolve(world, launch.local_world_size)


def _check_request(
    known: Architecture,
    model_path: str | Path | None,
    source: str | None,
    checkpoint_sharding: str | None,
    group: dist.ProcessGroup | None,
) -> None:
    if source is not None and source not in list_sources(known.name):
        raise ConfigError(unknown(f"source of {known.name}", source, list_sources(known.name)))
    if source is not None and model_path is None:
        raise ConfigError(f"source={source!r} without model_path: there is nothing to read.")
    if model_path is not None and not Path(model_path).exists():
        raise CheckpointError(f"{model_path}: no such file or folder.")
    if checkpoint_sharding not in (None, "layer"):
        raise ConfigError(
            f"checkpoint_sharding={checkpoint_sharding!r}: not needed, each rank reads its own slices of any "
            "safetensors files; leave it out."
        )
    if group is not None and group is not dist.group.WORLD:
        raise ConfigError("group: only the whole world is supported; leave it out and choose a layout.")


NOT_COMPARED = ("fused", "std", "dropout", "max_positions", "bos_id", "eos_id", "pad_id")
"""Config fields that may differ between the files and the request: they change no weight's meaning."""


def _check_config_json(known: Architecture, config: Any, model_path: str | Path | None) -> None:
    """Weights trained under other rotary positions or norms fit every shape and are silently wrong: compare configs."""
    raw = None if model_path is None else read_config_json(Path(model_path))
    if raw is None or known.from_hf is None:
        return
    theirs, ours = known.from_hf(raw), config
    different = [
        f"{f.name}: {getattr(theirs, f.name)} in the file, {getattr(ours, f.name)} asked for"
        for f in fields(config)
        if f.name not in NOT_COMPARED and not _same(f.name, theirs, ours)
    ]
    if different:
        raise ConfigError(
            f"{model_path}/config.json is not the model asked for ({'; '.join(different)}). Choose the variant that it "
            "is, or override these fields."
        )


def _same(name: str, one: Any, other: Any) -> bool:
    """Derived values (K, D) are compared, not how they were written."""
    written_as = {"kv_heads": "k", "head_width": "d"}
    values = [getattr(config, written_as.get(name, name)) for config in (one, other)]
    if name == "rope_original":
        values = [value or config.max_positions for value, config in zip(values, (one, other), strict=True)]
        return values[0] == values[1] or one.rope_scaling not in ("ntk", "dynamic", "yarn")
    return bool(values[0] == values[1])


def _dtype(data_type: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(data_type, str):
        if data_type not in DTYPES:
            raise ConfigError(unknown("data_type", data_type, DTYPES))
        return DTYPES[data_type]
    return data_type


def _filler(
    known: Architecture, config: Any, model_path: str | Path | None, source: str | None, seed: int
) -> Callable[[nn.Module], None]:
    """What writes the parameters: a checkpoint's reader, or the seed."""
    if model_path is None:
        return lambda model: initialise(model, seed)
    tensors = open_weights(Path(model_path))
    name = source or _guess_source(known, config, tensors)
    if name != "native":
        tensors = known.adapters[name](config).to_native(tensors)
    return lambda model: load_weights(model, tensors, source=str(model_path))


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
