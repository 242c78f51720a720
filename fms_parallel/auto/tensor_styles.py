"""Styles for what inference finds beside plain linear layers, and the words for them in a tensor plan.

    Columns(parts=(32, 32, 32))         query, key and value in one matrix: this rank's share of each
    Columns(parts, transposed=True)     a matrix `[in, out]` that is multiplied from the right (GPT-2's Conv1D)
    Rows(transposed=True)               such a matrix, cut along what it reads
    Features()                          an embedding cut along its width: a position bias with a value for each head
    Experts()                           a mixture's experts, 3-D weights: each rank has some of them
    ExpertWidths(width=48)              the same where tp does not divide their number: each rank has a part of each
    Numbers(("num_heads",))             no cut: these attributes are divided by tp

A matrix with several parts is stored in one piece for each rank, because checkpoints, shards and saving know boxes, and
dealt out when it is used (`dealing.py`). It knows single modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from fms_parallel.auto.dealing import deal, dealing
from fms_parallel.distributed.collectives import copy_in
from fms_parallel.errors import LayoutError
from fms_parallel.modules.tp import local
from fms_parallel.strategy.styles import Door, PlannedStyle


class Word:
    """A word of a tensor plan that needs more than a name."""

    def style(self, name: str, sp: bool, door: Door, recurse: bool) -> PlannedStyle | None:
        """What it does to the module `name`; None: nothing that torch has to do."""
        return None


@dataclass(frozen=True)
class Columns(Word):
    """Cut along the output, which consists of `parts`."""

    parts: tuple[int, ...]
    transposed: bool = False

    def style(self, name: str, sp: bool, door: Door, recurse: bool) -> PlannedStyle:
        """As `Word.style`."""
        if len(self.parts) > 1:
            return PackedColumns(self, name, sp, door, recurse)
        return TransposedColumns(name, sp, door, recurse)


@dataclass(frozen=True)
class Rows(Word):
    """Cut along the input."""

    transposed: bool = True

    def style(self, name: str, sp: bool, door: Door, recurse: bool) -> PlannedStyle:
        """As `Word.style`."""
        return TransposedRows(name, sp, door, recurse)


@dataclass(frozen=True)
class Features(Word):
    """An embedding cut along its width."""

    def style(self, name: str, sp: bool, door: Door, recurse: bool) -> PlannedStyle:
        """As `Word.style`."""
        return FeaturesStyle(name, sp, door, recurse)


@dataclass(frozen=True)
class Experts(Word):
    """Experts `[X, ...]` in one module, called with tokens, each token's experts and their weights."""

    def style(self, name: str, sp: bool, door: Door, recurse: bool) -> PlannedStyle:
        """As `Word.style`."""
        return ExpertsStyle(name, sp, door, recurse)


@dataclass(frozen=True)
class ExpertWidths(Word):
    """Gated experts, gate and up in one `[X, 2 F, E]` and down `[X, E, F]`, called likewise; `width` is F."""

    width: int

    def style(self, name: str, sp: bool, door: Door, recurse: bool) -> PlannedStyle:
        """As `Word.style`."""
        return ExpertWidthsStyle(self, name, sp, door, recurse)


@dataclass(frozen=True)
class Numbers(Word):
    """Attributes of a module that count what each rank has 1/tp of."""

    names: tuple[str, ...]


class PackedColumns(PlannedStyle):
    """Cut along the output in one piece, of which this rank uses its share of each part; begins a region."""

    def __init__(self, word: Columns, name: str, sp: bool, door: Door, recurse: bool = True) -> None:
        super().__init__(name, sp, door, recurse)
        self.word = word

    def placement(self, name: str) -> Placement:
        return Shard(1) if name == "weight" and self.word.transposed else Shard(0)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        self.plan = dealing(self.word.parts, self.axis)
        return module

    def run(self, module: nn.Module, inner: Callable[..., Any], x: Tensor) -> Tensor:
        x = self.door.enter(x, self.axis)
        with self.plain_parameters(module):
            weight, bias = module._parameters["weight"], module._parameters.get("bias")
            assert weight is not None
            turned = weight.t() if self.word.transposed else weight
            return F.linear(x, deal(turned, self.plan), None if bias is None else deal(bias, self.plan))


class TransposedColumns(PlannedStyle):
    """`x W + b` with W `[in, out]` cut along its output; begins a region."""

    def placement(self, name: str) -> Placement:
        return Shard(1) if name == "weight" else Shard(0)

    def run(self, module: nn.Module, inner: Callable[..., Any], x: Tensor) -> Tensor:
        x = self.door.enter(x, self.axis)
        with self.plain_parameters(module):
            weight = module._parameters["weight"]
            assert weight is not None
            return F.linear(x, weight.t(), module._parameters.get("bias"))


class TransposedRows(PlannedStyle):
    """`x W + b` with W `[in, out]` cut along its input; the sum ends the region, the bias is added once."""

    def placement(self, name: str) -> Placement:
        return Shard(0) if name == "weight" else Replicate()

    def run(self, module: nn.Module, inner: Callable[..., Any], x: Tensor) -> Tensor:
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        y = self.leave(F.linear(x, local(weight).t()))
        return y if bias is None else y + local(bias, Replicate())


