"""Adapters: named, invertible steps between a checkpoint format's keys and tensors and ours.

    LLAMA_HF = Adapter("hf", (
        Drop(("*.rotary_emb.inv_freq",)),
        Rename((("model.layers.{n}.mlp.down_proj.{kind}", "layers.{n}.feed_forward.down.{kind}"), ...)),
        Stack(("layers.{n}...gate.{kind}", "layers.{n}...up.{kind}"), "layers.{n}...gate_up.{kind}", dim=0),
    ))
    load_weights(model, LLAMA_HF.to_native(open_weights(path)), source="hf")

Steps run in order towards native and in reverse order back. They move lazy tensors about: no byte is read here, and a
box asked of the outcome reads only its bytes in the file. It knows keys and views; it knows no models and no ranks.
A new step is a class with `to_native` and `from_native`; one that joins several tensors into one derives from `Join`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from fms_parallel.checkpoint.lazy import (
    Agreeing,
    Concatenated,
    Flattened,
    LazyTensor,
    RotaryPermuted,
    Section,
    Stacked,
    Unflattened,
    Unstacked,
)
from fms_parallel.checkpoint.template import Template, templates_alike
from fms_parallel.checkpoint.words import listed
from fms_parallel.errors import CheckpointError

Tensors = dict[str, LazyTensor]


class Step(Protocol):
    """One change of keys or tensors, in both directions."""

    def to_native(self, tensors: Tensors) -> Tensors:
        """From the checkpoint's form to ours. The input is left as it is."""
        ...

    def from_native(self, tensors: Tensors) -> Tensors:
        """From our form to the checkpoint's. The input is left as it is."""
        ...


@dataclass(frozen=True)
class Adapter:
    """Named steps from one format to native keys and tensors, and back.

    Attributes:
        name: for messages: `hf`, `meta`, ...
        steps: in the order from the format to native.
    """

    name: str
    steps: tuple[Step, ...]

    def to_native(self, tensors: Mapping[str, LazyTensor]) -> Tensors:
        """The format's tensors under our names and in our shapes.

        Raises:
            CheckpointError: a key that no step knows, one that two rules claim, parts that are missing or do not fit.
        """
        found = dict(tensors)
        try:
            for step in self.steps:
                found = step.to_native(found)
        except CheckpointError as error:
            raise CheckpointError(f"reading as {self.name!r}: {error}") from error
        return found

    def from_native(self, tensors: Mapping[str, LazyTensor]) -> Tensors:
        """Our tensors under the format's names and in its shapes; errors as in `to_native`."""
        found = dict(tensors)
        try:
            for step in reversed(self.steps):
                found = step.from_native(found)
        except CheckpointError as error:
            raise CheckpointError(f"writing as {self.name!r}: {error}") from error
        return found


# ---- steps on keys ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drop:
    """Forget keys that carry nothing, such as `*.rotary_emb.inv_freq`. There is no way back, and none is needed.

    Attributes:
        patterns: shell-style, case-sensitive.
    """

    patterns: tuple[str, ...]

    def to_native(self, tensors: Tensors) -> Tensors:
        """The keys that match no pattern."""
        return {key: t for key, t in tensors.items() if not any(fnmatchcase(key, p) for p in self.patterns)}

    def from_native(self, tensors: Tensors) -> Tensors:
        """All of them."""
        return dict(tensors)


@dataclass(frozen=True)
class Rename:
    """A closed list of keys: each key must match exactly one rule.

    Attributes:
        rules: pairs of templates (the format's, ours) with the same fields.
    """

    rules: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for source, target in self.rules:
            templates_alike(source, target)

    def to_native(self, tensors: Tensors) -> Tensors:
        return _renamed(tensors, [(Template(theirs), Template(ours)) for theirs, ours in self.rules])

    def from_native(self, tensors: Tensors) -> Tensors:
        """Every key by its rule, backwards."""
        return _renamed(tensors, [(Template(ours), Template(theirs)) for theirs, ours in self.rules])


