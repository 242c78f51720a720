"""`prepare_for_decode`: lay a model's matrices out for the few rows of a decoding step, and put them back.

A decoding step reads every weight once and computes little, so what counts is how fast a kernel reads. Which layout it
reads fastest depends on the machine, the dtype, the shape and the number of threads; so nothing is assumed: each is
timed on the model's own matrices, and the fastest is kept as a copy beside the parameter.

    stored        as the parameter lies: [N, E], one product for each matrix
    joined        a group (query, key, value) as one stored matrix
    transposed    joined, as [E, N]
    prepacked     joined, in oneDNN's own blocks
    split         transposed in one part for each thread

Parameters, names and `state_dict` stay what they are. It knows modules that multiply (`modules/linear.py`); it knows no
model and talks to no rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fms_parallel import compat
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.errors import ConfigError
from fms_parallel.modules.embedding import Embedding
from fms_parallel.modules.linear import Bias, Matrices, Multiplies, Product, Weight, shared_linear
from fms_parallel.modules.linear_types import Quantised

STORED = "stored"
MANY_ROWS = 128
"""Rows that stand for a prompt when it is timed whether prompts, too, go through the copy."""
RING_BYTES = 64 << 20
"""Weights read between two readings of one, where a model has as many: more than a processor's caches keep."""
ROUNDS = 5
"""Times each candidate is timed; the best counts, since only others' work makes a reading slower."""

Kernel = Callable[[Tensor], Tensor]
"""`x [T, E]` -> `[T, N]`."""


@dataclass(frozen=True)
class Choice:
    """What was found for the groups of one shape.

    Attributes:
        sizes: N of each matrix; width: E; count: groups of this shape.
        layout: the one that was taken. seconds: of each, for one group and the rows asked for.
        prompts: whether inputs of many rows use it as well. extra_bytes: of the copies, all groups together.
    """

    sizes: tuple[int, ...]
    width: int
    count: int
    layout: str
    seconds: dict[str, float]
    prompts: bool
    extra_bytes: int


class Prepared:
    """A model with copies for decoding. As a context manager it puts everything back at the end."""

    def __init__(self, modules: Sequence[Multiplies], choices: Sequence[Choice]) -> None:
        self.choices, self._modules = tuple(choices), list(modules)

    @property
    def extra_bytes(self) -> int:
        """Of the copies on this rank, beside the parameters."""
        return sum(choice.extra_bytes for choice in self.choices)

    def undo(self) -> None:
        """Drop the copies: the model multiplies by its parameters again."""
        for module in self._modules:
            module.__dict__.pop("fast", None)
        self._modules = []

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


