"""Where keys and values live: one run of tokens per layer, in a manager's hands or inside the model's attention.

    one layer    keys [K, T, D], values [K, T, D]     T tokens of all rows, K the kv heads that this rank holds
    a row        the tokens first .. first + length   a slice of it, never a copy

Heads come first because a head's keys are read together: a decode step reads them up to 1.7 times as fast so.
Which row has which tokens is decided elsewhere (inference/paged.py): this file knows sizes and memory only.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError
from fms_parallel.modules.attention import Attention, TPAttention
from fms_parallel.modules.embedding import Embedding


@dataclass(frozen=True)
class CacheSize:
    """What a model's attention keeps per token on this rank.

    Attributes:
        layers: layer number -> (kv heads held here, D). dtype: of keys and values.
        windows: of each kind of layers that the whole model has, farthest first: a query sees itself and the
            window - 1 tokens before it; None: all before it. kinds: layer number -> its kind (else the first).
    """

    layers: dict[int, tuple[int, int]]
    dtype: torch.dtype
    windows: tuple[int | None, ...] = (None,)
    kinds: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> CacheSize:
        """Read from the model's attention modules. Raises ConfigError when it has none of ours."""
        layers = {module.layer: (_kv_heads(module), module.shape.head_width) for module in attentions(model)}
        layers = layers or getattr(model, "cache_layers", {})  # a model of another library says it itself
        if not layers:
            raise ConfigError(
                f"{type(model).__name__} has no fms_parallel.modules.attention.Attention: the engine cannot keep its "
                "keys and values. Build the model from those modules, or load it with get_model."
            )
        config = getattr(model, "config", None)
        told = getattr(config, "windows", None) or dict.fromkeys(layers, getattr(config, "window", None))
        windows = sorted(set(told.values()), key=lambda window: (window is not None, -(window or 0)))
        kinds = {layer: windows.index(told[layer]) for layer in layers}
        return cls(layers, compute_dtype(model), tuple(windows), kinds)

    def as_one(self) -> CacheSize:
        """The same for a cache that keeps all tokens of all layers."""
        return replace(self, windows=(None,), kinds={})

    def of_kind(self, kind: int) -> dict[int, tuple[int, int]]:
        """Its layers on this rank."""
        return {layer: size for layer, size in self.layers.items() if self.kinds.get(layer, 0) == kind}

    def kind_bytes(self, kind: int) -> int:
        """Bytes of one token's keys and values in the layers of one kind that this rank has."""
        return sum(2 * heads * width for heads, width in self.of_kind(kind).values()) * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, all layers of this rank."""
        return sum(self.kind_bytes(kind) for kind in range(len(self.windows)))

    def bytes_of(self, tokens: Sequence[int]) -> int:
        """Bytes of so many tokens of each kind of layers."""
        return sum(count * self.kind_bytes(kind) for kind, count in enumerate(tokens))


def attentions(model: nn.Module) -> Iterator[Attention]:
    """The attention modules of `model` that this rank runs."""
    return (module for module in model.modules() if isinstance(module, Attention))


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What activations are computed in."""
    for module in model.modules():
        if isinstance(module, Embedding):
            return module.compute_dtype or module.weight.dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _kv_heads(module: Attention) -> int:
    if isinstance(module, TPAttention):
        return max(1, module.shape.kv_heads // module.axis.size)
    return module.shape.kv_heads


@dataclass
class LayerMemory:
    """Keys and values of one layer, each `[K, T, D]`."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, tokens: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> LayerMemory:
        """Memory for so many tokens; nothing is written."""
        make = (torch.empty(heads, tokens, width, dtype=dtype, device=device) for _ in range(2))
        return cls(*make)

    @property
    def memory_bytes(self) -> int:
        """Bytes of both."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def write(self, tokens: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put `[n, K, D]` at these places, int64 `[n]`."""
        self.keys.index_copy_(1, tokens, keys.transpose(0, 1))
        self.values.index_copy_(1, tokens, values.transpose(0, 1))

    def copy(self, source: int, target: int, count: int) -> None:
        """Tokens `source ..` to `target ..`, so many of them; the two runs do not overlap."""
        for x in (self.keys, self.values):
            x[:, target : target + count] = x[:, source : source + count]


class Storage(Protocol):
    """Who holds the layers' memory; a layer's is taken when it is first asked for."""

    @property
    def memory_bytes(self) -> int:
        """Bytes held at present."""
        ...

    @property
    def whole_bytes(self) -> int:
        """Bytes when every layer's memory is taken."""
        ...

    def kind(self, number: int) -> int:
        """Which kind of layers (see `CacheSize`) a layer is of."""
        ...

    def layer(self, number: int, like: Tensor) -> LayerMemory:
        """Memory of a layer whose keys look like `like [.., K, D]`."""
        ...

    def held(self, kind: int) -> Iterator[LayerMemory]:
        """The memory taken so far of every layer of one kind."""
        ...

    def release(self) -> None:
        """Give all memory back."""
        ...

    def close(self) -> None:
        """The last release: others may use the place."""
        ...


class KVCacheManager:
    """Keys and values of `rows` rows of up to `capacity` tokens, outside the model, allocated once.

    Args:
        size: what the model keeps per token. rows, capacity: how much fits; several `rows`: of each kind of layers.
    """

    def __init__(self, size: CacheSize, rows: int | Sequence[int], capacity: int, device: torch.device) -> None:
        several = [rows] * len(size.windows) if isinstance(rows, int) else list(rows)
        self.size, self.rows, self.capacity, self.device = size, several[0], capacity, device
        self._tokens = [count * capacity for count in several]
        self._layers: dict[int, LayerMemory] = {}

    def kind(self, number: int) -> int:
        """Which kind of layers a layer is of."""
        return self.size.kinds.get(number, 0)

    @property
    def memory_bytes(self) -> int:
        """Bytes held at present."""
        return sum(memory.memory_bytes for memory in self._layers.values())

    @property
    def whole_bytes(self) -> int:
        """Bytes when every layer's memory is taken."""
        return self.size.bytes_of(self._tokens)

    def get_memory_usage(self) -> dict[str, float]:
        """Sizes for a person: MiB held, MiB when all layers are allocated, layers, rows and tokens per row."""
        held, whole = self.memory_bytes / 2**20, self.whole_bytes / 2**20
        counts = {"layers": len(self.size.layers), "rows": self.rows, "capacity": self.capacity}
        return {"held_mib": held, "whole_mib": whole, **counts}

    def allocate(self) -> None:
        """Take the memory of all layers now rather than at their first use."""
        for number, (heads, width) in self.size.layers.items():
            if number not in self._layers:
                tokens = self._tokens[self.kind(number)]
                self._layers[number] = LayerMemory.empty(tokens, heads, width, self.size.dtype, self.device)

    def layer(self, number: int, like: Tensor) -> LayerMemory:
        """Memory of one layer."""
        held = self._layers.get(number)
        if held is None or held.keys.dtype != like.dtype:  # allocated ahead for another dtype than is computed in
            tokens = self._tokens[self.kind(number)]
            held = LayerMemory.empty(tokens, like.shape[-2], like.shape[-1], like.dtype, like.device)
            self._layers[number] = held
        return held

    def held(self, kind: int) -> Iterator[LayerMemory]:
        """The memory taken so far of every layer of one kind."""
        return (memory for number, memory in self._layers.items() if self.kind(number) == kind)

    def release(self) -> None:
        """Give all memory back."""
        self._layers.clear()

    def close(self) -> None:
        """The last release."""
        self.release()


class AttentionMemory:
    """The same memory inside the model: each attention module holds its own, as the attribute `kv_memory`.

    It is a plain attribute: no state_dict knows it, no `.to()` moves it.

    Args:
        size: what the model keeps per token. tokens: how many fit.
    Raises:
        ConfigError: another engine keeps its cache in this model.
    """

    def __init__(self, model: nn.Module, size: CacheSize, tokens: int) -> None:
        self.size, self.tokens = size, tokens
        self._modules = {module.layer: module for module in attentions(model)}
        if not self._modules:
            raise ConfigError("cache='internal' needs attention modules of ours: use cache='paged' or 'manager'.")
        owners = {ref() for module in self._modules.values() if (ref := vars(module).get("kv_owner")) is not None}
        if owners - {None}:
            raise ConfigError(
                "another engine keeps its cache inside this model's attention: close it, or use cache='paged'."
            )
        for module in self._modules.values():
            vars(module).pop("kv_memory", None)  # of an engine that is gone
            vars(module)["kv_owner"] = weakref.ref(self)

    @property
    def memory_bytes(self) -> int:
        """Bytes held at present."""
        return sum(memory.memory_bytes for memory in self.held(0))

    @property
    def whole_bytes(self) -> int:
        """Bytes when every layer's memory is taken."""
        return self.tokens * self.size.token_bytes

    def kind(self, number: int) -> int:
        """All layers are of one kind here."""
        return 0

    def layer(self, number: int, like: Tensor) -> LayerMemory:
        """Memory of one layer."""
        module = self._modules[number]
        if "kv_memory" not in vars(module):
            memory = LayerMemory.empty(self.tokens, like.shape[-2], like.shape[-1], like.dtype, like.device)
            vars(module)["kv_memory"] = memory
        held: LayerMemory = vars(module)["kv_memory"]
        return held

    def held(self, kind: int) -> Iterator[LayerMemory]:
        """Every layer's memory taken so far."""
        return (vars(m)["kv_memory"] for m in self._modules.values() if "kv_memory" in vars(m))

    def release(self) -> None:
        """Give all memory back."""
        for module in self._modules.values():
            vars(module).pop("kv_memory", None)

    def close(self) -> None:
        """Leave the modules to another engine."""
        self.release()
        for module in self._modules.values():
            vars(module).pop("kv_owner", None)