@dataclass(frozen=True)
class Tied:
    """`alias` and `source` (native names) are one tensor: the step of a model whose config ties them.

    The format writes it `once`, under `source`, or under both names.
    """

    alias: str
    source: str
    once: bool = True

    def to_native(self, tensors: Tensors) -> Tensors:
        """Both names. When the file has both, reading either compares them."""
        held = [tensors[name] for name in (self.source, self.alias) if name in tensors]
        if not held:
            return dict(tensors)
        with _naming(f"{self.alias}, tied to {self.source}"):
            one = Agreeing(held)
        return {**tensors, self.source: one, self.alias: one}

    def from_native(self, tensors: Tensors) -> Tensors:
        """`source`, or both."""
        one, other = tensors.get(self.alias), tensors.get(self.source)
        if not self.once:
            return {**tensors, **dict.fromkeys((self.source, self.alias), other or one)}  # type: ignore[dict-item]
        if one is not None and other is not None and one is not other:
            raise CheckpointError(f"{self.alias} and {self.source} are two tensors, but the format has room for one.")
        return {self.source if key == self.alias else key: t for key, t in tensors.items()}


# ---- steps that join tensors ------------------------------------------------------------------------------------


class Join(ABC):
    """Several tensors of the format are one of ours. `parts` and `whole` are templates with the same fields."""

    whole: str

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """The parts' templates, in order."""

    @abstractmethod
    def join(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        """One from its parts."""

    @abstractmethod
    def split(self, whole: LazyTensor) -> list[LazyTensor]:
        """The parts of one."""

    def __post_init__(self) -> None:
        templates_alike(self.whole, *self.sources)

    def to_native(self, tensors: Tensors) -> Tensors:
        """Parts replaced by their whole, at the place of the first part."""
        groups, member_of = self._groups(tensors)
        found: Tensors = {}
        for key, tensor in tensors.items():
            whole = member_of.get(key)
            if whole is None:
                _put(found, key, tensor)
            elif whole in groups:
                with _naming(whole):
                    _put(found, whole, self.join([tensors[part] for part in groups.pop(whole)]))
        return found

    def _groups(self, tensors: Tensors) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Whole key -> its part keys, and part key -> its whole."""
        whole, parts = Template(self.whole), [Template(part) for part in self.sources]
        groups: dict[str, list[str]] = {}
        for key in tensors:
            values = next((values for part in parts if (values := part.match(key)) is not None), None)
            if values is not None:
                groups[whole.fill(values)] = [part.fill(values) for part in parts]
        missing = [key for keys in groups.values() for key in keys if key not in tensors]
        if missing:
            raise CheckpointError(f"to make {self.whole}, {listed('keys are missing', missing)}.")
        return groups, {key: name for name, keys in groups.items() for key in keys}

    def from_native(self, tensors: Tensors) -> Tensors:
        """Wholes replaced by their parts, side by side."""
        whole, parts = Template(self.whole), [Template(part) for part in self.sources]
        found: Tensors = {}
        for key, tensor in tensors.items():
            values = whole.match(key)
            if values is None:
                _put(found, key, tensor)
                continue
            with _naming(key):
                for part, piece in zip(parts, self.split(tensor), strict=True):
                    _put(found, part.fill(values), piece)
        return found


@dataclass(frozen=True)
class Fuse(Join):
    """`parts` concatenated along the existing dimension `dim`.

    Attributes:
        sizes: of each part along `dim`; None when they are equal.
    """

    parts: tuple[str, ...]
    whole: str
    dim: int
    sizes: tuple[int, ...] | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return self.parts

    def join(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        whole = Concatenated(parts, self.dim)
        found = tuple(part.shape[self.dim] for part in parts)
        if found != self._sizes(whole):
            raise CheckpointError(f"parts have sizes {found} along dim {self.dim}, expected {self._sizes(whole)}.")
        return whole

    def split(self, whole: LazyTensor) -> list[LazyTensor]:
        pieces: list[LazyTensor] = []
        start = 0
        for size in self._sizes(whole):
            pieces.append(Section.along(whole, self.dim, start, size))
            start += size
        return pieces

    def _sizes(self, whole: LazyTensor) -> tuple[int, ...]:
        length, count = whole.shape[self.dim], len(self.parts)
        sizes = self.sizes or (length // count,) * count
        if sum(sizes) != length or len(sizes) != count:
            raise CheckpointError(f"{length} along dim {self.dim} is not the sum of {count} parts of sizes {sizes}.")
        return sizes


@dataclass(frozen=True)
class Stack(Join):
    """`parts` of one shape stacked along a new dimension: gate `[F, E]`, up `[F, E]` <-> gate_up `[2, F, E]`."""

    parts: tuple[str, ...]
    whole: str
    dim: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        return self.parts

    def join(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        return Stacked(parts, self.dim)

    def split(self, whole: LazyTensor) -> list[LazyTensor]:
        if len(whole.shape) <= self.dim or whole.shape[self.dim] != len(self.parts):
            raise CheckpointError(f"shape {whole.shape} has not {len(self.parts)} parts along dim {self.dim}.")
        return [Unstacked(whole, self.dim, index) for index in range(len(self.parts))]


@dataclass(frozen=True)
class GroupQKV(Join):
    """q `[H * D, E]`, k and v `[K * D, E]` <-> qkv `[K, H/K + 2, D, E]`: each kv head behind its own query heads.

    Sharding dimension 0 then gives a rank whole kv heads with all queries that use them. Biases lose E.
    """

    q: str
    k: str
    v: str
    whole: str
    heads: int
    kv_heads: int
    head_width: int

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    @property
    def _grids(self) -> tuple[tuple[int, int, int], ...]:
        """Shape of q, k and v as (kv head, member, row in head)."""
        kv = (self.kv_heads, 1, self.head_width)
        return ((self.kv_heads, self.heads // self.kv_heads, self.head_width), kv, kv)

    def join(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        return Concatenated([Unflattened(part, grid) for part, grid in zip(parts, self._grids, strict=True)], dim=1)

    def split(self, whole: LazyTensor) -> list[LazyTensor]:
        members = [grid[1] for grid in self._grids]
        expected = (self.kv_heads, sum(members), self.head_width)
        if whole.shape[:3] != expected:
            raise CheckpointError(f"shape {whole.shape} does not begin with {expected} (kv heads, q + 2, head width).")
        pieces: list[LazyTensor] = []
        start = 0
        for count in members:
            pieces.append(Flattened(Section.along(whole, 1, start, count), 3))
            start += count
        return pieces


# ---- steps on single tensors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PermuteRotary:
    """Rows of the named q or k tensors, interleaved pairs in the format (Meta), are half-split in ours.

    Attributes:
        names: templates of native keys, weights and biases.
        heads: of these tensors (H for q, K for k). head_width: D.
    """

    names: tuple[str, ...]
    heads: int
    head_width: int

    def to_native(self, tensors: Tensors) -> Tensors:
        return self._permuted(tensors, to_halves=True)

    def from_native(self, tensors: Tensors) -> Tensors:
        return self._permuted(tensors, to_halves=False)

    def _permuted(self, tensors: Tensors, to_halves: bool) -> Tensors:
        templates = [Template(name) for name in self.names]
        found = dict(tensors)
        for key, tensor in tensors.items():
            if any(template.match(key) is not None for template in templates):
                with _naming(key):
                    found[key] = RotaryPermuted(tensor, self.heads, self.head_width, to_halves=to_halves)
        return found


# ---- helpers of this page ---------------------------------------------------------------------------------------


def _renamed(tensors: Tensors, rules: Sequence[tuple[Template, Template]]) -> Tensors:
    """Every key by the one rule whose first template it matches."""
    found: Tensors = {}
    strangers = []
    for key, tensor in tensors.items():
        names = [target.fill(values) for source, target in rules if (values := source.match(key)) is not None]
        if len(names) > 1:
            raise CheckpointError(f"{key} is claimed by {len(names)} rules: {', '.join(names)}.")
        if names:
            _put(found, names[0], tensor)
        else:
            strangers.append(key)
    if strangers:
        raise CheckpointError(
            f"{listed('keys without a rule', strangers)}. Is this the right format, and the right model?"
        )
    return found


def _put(found: Tensors, name: str, tensor: LazyTensor) -> None:
    """Enter a tensor under a name that is still free."""
    if name in found:
        raise CheckpointError(f"two tensors would be called {name}.")
    found[name] = tensor


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Put the key before what went wrong with its tensor."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