def prepare_for_decode(model: nn.Module, rows: int = 1) -> Prepared:
    """Give every matrix of `model` the layout that multiplies `rows` rows fastest here; in place.

    Used while no gradient is recorded; a weight that changes afterwards (an optimizer step, a loaded checkpoint) makes
    the next forward without gradients fail rather than use the old copy: call `undo` before training and prepare again
    after it. Costs up to one more copy of the matrices in the dtype that they are computed in (`extra_bytes`).

    Args:
        rows: sequences decoded at a time.
    Raises:
        ConfigError: a model without such matrices, one sharded by FSDP, on the meta device, or prepared already.
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
        scratch = _Scratch(model)
        choices = [_choose(alike, dtype, rows, scratch) for alike in shapes.values()]
    return Prepared([group.module for group in groups], choices)


@dataclass(frozen=True)
class _Group:
    module: Multiplies
    name: str

    def input_like(self, dtype: torch.dtype) -> Tensor:
        owner = self.module.get_submodule(self.module.groups()[self.name][0])
        return torch.empty(0, dtype=dtype, device=owner.weight.device)  # type: ignore[arg-type]

    def matrices(self, dtype: torch.dtype) -> Matrices:
        return self.module.matrices(self.name, self.input_like(dtype))

    def signature(self, dtype: torch.dtype) -> Any:
        """Groups of one signature are timed together."""
        weights, biases = self.matrices(dtype)
        kinds = tuple((type(w), _numbers(w).dtype, _numbers(w).shape) for w in weights)
        return self.name, kinds, tuple(b is not None for b in biases)

    def watched(self) -> tuple[Tensor, ...]:
        """What this rank holds of the parameters, whose versions tell of writes."""
        owners = [self.module.get_submodule(name) for name in self.module.groups()[self.name]]
        held = [p for owner in owners for p in owner.parameters(recurse=False)]
        return tuple(plain for plain in map(local_tensor, held) if not plain.is_inference())


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


# ---- candidates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Joined:
    """A group as one matrix `[N, E]`."""

    weight: Tensor
    bias: Bias

    @classmethod
    def of(cls, matrices: Matrices) -> _Joined:
        weights = [w for w in matrices.weights if isinstance(w, Tensor)]
        given = [b for b in matrices.biases if b is not None]
        if not given:
            bias = None
        else:
            pairs = zip(weights, matrices.biases, strict=True)
            bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in pairs])
        return cls(torch.cat(weights) if len(weights) > 1 else weights[0], bias)


def _plain(joined: _Joined, rows: int) -> Kernel:
    weight, bias = joined.weight, joined.bias
    return lambda x: F.linear(x, weight, bias)


def _transposed(joined: _Joined, rows: int) -> Kernel:
    weight, bias = joined.weight.t().contiguous(), joined.bias
    if bias is None:
        return lambda x: torch.mm(x, weight)
    return lambda x: torch.addmm(bias, x, weight)


def _prepacked(joined: _Joined, rows: int) -> Kernel | None:
    if not compat.has_prepacked_linear(joined.weight):
        return None
    # Blocks made for 16 rows serve any number from 2 on; one row has its own.
    packed, bias = compat.prepack_linear(joined.weight.contiguous(), 1 if rows == 1 else max(16, rows)), joined.bias
    return lambda x: compat.prepacked_linear(x.contiguous(), packed, bias)


def _split(joined: _Joined, rows: int) -> Kernel | None:
    threads, (outputs, width) = torch.get_num_threads(), joined.weight.shape
    if threads == 1 or outputs % threads or joined.weight.device.type != "cpu":
        return None
    parts, bias = joined.weight.view(threads, -1, width).transpose(1, 2).contiguous(), joined.bias

    def kernel(x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(threads, *x.shape), parts).transpose(0, 1).reshape(x.shape[0], outputs)
        return y if bias is None else y + bias

    return kernel


LAYOUTS: dict[str, Callable[[_Joined, int], Kernel | None]] = {
    "joined": _plain,
    "transposed": _transposed,
    "prepacked": _prepacked,
    "split": _split,
}
"""Name -> kernel of a joined group for so many rows; None where this machine or shape has none."""


def _candidate(name: str, matrices: Matrices, rows: int) -> Kernel | None:
    """The kernel of one layout, or None when it gains nothing over what is stored."""
    weights = matrices.weights
    if all(isinstance(w, Tensor) for w in weights):
        return None if name == "joined" and len(weights) == 1 else LAYOUTS[name](_Joined.of(matrices), rows)
    return _joined_quantised(matrices) if name == "joined" else None


def _joined_quantised(matrices: Matrices) -> Kernel | None:
    """Quantised matrices of one type as one; they are rounded row by row, so this changes no number."""
    weights = [w for w in matrices.weights if isinstance(w, Quantised)]
    kinds = {w.type.name for w in weights}
    if len(weights) < len(matrices.weights) or len(kinds) > 1 or any(b is not None for b in matrices.biases):
        return None
    if len(weights) == 1:  # nothing to join, but its parts need not be looked up each time
        return weights[0].product
    scale, values = torch.cat([w.scale for w in weights]), torch.cat([w.values for w in weights])
    return Quantised(weights[0].type, values, scale).product


# ---- what takes the product's place -----------------------------------------------------------------------------


@dataclass
class FastProduct:
    """One group's product through its copy.

    Attributes:
        kernel: of the copy. group: whose parameters are meant. sizes: N of each. dtype: of the activations.
        rows: inputs of more rows go through the parameters, None: none do.
    """

    kernel: Kernel
    group: _Group
    sizes: list[int]
    dtype: torch.dtype
    rows: int | None
    watched: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.versions = tuple(tensor._version for tensor in self.watched)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        if self.rows is not None and flat.shape[0] > self.rows:
            return shared_linear(x, *self.group.module.matrices(self.group.name, x))
        for tensor, version in zip(self.watched, self.versions, strict=True):
            if tensor._version != version:
                raise ConfigError("a weight has changed since prepare_for_decode: undo() it, and prepare again.")
        if x.dtype != self.dtype:
            raise ConfigError(f"prepared for activations in {self.dtype}, given {x.dtype}: prepare again.")
        y = self.kernel(flat).view(*x.shape[:-1], -1)
        return torch.split_with_sizes(y, self.sizes, -1) if len(self.sizes) > 1 else (y,)

    def __reduce__(self) -> Any:
        raise ConfigError("a model prepared for decoding is not copied or pickled: undo() that first.")


# ---- the choice -------------------------------------------------------------------------------------------------


class _Scratch:
    """Memory to read between two timings, so that no weight is found in a cache that decoding would not find it in."""

    def __init__(self, model: nn.Module) -> None:
        held = {id(p): local_tensor(p) for p in model.parameters()}.values()
        device = next(iter(held)).device
        self.bytes = min(RING_BYTES, sum(p.numel() * p.element_size() for p in held))
        self._memory = torch.zeros(max(1, self.bytes // 4), device=device)

    def read(self) -> None:
        """Read it, and wait until that has happened."""
        self._memory.sum()
        self.wait()

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self._memory.device.type != "cpu":
            torch.accelerator.synchronize()


def _choose(groups: Sequence[_Group], dtype: torch.dtype, rows: int, scratch: _Scratch) -> Choice:
    """Time the layouts on groups of one shape, and give each the fastest."""
    weights = [_numbers(w) for w in groups[0].matrices(dtype).weights]
    sizes, width = tuple(w.shape[0] for w in weights), weights[0].shape[1]
    one = sum(sizes) * width * dtype.itemsize
    ring = groups[: -(-scratch.bytes // max(1, one))]
    x = torch.ones(rows, width, dtype=dtype, device=weights[0].device)
    seconds = {STORED: _time([_stored(group) for group in ring], x, scratch)}
    for name in LAYOUTS if one else ():  # a rank may hold no row
        kernels = _kernels(name, ring, dtype, rows)
        if kernels:
            seconds[name] = _time([_one(kernel) for kernel in kernels], x, scratch)
    layout = min(seconds, key=lambda name: seconds[name])
    found = Choice(sizes, width, len(groups), layout, seconds, True, 0)
    return found if layout == STORED else _install(groups, dtype, rows, found, scratch)


def _install(groups: Sequence[_Group], dtype: torch.dtype, rows: int, found: Choice, scratch: _Scratch) -> Choice:
    """Make the copies; find out whether prompts go through them too."""
    kernels = _kernels(found.layout, groups, dtype, rows)
    weights = groups[0].matrices(dtype).weights
    prompt = torch.ones(MANY_ROWS, found.width, dtype=dtype, device=_numbers(weights[0]).device)
    copies, stored = [_one(kernel) for kernel in kernels], [_stored(group) for group in groups]
    prompts = _time(copies[:4], prompt, scratch) <= _time(stored[:4], prompt, scratch)
    for group, kernel in zip(groups, kernels, strict=True):
        fast = FastProduct(kernel, group, list(found.sizes), dtype, None if prompts else rows, group.watched())
        group.module.fast = {**group.module.fast, group.name: fast}
    plain = isinstance(weights[0], Tensor)
    copied = sum(found.sizes) * found.width * len(groups) if plain or len(weights) > 1 else 0
    return replace(found, prompts=prompts, extra_bytes=copied * (dtype.itemsize if plain else 1))


def _kernels(layout: str, groups: Sequence[_Group], dtype: torch.dtype, rows: int) -> list[Kernel]:
    """One kernel for each group, or none when this layout is nothing for them."""
    made = (_candidate(layout, group.matrices(dtype), rows) for group in groups)
    return [kernel for kernel in made if kernel is not None]


def _numbers(weight: Weight) -> Tensor:
    """What is stored of a matrix, `[N, E]`."""
    return weight if isinstance(weight, Tensor) else weight.values


def _stored(group: _Group) -> Product:
    return lambda x: shared_linear(x, *group.module.matrices(group.name, x))


def _one(kernel: Kernel) -> Product:
    return lambda x: (kernel(x),)


def _time(products: Sequence[Product], x: Tensor, scratch: _Scratch) -> float:
    """Seconds of one product, the mean over the ring, the best of a few rounds."""
    # One thread's own time does not count what others do with its core.
    clock = time.thread_time if x.is_cpu and torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(ROUNDS):
        scratch.read()
        start = clock()
        for product in products:
            product(x)
        scratch.wait()
        best = min(best, clock() - start)
    return best / len(products)
