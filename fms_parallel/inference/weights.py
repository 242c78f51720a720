"""`prepare_for_decode`: the fastest kernel for the few rows of a decoding step, for every matrix; and put them back.

A decoding step reads every weight once and computes little, so what counts is how fast a kernel reads. Which does it
fastest depends on the machine, the dtype, the shape and the number of threads; so nothing is assumed: each layout of
`inference/kernels.py` is timed on the model's own matrices, and the fastest is kept, as a copy beside the parameter
where it needs one.

Parameters, names and `state_dict` stay what they are. It knows modules that multiply (`modules/linear.py`); it knows no
model and talks to no rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.errors import ConfigError
from fms_parallel.inference.blocks import BlockChoice, FastBlocks, fast_blocks
from fms_parallel.inference.compiled import MOST_ROWS, Compiled
from fms_parallel.inference.kernels import COMPILED, NAMES, STORED, Kernel, candidate
from fms_parallel.inference.watched import Watched
from fms_parallel.modules.embedding import Embedding
from fms_parallel.modules.linear import Matrices, Multiplies, Product, Weight, shared_linear

MANY_ROWS = 128
"""Rows that stand for a prompt when it is timed whether prompts, too, go through the copy."""
RING_BYTES = 64 << 20
"""Weights read between two readings of one, where a model has as many: more than a processor's caches keep."""
ROUNDS = 5
"""Times each candidate is timed; the best counts, since only others' work makes a reading slower."""


@dataclass(frozen=True)
class Choice:
    """What was found for the groups of one shape.

    Attributes:
        sizes: N of each matrix; width: E; count: groups of this shape.
        layout: the one that was taken. seconds: of each, for one group and the rows asked for.
        one_row: seconds of a compiled kernel that single rows go through when more rows were asked for, else None.
        prompts: whether inputs of many rows use the layout as well. extra_bytes: of the copies, all groups together.
    """

    sizes: tuple[int, ...]
    width: int
    count: int
    layout: str
    seconds: dict[str, float]
    one_row: float | None = None
    prompts: bool = True
    extra_bytes: int = 0


class Prepared:
    """A model laid out for decoding. As a context manager it puts everything back at the end.

    Attributes:
        choices: what was found for its matrices. blocks: for its blocks, where they were compiled.
    """

    def __init__(
        self,
        modules: Sequence[Multiplies],
        choices: Sequence[Choice],
        fast: Sequence[FastBlocks] = (),
        blocks: Sequence[BlockChoice] = (),
    ) -> None:
        self.choices, self.blocks = tuple(choices), tuple(blocks)
        self._modules, self._fast = list(modules), list(fast)

    @property
    def extra_bytes(self) -> int:
        """Of the copies on this rank, beside the parameters."""
        return sum(choice.extra_bytes for choice in self.choices) + sum(block.extra_bytes for block in self._fast)

    def undo(self) -> None:
        """Drop the copies: the model multiplies by its parameters again."""
        for block in self._fast:
            block.remove()
        for module in self._modules:
            module.__dict__.pop("fast", None)
        self._modules, self._fast = [], []

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


def prepare_for_decode(model: nn.Module, rows: int = 1, compiled: bool = False) -> Prepared:
    """Give every matrix of `model` the layout that multiplies `rows` rows fastest here; in place.

    Used while no gradient is recorded; a weight that changes afterwards (an optimizer step, a loaded checkpoint) makes
    the next forward without gradients fail rather than use the old copy: call `undo` before training and prepare again
    after it. Costs up to one more copy of the matrices in the dtype that they are computed in (`extra_bytes`).

    Args:
        rows: sequences decoded at a time.
        compiled: also make kernels for the shapes at hand with torch's compiler, for up to `compiled.MOST_ROWS` rows:
            they read the parameters themselves, without a copy, and nearly as fast as memory gives. It takes seconds
            for each shape (less the second time), and a C++ compiler. Blocks that can be are compiled whole
            (`inference/blocks.py`), on a GPU as CUDA graphs, for one row and for `rows` up to as many: hooks of their
            modules are not called then.
    Raises:
        ConfigError: compiled without a compiler; a model without such matrices, one with adapters, sharded by FSDP, on
            the meta device, or prepared already.
    """
    if rows < 1:
        raise ConfigError(f"rows={rows}: must be >= 1.")
    groups = list(_groups(model))
    _check(model, groups)
    dtype = _compute_dtype(model)
    shapes: dict[Any, list[_Group]] = {}
    with torch.no_grad():
        for group in groups:
            shapes.setdefault(group.signature(dtype), []).append(group)
        trial = _Trial(dtype, rows, Compiled(dtype) if compiled else None, _Scratch(model))
        choices = [_choose(alike, trial) for alike in shapes.values()]
        counts = [count for count in sorted({1, rows}) if count <= MOST_ROWS]
        fast, blocks = fast_blocks(model, counts, dtype, trial.best) if compiled else ([], [])
    return Prepared([group.module for group in groups], choices, fast, blocks)


