"""More steps of adapters: tensors that a format has in another shape, the other way round, or under an older name.

It knows keys and views, like `adapter.py`; a step is undone by the method beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fms_parallel.checkpoint.adapter import Step, Tensors
from fms_parallel.checkpoint.lazy import Flattened, Unflattened
from fms_parallel.checkpoint.template import Template
from fms_parallel.errors import CheckpointError


@dataclass(frozen=True)
class Grid:
    """Rows of the named tensors, flat in the format, are a grid in ours: `[K * G * D, E]` <-> `[K, G, D, E]`.

    Attributes:
        names: templates of the keys, the same on both sides. sizes: of the grid.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def to_native(self, tensors: Tensors) -> Tensors:
        """Grids."""
        return {key: Unflattened(t, self.sizes) if self._matches(key) else t for key, t in tensors.items()}

    def from_native(self, tensors: Tensors) -> Tensors:
        """Flat rows."""
        found = dict(tensors)
        for key, tensor in tensors.items():
            if self._matches(key):
                if tensor.shape[: len(self.sizes)] != self.sizes:
                    raise CheckpointError(f"{key}: shape {tensor.shape} does not begin with {self.sizes}.")
                found[key] = Flattened(tensor, len(self.sizes))
        return found

    def _matches(self, key: str) -> bool:
        return any(Template(name).match(key) is not None for name in self.names)


@dataclass(frozen=True)
class Reversed:
    """A step with its directions exchanged: one that joins parts on the way to native splits them there."""

    step: Step

    def to_native(self, tensors: Tensors) -> Tensors:
        """What the step does from native."""
        return self.step.from_native(tensors)

    def from_native(self, tensors: Tensors) -> Tensors:
        """What the step does to native."""
        return self.step.to_native(tensors)


@dataclass(frozen=True)
class FirstOf:
    """One tensor that files hold under several names, of which the first one present counts.

    Attributes:
        names: of the format; all of them are written. under: the one of them that goes on towards native.
    """

    names: tuple[str, ...]
    under: str

    def to_native(self, tensors: Tensors) -> Tensors:
        """Under one name only."""
        found = {key: t for key, t in tensors.items() if key not in self.names}
        held = [tensors[name] for name in self.names if name in tensors]
        return {**found, self.under: held[0]} if held else found

    def from_native(self, tensors: Tensors) -> Tensors:
        """Under every name."""
        one = tensors.get(self.under)
        return dict(tensors) if one is None else {**tensors, **dict.fromkeys(self.names, one)}


@dataclass(frozen=True)
class OlderEndings:
    """Endings of keys that older files have; they are read, and written as the newer ones.

    Attributes:
        pairs: (older, newer), such as (".gamma", ".weight").
    """

    pairs: tuple[tuple[str, str], ...]

    def to_native(self, tensors: Tensors) -> Tensors:
        """The newer endings."""
        found: Tensors = {}
        for key, tensor in tensors.items():
            name = next((key[: -len(old)] + new for old, new in self.pairs if key.endswith(old)), key)
            if name in found:
                raise CheckpointError(f"two tensors would be called {name}.")
            found[name] = tensor
        return found

    def from_native(self, tensors: Tensors) -> Tensors:
        """All as they are."""
        return dict(tensors)
