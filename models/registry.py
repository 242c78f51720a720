"""The registered architectures: their variants, and how their checkpoints are read and written.

A model file registers itself here; this file knows no architecture, and builds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fms_parallel.checkpoint.adapter import Adapter
from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.errors import ConfigError, suggest, unknown
from fms_parallel.shape import ModelShape


class ModelConfig(Protocol):
    """What a model's config can answer."""

    def shape(self) -> ModelShape:
        """Sizes for planning and validation."""
        ...


class Files(Protocol):
    """How a source lays its tensors out in files, where that is not safetensors, one or several."""

    def fits(self, path: Path) -> bool:
        """Whether these are such files."""
        ...

    def open(self, path: Path) -> dict[str, LazyTensor]:
        """Their tensors under the source's keys."""
        ...

    def write(self, directory: Path, tensors: Mapping[str, LazyTensor], files: int = 1) -> None:
        """Write them, spread over so many files."""
        ...


@dataclass(frozen=True)
class Architecture:
    """One registered architecture.

    Attributes:
        build: config -> native module. variants: name -> config.
        adapters: source name -> config -> adapter between that source's keys and ours.
        files: source name -> config -> how that source lays out its files; safetensors when it is not here.
        from_hf: Hugging Face config.json as a mapping -> config. to_hf: the way back.
        model_types: of the config.json files that `from_hf` reads; none means the architecture's own name.
        hf_classes: of the config.json files that are meant when several architectures read one model type.
        from_meta: Meta's params.json and the config asked for -> the config that the files are of. to_meta: back.
    """

    name: str
    build: Callable[[Any], nn.Module]
    variants: Mapping[str, Any]
    adapters: Mapping[str, Callable[[Any], Adapter]] = field(default_factory=dict)
    files: Mapping[str, Callable[[Any], Files]] = field(default_factory=dict)
    from_hf: Callable[[Mapping[str, Any]], Any] | None = None
    to_hf: Callable[[Any], dict[str, Any]] | None = None
    model_types: tuple[str, ...] = ()
    hf_classes: tuple[str, ...] = ()
    from_meta: Callable[[Mapping[str, Any], Any], Any] | None = None
    to_meta: Callable[[Any], dict[str, Any]] | None = None


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


def all_shapes() -> dict[str, ModelShape]:
    """Sizes of every variant as `{"architecture:variant": shape}`: what the planner finds through its entry point."""
    known = (REGISTRY.get(name) for name in REGISTRY.names())
    return {f"{k.name}:{variant}": config.shape() for k in known for variant, config in k.variants.items()}


def config_of(known: Architecture, variant: str | None, overrides: Mapping[str, Any]) -> Any:
    """A variant's config (None: the first one) with some fields replaced; errors as in `get_config`."""
    variant = variant if variant is not None else next(iter(known.variants))
    if variant not in known.variants:
        raise ConfigError(unknown(f"variant of {known.name}", variant, known.variants))
    return replaced(known, known.variants[variant], overrides)


def replaced(known: Architecture, config: Any, overrides: Mapping[str, Any]) -> Any:
    """The config with some fields replaced; an unknown field, or a value that nothing can be done with, is an error."""
    names = [f.name for f in fields(config)]
    for name in overrides:
        if name not in names:
            raise ConfigError(
                f"{known.name} has no config field {name!r}.{suggest(name, names)} Fields: {', '.join(names)}."
            )
    try:
        return replace(config, **overrides)
    except ArithmeticError as error:
        raise ConfigError(f"{known.name}: {dict(overrides)} is no config: sizes are at least 1 ({error}).") from error
    except TypeError as error:  # a value of another kind, computed with
        raise ConfigError(f"{known.name}: {dict(overrides)} is no config: {error}.") from error