@dataclass(frozen=True)
class _Group:
    module: Multiplies
    name: str

    @property
    def device(self) -> torch.device:
        owner = self.module.get_submodule(self.module.groups()[self.name][0])
        return owner.weight.device  # type: ignore[return-value]

    def matrices(self, dtype: torch.dtype) -> Matrices:
        return self.module.matrices(self.name, torch.empty(0, dtype=dtype, device=self.device))

    def signature(self, dtype: torch.dtype) -> Any:
        """Groups of one signature are timed together."""
        weights, biases = self.matrices(dtype)
        kinds = tuple((type(w), _numbers(w).dtype, _numbers(w).shape) for w in weights)
        return self.name, kinds, tuple(b is not None for b in biases)

    def watched(self) -> Watched:
        """Its parameters."""
        return Watched(self.module.get_submodule(name) for name in self.module.groups()[self.name])


def _groups(model: nn.Module) -> Iterator[_Group]:
    for module in model.modules():
        if isinstance(module, Multiplies):
            for name in module.groups():
                yield _Group(module, name)


def _check(model: nn.Module, groups: Sequence[_Group]) -> None:
    if not groups:
        raise ConfigError(f"{type(model).__name__} has no matrices that can be laid out for decoding.")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError("weights sharded by fsdp or dp are gathered for each use: load the model without them.")
    if any(group.module.adapted for group in groups):
        raise ConfigError(
            "a model with adapters multiplies by its parameters: merge_lora(model) first, which leaves none."
        )
    if any(group.module.fast for group in groups):
        raise ConfigError("this model is prepared for decoding already: undo() that first.")
    if any(parameter.is_meta for group in groups for parameter in group.module.parameters()):
        raise ConfigError("parameters on the meta device have no layout: fill the model first.")


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Of the activations: what the embedding gives."""
    for module in model.modules():
        if isinstance(module, Embedding):
            return module.compute_dtype or module.weight.dtype
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


# ---- what takes the product's place -----------------------------------------------------------------------------


@dataclass
class FastProduct:
    """One group's product while no gradient is recorded.

    Attributes:
        group: whose parameters are meant. sizes: N of each matrix. dtype: of the activations.
        kernel: for up to `rows` rows (None: for any number of them); None: there is none but those in `exact`.
        exact: number of rows -> a kernel for just that many. What has no kernel goes through the parameters.
    """

    group: _Group
    sizes: list[int]
    dtype: torch.dtype
    kernel: Kernel | None
    rows: int | None
    exact: dict[int, Kernel]
    watched: Watched

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        kernel = self._kernel(flat.shape[0])
        if kernel is None:
            return shared_linear(x, *self.group.module.matrices(self.group.name, x))
        if self.watched.changed():
            raise ConfigError("a weight has changed since prepare_for_decode: undo() it, and prepare again.")
        if x.dtype != self.dtype:
            raise ConfigError(f"prepared for activations in {self.dtype}, given {x.dtype}: prepare again.")
        y = kernel(flat).view(*x.shape[:-1], -1)
        return torch.split_with_sizes(y, self.sizes, -1) if len(self.sizes) > 1 else (y,)

    def _kernel(self, rows: int) -> Kernel | None:
        if rows in self.exact:
            return self.exact[rows]
        return self.kernel if self.rows is None or rows <= self.rows else None

    def __reduce__(self) -> Any:
        raise ConfigError("a model prepared for decoding is not copied or pickled: undo() that first.")


# ---- the choice -------------------------------------------------------------------------------------------------


class _Scratch:
    """Memory to read between two timings, so that no weight is found in a cache that decoding would not find it in."""

    def __init__(self, model: nn.Module) -> None:
        held = {id(p): local_tensor(p) for p in model.parameters()}.values()
        self.device = next(iter(held)).device
        self.bytes = min(RING_BYTES, sum(p.numel() * p.element_size() for p in held))
        self._memory = torch.zeros(max(1, self.bytes // 4), device=self.device)

    def read(self) -> None:
        """Read it, and wait until that has happened."""
        self._memory.sum()
        self.wait()

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


@dataclass(frozen=True)
class _Trial:
    """What layouts are tried for, and what with."""

    dtype: torch.dtype
    rows: int
    compiled: Compiled | None
    scratch: _Scratch

    def kernels(self, layout: str, groups: Sequence[_Group], rows: int) -> list[Kernel]:
        """One kernel for each group, or none when this layout is nothing for them."""
        made = (candidate(layout, group.matrices(self.dtype), rows, self.compiled) for group in groups)
        return [kernel for kernel in made if kernel is not None]

    def time(self, products: Sequence[Callable[[Tensor], Any]], groups: Sequence[_Group], rows: int) -> float:
        """Seconds of one product with so many rows."""
        x = torch.ones(rows, _width(groups[0], self.dtype), dtype=self.dtype, device=groups[0].device)
        return self.best([partial(product, x) for product in products])

    def best(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Seconds of one call: the mean over all, the best of a few rounds."""
        # One thread's own time does not count what others do with its core.
        alone = self.scratch.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        best = float("inf")
        for _ in range(ROUNDS):
            self.scratch.read()
            start = clock()
            for call in calls:
                call()
            self.scratch.wait()
            best = min(best, clock() - start)
        return best / len(calls)


