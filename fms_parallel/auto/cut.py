"""Cutting a recorded model into stages: what each holds and hands on, and the module that runs it.

The model's own `forward` runs in every stage, from the same inputs. What it meets on the way:

    a block of an earlier stage    hands out what that stage sent, and nothing else
    a block of this stage          runs
    a block of a later stage       ends the forward: what crosses the cut is sent
    another module without         returns zeros of the right shape: nobody reads them
    parameters of this stage

So masks and positions are computed again from the inputs, code between blocks runs wherever its result is read, and a
parameter that several stages read (a tied embedding, the norm behind an encoder) is held by each of them. It knows
recordings and modules; it knows no schedules and talks to no rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel import compat
from fms_parallel.auto.blocks import BlockCall, Carried, Meta, Output, Recording, Same, canonical_names
from fms_parallel.errors import LayoutError
from fms_parallel.strategy.stages import even_split

SPLITS = ("cost", "even")


@dataclass(frozen=True)
class Cut:
    """Where a model is cut.

    Attributes:
        sizes: blocks of each stage. blocks: all their names, in the order in which they run.
        arriving: for each stage what it needs from earlier ones, and hands on when later ones need it.
        parameters: for each stage the first names of the parameters it holds.
    """

    sizes: tuple[int, ...]
    blocks: tuple[str, ...]
    arriving: tuple[tuple[Carried, ...], ...]
    parameters: tuple[frozenset[str], ...]

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.sizes)

    def range_of(self, stage: int) -> tuple[int, int]:
        """(first, after last) block of a stage."""
        end = sum(self.sizes[: stage + 1])
        return end - self.sizes[stage], end

    def leaving(self, stage: int) -> tuple[Carried, ...]:
        """What a stage hands on."""
        return self.arriving[stage + 1] if stage + 1 < self.stages else ()

    def holders(self, name: str) -> list[int]:
        """The stages that hold a parameter."""
        return [stage for stage, names in enumerate(self.parameters) if name in names]

    @property
    def shared(self) -> list[str]:
        """Parameters that several stages hold, in order of their names: their gradients are summed."""
        return sorted(name for name in frozenset().union(*self.parameters) if len(self.holders(name)) > 1)


def make_cut(
    model: nn.Module, recording: Recording, stages: int, split: str | Sequence[int] | Sequence[str] = "cost"
) -> Cut:
    """Decide which blocks are whose.

    Args:
        split: `cost` (the stage with most floating-point operations has least), `even` (blocks), blocks of each
            stage, or the names of the blocks that later stages begin with.
    Raises:
        LayoutError: more stages than blocks, or a split that does not fit.
    """
    check_split(stages, split, [call.name for call in recording.blocks], type(model).__name__)
    sizes = _sizes(recording, stages, split)
    ends = [0, *accumulate(sizes)]
    arriving = tuple(_arriving(recording, first) for first in ends[:-1])
    return Cut(sizes, tuple(call.name for call in recording.blocks), arriving, _parameters(model, recording, ends))


def check_split(stages: int, split: str | Sequence[Any], names: Sequence[str], model: str) -> None:
    """What can be said of a split without a recording.

    Args:
        names: of the blocks. model: its class, for the sentence.
    Raises:
        LayoutError: as `make_cut`.
    """
    count = len(names)
    if stages > count:
        raise LayoutError(
            f"{stages} pipeline stages, but {model} has {count} repeated blocks ({names[0]}, ...): each stage needs "
            f"one. Use at most {count} stages."
        )
    if split in SPLITS:
        return
    if isinstance(split, str):
        raise LayoutError(f"unknown split {split!r}: use {', '.join(SPLITS)}, blocks of each stage, or block names.")
    if all(isinstance(part, str) for part in split) and (unknown := [name for name in split if name not in names]):
        raise LayoutError(f"split: {unknown[0]!r} is no block. Blocks are {names[0]} ... {names[-1]}.")
    sizes = _numbers(split, names)
    if len(sizes) != stages or sum(sizes) != count or min(sizes) < 1:
        raise LayoutError(
            f"split into {sizes} blocks: {stages} stages need {stages} numbers >= 1 that add up to {count} blocks."
        )


def _numbers(split: Sequence[Any], names: Sequence[str]) -> tuple[int, ...]:
    """Blocks of each stage, from such numbers or from the names that later stages begin with."""
    if not all(isinstance(part, str) for part in split):
        return tuple(int(size) for size in split)
    ends = [0, *sorted(names.index(name) for name in split), len(names)]
    return tuple(end - start for start, end in pairwise(ends))


def _sizes(recording: Recording, stages: int, split: str | Sequence[Any]) -> tuple[int, ...]:
    names, count = [call.name for call in recording.blocks], len(recording.blocks)
    if split == "even":
        return tuple(count // stages + (stage < count % stages) for stage in range(stages))
    if split == "cost":
        before = [call.flops + gap for call, gap in zip(recording.blocks, recording.gap_flops, strict=False)]
        return even_split([float(flops) or 1.0 for flops in before], stages, float(recording.gap_flops[-1]))
    return _numbers(split, names)


def _arriving(recording: Recording, first: int) -> tuple[Carried, ...]:
    """What blocks before `first` hand out and somebody from there on reads."""
    reads = [call.reads for call in recording.blocks[first:]] + [recording.final_reads]
    found = {item for items in reads for item in items if isinstance(item, Carried) and item.block < first}
    return tuple(sorted(found))


def _parameters(model: nn.Module, recording: Recording, ends: list[int]) -> tuple[frozenset[str], ...]:
    """Each stage holds its blocks', and those that its blocks' arguments are made from; the last one also the rest."""
    first_names = canonical_names(model)
    held: list[set[str]] = []
    for start, end in pairwise(ends):
        calls = recording.blocks[start:end]
        prefixes = tuple(f"{call.name}." for call in calls)
        mine = {first for name, first in first_names.items() if name.startswith(prefixes)}
        held.append(mine | {item for call in calls for item in call.reads if isinstance(item, str)})
    held[-1] |= {item for item in recording.final_reads if isinstance(item, str)}
    held[-1] |= set(first_names.values()).difference(*held)
    return tuple(map(frozenset, held))


# ---- running a stage --------------------------------------------------------------------------------------------


class Run:
    """What the modules of one stage share while it runs a micro-batch.

    Attributes:
        recording: of a micro-batch of this shape. values: what has arrived, and what blocks of this stage handed out.
    """

    def __init__(self, cut: Cut, stage: int) -> None:
        self.cut, self.stage = cut, stage
        self.recording: Recording | None = None
        self.values: dict[Carried, Tensor] = {}
        self.called: dict[str, int] = {}
        self.device = torch.device("cpu")

    def begin(self, recording: Recording, carried: Sequence[Tensor], device: torch.device) -> None:
        """Before a forward."""
        self.recording, self.called, self.device = recording, {}, device
        self.values = dict(zip(self.cut.arriving[self.stage], carried, strict=True))

    def call(self, number: int) -> BlockCall:
        """The recording of a block."""
        assert self.recording is not None
        return self.recording.blocks[number]

    def leaving(self) -> tuple[Tensor, ...]:
        """What this stage sends: contiguous, and never the very tensor that it received."""
        arrived = set(self.cut.arriving[self.stage])
        return tuple(
            self.values[item].clone(memory_format=torch.contiguous_format)
            if item in arrived
            else self.values[item].contiguous()
            for item in self.cut.leaving(self.stage)
        )

    def filled(self, output: Output, number: int | None, module: str, arguments: Sequence[Any] = ()) -> Any:
        """An output with what has arrived in its places, zeros elsewhere."""
        leaves: list[Any] = []
        for index, leaf in enumerate(output.leaves):
            if isinstance(leaf, Same):
                leaves.append(arguments[leaf.argument])
            elif isinstance(leaf, Meta):
                found = None if number is None else self.values.get(Carried(number, module, index))
                zeros = torch.zeros(leaf.shape, dtype=leaf.dtype, device=self.device) if found is None else None
                leaves.append(found if found is not None else zeros)
            else:
                leaves.append(leaf)
        return compat.unflatten_tree(leaves, output.spec)


class EndOfStage(Exception):
    """The next stage's first block was reached."""