class FeaturesStyle(PlannedStyle):
    """An embedding whose width is cut: each rank looks up its own features, all rows."""

    def placement(self, name: str) -> Placement:
        return Shard(1)

    def run(self, module: nn.Module, inner: Callable[..., Any], ids: Tensor) -> Tensor:
        with self.plain_parameters(module):
            found: Tensor = inner(ids)
        return found


GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""transformers' names of a mixture's stacked matrices."""

EXPERT_INPUTS = ("hidden_states", "top_k_index", "top_k_weights")
"""What transformers' modules of experts are called with: `[T, E]`, `[T, k]`, `[T, k]`."""


def experts_of(model: nn.Module, tp: int) -> dict[str, Word]:
    """Modules of experts of which each rank gets equally many, or an equal part of each; others stay whole."""
    found: dict[str, Word] = {}
    for name, module in model.named_modules():
        if _is_experts(module):
            width = _width_of_gated(module)
            if module.num_experts % tp == 0:  # type: ignore[operator]
                found[name] = Experts()
            elif width is not None and width % tp == 0:
                found[name] = ExpertWidths(width)
    return found


def _width_of_gated(module: nn.Module) -> int | None:
    """F of experts that are `gate_up_proj [X, 2 F, E]` and `down_proj [X, E, F]`, and nothing else."""
    if set(module._parameters) != {GATE_UP, DOWN}:
        return None
    both, down = (tuple(module.get_parameter(name).shape) for name in (GATE_UP, DOWN))
    count, width, hidden = down[0], down[1], down[-1]
    return hidden if both == (count, 2 * hidden, width) else None


def _is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of `num_experts` experts, stacked, and is called as transformers does."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    count = vars(module).get("num_experts")
    if not own or type(count) is not int or len(list(module.parameters())) != len(own):
        return False
    stacked = all(parameter.dim() > 1 and len(parameter) == count for parameter in own)
    return stacked and tuple(signature(module.forward).parameters) == EXPERT_INPUTS


class ExpertsStyle(PlannedStyle):
    """Each rank holds `1/tp` of the experts whole and computes what they add to their tokens; the sum ends it."""

    def check(self, module: nn.Module, tp: int) -> None:
        count = module.num_experts
        if count % tp:  # type: ignore[operator]
            raise LayoutError(f"{self.name}: tp={tp} does not divide its {count} experts: leave the word out.")

    def placement(self, name: str) -> Placement:
        return Shard(0)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        module.num_experts //= device_mesh.size()  # type: ignore[operator, assignment]
        if hasattr(module, "_is_expert_parallel"):
            module._is_expert_parallel = True  # type: ignore[assignment]
        return module

    def run(self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x, index, weights = signature(inner).bind(*args, **kwargs).args
        count: int = module.num_experts  # type: ignore[assignment]
        here = (index // count) == self.axis.rank
        # transformers takes the index behind the last expert for "none".
        mine = torch.where(here, index - self.axis.rank * count, count)
        weights = copy_in(weights, self.axis) * here
        with self.plain_parameters(module):
            return self.leave(inner(self.door.enter(x, self.axis), mine, weights))


class ExpertWidthsStyle(PlannedStyle):
    """Each rank holds F/tp of every expert; the sum ends it.

    Gate and up are stored in one piece for each rank and dealt out when used, as packed columns are.
    """

    def __init__(self, word: ExpertWidths, name: str, sp: bool, door: Door, recurse: bool = True) -> None:
        super().__init__(name, sp, door, recurse)
        self.word = word

    def check(self, module: nn.Module, tp: int) -> None:
        if self.word.width % tp:
            raise LayoutError(f"{self.name}: tp={tp} does not divide F={self.word.width}: leave the word out.")

    def placement(self, name: str) -> Placement:
        return Shard(1) if name == GATE_UP else Shard(2)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        self.plan = dealing((self.word.width, self.word.width), self.axis)
        return module

    def run(self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x, index, weights = signature(inner).bind(*args, **kwargs).args
        with self.plain_parameters(module):
            stored = module._parameters[GATE_UP]
            assert stored is not None
            dealt = deal(stored.transpose(0, 1).contiguous(), self.plan).transpose(0, 1).contiguous()
            module._parameters[GATE_UP] = dealt  # type: ignore[assignment]  # put back with the others
            return self.leave(inner(self.door.enter(x, self.axis), index, copy_in(weights, self.axis)))


def use_words(
    model: nn.Module, plan: Mapping[str, ParallelStyle], words: Mapping[str, Word], tp: int
) -> dict[str, ParallelStyle]:
    """The plan with the styles of these modules in place of the ones it has, and numbers divided on the modules.

    Args:
        plan: as `generate_layer_plan` makes it, where the modules of `words` are replicated.
    """
    found = dict(plan)
    for name, word in words.items():
        if isinstance(word, Numbers):
            module = model.get_submodule(name)
            for attribute in word.names:
                if hasattr(module, attribute):
                    setattr(module, attribute, getattr(module, attribute) // tp)
            continue
        before = plan[name]
        assert isinstance(before, PlannedStyle)
        style = word.style(name, before.sp, before.door, before.recurse)
        assert style is not None
        found[name] = style
    return found


def as_expressions(words: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Module names -> expressions, joined where all modules that differ in numbers have the same word; sorted."""
    found: dict[str, Any] = {}
    for name in sorted(words):
        general = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
        alike = [other for other in names if re.fullmatch(general, other)]
        expression = general if all(words.get(other) == words[name] for other in alike) else re.escape(name)
        found[expression] = words[name]
    return found