def _choose(groups: Sequence[_Group], trial: _Trial) -> Choice:
    """Time the layouts on groups of one shape, and give each the fastest."""
    weights = [_numbers(w) for w in groups[0].matrices(trial.dtype).weights]
    sizes, width = tuple(w.shape[0] for w in weights), weights[0].shape[1]
    one = sum(sizes) * width * trial.dtype.itemsize
    ring = groups[: -(-trial.scratch.bytes // max(1, one))]
    seconds: dict[str, float] = {}
    for name in (STORED, *(NAMES if one else ())):  # a rank may hold no row
        _time(name, ring, trial, seconds)
    # Whatever disturbs one of them for a moment would decide for the whole run.
    for name in sorted(seconds, key=lambda name: seconds[name])[1::-1]:
        _time(name, ring, trial, seconds)
    layout = min(seconds, key=lambda name: seconds[name])
    return _install(groups, trial, Choice(sizes, width, len(groups), layout, seconds))


def _time(name: str, ring: Sequence[_Group], trial: _Trial, seconds: dict[str, float]) -> None:
    """Note the time of a layout, if there is one for these groups; the shorter one of two."""
    stored = [_stored(group) for group in ring] if name == STORED else []
    if kernels := stored or trial.kernels(name, ring, trial.rows):
        seconds[name] = min(trial.time(kernels, ring, trial.rows), seconds.get(name, float("inf")))


def _install(groups: Sequence[_Group], trial: _Trial, found: Choice) -> Choice:
    """Make the copies; find out whether prompts go through them too, and what single rows go through."""
    copies = trial.kernels(found.layout, groups, trial.rows) if found.layout not in (STORED, COMPILED) else []
    exact = {trial.rows: trial.kernels(COMPILED, groups, trial.rows)} if found.layout == COMPILED else {}
    stored = [_stored(group) for group in groups]
    if trial.rows > 1 and trial.compiled is not None and (singles := trial.kernels(COMPILED, groups, 1)):
        seconds = trial.time(singles, groups, 1)
        if seconds < trial.time(copies or stored, groups, 1):
            exact, found = {**exact, 1: singles}, replace(found, one_row=seconds)
    if not copies and not exact:
        return found
    few = 4  # of the copies are enough to tell about prompts
    prompts = bool(copies) and trial.time(copies[:few], groups, MANY_ROWS) <= trial.time(
        stored[:few], groups, MANY_ROWS
    )
    for index, group in enumerate(groups):
        kernel, rows = (copies[index], None if prompts else trial.rows) if copies else (None, None)
        own = {count: kernels[index] for count, kernels in exact.items()}
        fast = FastProduct(group, list(found.sizes), trial.dtype, kernel, rows, own, group.watched())
        group.module.fast = {**group.module.fast, group.name: fast}
    return replace(found, prompts=prompts, extra_bytes=sum(_extra_bytes(group, trial, found) for group in groups))


def _extra_bytes(group: _Group, trial: _Trial, found: Choice) -> int:
    """Of one group's copies: what is read in place, and int8 that needs no joining, is none."""
    weights = group.matrices(trial.dtype).weights
    plain = isinstance(weights[0], Tensor)
    if found.layout in (STORED, COMPILED):
        held = {tensor.untyped_storage().data_ptr() for tensor in group.watched().tensors}
        return sum(w.nbytes for w in map(_numbers, weights) if w.untyped_storage().data_ptr() not in held)
    copied = sum(found.sizes) * found.width if plain or len(weights) > 1 else 0
    return copied * (trial.dtype.itemsize if plain else 1)


def _width(group: _Group, dtype: torch.dtype) -> int:
    return _numbers(group.matrices(dtype).weights[0]).shape[1]


def _numbers(weight: Weight) -> Tensor:
    """What is stored of a matrix, `[N, E]`."""
    return weight if isinstance(weight, Tensor) else weight.values


def _stored(group: _Group) -> Product:
    return lambda x: shared_linear(x, *group.module.matrices(group.name, x))