class Stub(nn.Module):
    """In the place of a module that another stage has: its attributes, and none of its parameters."""

    def __init__(self, original: nn.Module, run: Run) -> None:
        super().__init__()
        self.__dict__["_original"], self.__dict__["_run"] = original, run
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)


class Elsewhere(Stub):
    """A module outside the blocks whose result nobody in this stage reads."""

    def __init__(self, original: nn.Module, run: Run, name: str) -> None:
        super().__init__(original, run)
        self.name = name

    def forward(self, *_: Any, **__: Any) -> Any:
        """Zeros of the recorded shape."""
        run: Run = self.__dict__["_run"]
        assert run.recording is not None
        number = run.called.get(self.name, 0)
        run.called[self.name] = number + 1
        return run.filled(run.recording.outside[self.name][number], None, "")


class Earlier(Stub):
    """A block of an earlier stage: hands out what arrived."""

    def __init__(self, original: nn.Module, run: Run, number: int) -> None:
        super().__init__(original, run)
        self.number = number
        for item in run.cut.arriving[run.stage]:
            if item.block == number and item.module:
                _place(self, item.module, Emitter(original.get_submodule(item.module), run, number, item.module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The recorded structure; modules inside whose results were carried return them, so that hooks see them."""
        run: Run = self.__dict__["_run"]
        for module in self.modules():
            if isinstance(module, Emitter):
                module()
        return run.filled(run.call(self.number).output, self.number, "", compat.flatten_tree((args, kwargs))[0])


class Emitter(Stub):
    """A module inside a block of an earlier stage whose result somebody reads behind the block's back."""

    def __init__(self, original: nn.Module, run: Run, number: int, name: str) -> None:
        super().__init__(original, run)
        self.number, self.name = number, name
        self._forward_hooks = copy.copy(original._forward_hooks)

    def forward(self) -> Any:
        """What arrived."""
        run: Run = self.__dict__["_run"]
        return run.filled(run.call(self.number).inside[self.name], self.number, self.name)


class Later(Stub):
    """A block of a later stage."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Never returns."""
        raise EndOfStage


def _place(module: nn.Module, name: str, child: nn.Module) -> None:
    *owners, last = name.split(".")
    for owner in owners:
        if owner not in module._modules:
            module._modules[owner] = nn.Module()  # add_module would see the original's
        module = module._modules[owner]  # type: ignore[assignment]
    module._modules[last] = child


def stage_model(skeleton: nn.Module, cut: Cut, run: Run) -> nn.Module:
    """A copy of `skeleton` (on the meta device) that keeps this stage's parameters only."""
    stage = run.stage
    first, end = cut.range_of(stage)
    first_names = canonical_names(skeleton)
    numbers = {name: number for number, name in enumerate(cut.blocks)}
    stubs: dict[int, nn.Module] = {}

    def stub(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in numbers:
                number = numbers[full]
                if number < first:
                    stubs[id(child)] = Earlier(child, run, number)
                elif number >= end:
                    stubs[id(child)] = Later(child, run)
                continue
            names = [f"{full}.{below}" for below, _ in child.named_parameters(remove_duplicate=False)]
            if any(block.startswith(f"{full}.") for block in cut.blocks) or _held(names, first_names, cut, stage):
                stub(child, f"{full}.")
            elif names:
                stubs[id(child)] = Elsewhere(child, run, full)

    stub(skeleton, "")
    model = copy.deepcopy(skeleton, dict(stubs))
    _drop_parameters(model, first_names, cut.parameters[stage], run.device)
    _watch_handed_out(model, cut, run, range(first, end))
    return model


def _held(names: Sequence[str], first_names: Mapping[str, str], cut: Cut, stage: int) -> bool:
    return any(first_names[name] in cut.parameters[stage] for name in names)


def _drop_parameters(
    model: nn.Module, first_names: Mapping[str, str], held: frozenset[str], device: torch.device
) -> None:
    """Parameters of other stages in modules that stay: zeros without memory, read where nobody reads the result."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if first_names[name] not in held:
            owner_name, _, attribute = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            del owner._parameters[attribute]
            zeros = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            owner.__dict__[attribute] = zeros


def _watch_handed_out(model: nn.Module, cut: Cut, run: Run, mine: range) -> None:
    """Keep what blocks of this stage hand out and later stages read."""
    wanted: dict[tuple[int, str], list[int]] = {}
    for item in cut.leaving(run.stage):
        if item.block in mine:
            wanted.setdefault((item.block, item.module), []).append(item.leaf)
    for (number, name), leaves in wanted.items():
        block = model.get_submodule(cut.blocks[number])
        module = block.get_submodule(name) if name else block
        module.register_forward_hook(_keep(run, number, name, leaves))


def _keep(run: Run, number: int, name: str, leaves: list[int]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        flat = compat.flatten_tree(output)[0]
        for leaf in leaves:
            run.values[Carried(number, name, leaf)] = flat[leaf]

    return hook
