"""The styles behind the words of a tensor plan: how one plain torch module is cut, for models without twins.

Each style stores the module's parameters as DTensors and runs the module's own forward on this rank's plain pieces,
so whatever the module computes stays as it was written. Between modules a value is

    plain tensor, without sp    whole and the same on every rank, or (between colwise and rowwise) this rank's features
    DTensor, with sp            the residual, cut along its tokens (dim 1 of [B, S, E]): shapes read whole, any S works

It knows single modules; it knows no patterns and no model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from fms_parallel.distributed.collectives import Axis, all_gather, copy_in, gather_last, reduce_out
from fms_parallel.errors import LayoutError
from fms_parallel.modules.tp import local, place

TOKENS = Shard(1)
"""Where sp cuts the residual `[B, S, E]`."""


class Door:
    """Where a region begins: gives a matrix the whole tokens, and remembers the last tensor that came in.

    Query, key and value read the same tensor object; it enters once, and its gradients are summed over the ranks once.
    """

    def __init__(self) -> None:
        self._outside: tuple[Any, int, bool] | None = None
        self._inside: Tensor | None = None

    def enter(self, x: Tensor, axis: Axis) -> Tensor:
        """Plain whole tokens; their gradient is summed over the axis."""
        if torch.compiler.is_compiling():
            return _enter(x, axis)
        state = (x._version, torch.is_grad_enabled())
        if self._outside is None or self._outside[0]() is not x or self._outside[1:] != state:
            self._outside, self._inside = (weakref.ref(x), *state), _enter(x, axis)
        assert self._inside is not None
        return self._inside

    def close(self) -> None:
        """Forget it: a region ended."""
        self._outside = self._inside = None


def _enter(x: Tensor, axis: Axis) -> Tensor:
    if isinstance(x, DTensor) and x.placements != (Replicate(),):
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return copy_in(_whole(x), axis)


def _whole(x: Any) -> Any:
    """A plain tensor of all tokens that every rank uses alike, so its gradient is the same everywhere."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])


def _plain(out: Any) -> Any:
    """What a model returns, as plain tensors: nobody outside has to know of the cut."""
    if isinstance(out, dict):  # transformers' outputs are dicts that also have attributes
        for key, value in out.items():
            out[key] = _plain(value)
        return out
    return type(out)(map(_plain, out)) if type(out) in (tuple, list) else _whole(out)


class PlannedStyle(ParallelStyle):
    """What all words have in common.

    Args:
        name: of the module in its model, for messages. sp: the residual is cut along its tokens.
        door: shared by all modules of a plan. recurse: parameters of nested modules are this style's too.
    """

    accepts: tuple[type[nn.Module], ...] = (nn.Module,)
    """Modules that this style can cut."""

    def __init__(self, name: str, sp: bool, door: Door, recurse: bool = True) -> None:
        super().__init__()
        self.name, self.sp, self.door, self.recurse = name, sp, door, recurse

    def check(self, module: nn.Module, tp: int) -> None:
        """Raises LayoutError when `module` cannot be cut over `tp` ranks."""

    def placement(self, name: str) -> Placement:
        """Where the parameter `name` is cut."""
        return Replicate()

    def gradient(self, name: str) -> Placement | None:
        """What the local gradient of the parameter `name` is; None: a piece, as the parameter."""
        return None

    def run(self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's forward on this rank; `inner` is its own."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.mesh, self.axis = device_mesh, Axis.of(device_mesh)
        self.check(module, device_mesh.size())
        for name in self.names(module):
            place(module, name, device_mesh, self.placement(name), src_data_rank=self.src_data_rank)
        inner = module.forward
        module.forward = wraps(inner)(partial(self.run, module, inner))
        return module

    def names(self, module: nn.Module) -> list[str]:
        """The parameters that are this style's, relative to `module`."""
        return [name for name, _ in module.named_parameters(recurse=self.recurse)]

    @contextmanager
    def plain_parameters(self, module: nn.Module, without: tuple[str, ...] = ()) -> Iterator[None]:
        """Inside, the module's parameters are this rank's plain pieces; those named in `without` are None."""
        stored: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name in self.names(module):
            owner_name, _, attribute = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            parameter = owner._parameters[attribute]
            if isinstance(parameter, DTensor):  # an outer module of this style may have done it already
                stored.append((owner, attribute, parameter))
                plain = None if name in without else self.piece(name, parameter)
                owner._parameters[attribute] = plain  # type: ignore[assignment]
        try:
            yield
        finally:
            for owner, attribute, parameter in stored:
                owner._parameters[attribute] = parameter

    def piece(self, name: str, parameter: Tensor) -> Tensor:
        """The plain piece of one parameter."""
        return local(parameter, self.gradient(name))

    def leave(self, partial_sum: Tensor) -> Tensor:
        """End a region: sum over the ranks; with sp each keeps its tokens."""
        self.door.close()
        if not self.sp:
            return reduce_out(partial_sum, self.axis)
        if partial_sum.ndim < 3:
            shape = tuple(partial_sum.shape)
            raise LayoutError(
                f"{self.name}: with sp it must give [B, S, E], got {shape}; drop sp, or keep the batch dimension."
            )
        summed = DTensor.from_local(partial_sum, self.mesh, [Partial()], run_check=False)
        return summed.redistribute(placements=[TOKENS])


def _must_divide(name: str, what: str, number: int, tp: int) -> None:
    if number % tp:
        raise LayoutError(
            f"{name}: {what}={number} does not divide by tp={tp}: each rank holds equally many. "
            f"Use tp in {_divisors(number)}."
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, min(number, 64) + 1) if number % d == 0]


class Colwise(PlannedStyle):
    """A linear layer cut along its output: each rank computes its features."""

    accepts = (nn.Linear,)

    def check(self, module: nn.Module, tp: int) -> None:
        _must_divide(self.name, "out_features", int(module.out_features), tp)  # type: ignore[arg-type]

    def placement(self, name: str) -> Placement:
        return Shard(0)

    def run(self, module: nn.Module, inner: Callable[..., Any], x: Tensor) -> Tensor:
        x = self.door.enter(x, self.axis)
        with self.plain_parameters(module):
            y: Tensor = inner(x)
        return y


class ColwiseGather(Colwise):
    """The same with the results of all ranks put together, for a head; its size need not divide."""

    def check(self, module: nn.Module, tp: int) -> None:
        pass

    def run(self, module: nn.Module, inner: Callable[..., Any], x: Tensor) -> Tensor:
        y = gather_last(super().run(module, inner, x), self.axis, int(module.out_features))  # type: ignore[arg-type]
        self.door.close()
        return y


class Rowwise(PlannedStyle):
    """A linear layer cut along its input: reads what a colwise layer gave; the sum ends the region."""

    accepts = (nn.Linear,)

    def check(self, module: nn.Module, tp: int) -> None:
        _must_divide(self.name, "in_features", int(module.in_features), tp)  # type: ignore[arg-type]

    def placement(self, name: str) -> Placement:
        return Shard(1) if name == "weight" else Replicate()

    def run(self, module: nn.Module, inner: Callable[..., Any], x: Tensor) -> Tensor:
        with self.plain_parameters(module, without=("bias",)):
            y = self.leave(inner(x))
        if module.bias is None:
            return y
        # Added once, after the sum. With sp both are DTensors, and the gradient is known to be partial.
        assert isinstance(module.bias, Tensor)
        return y + (module.bias if self.sp else local(module.bias, Replicate()))


class RowwiseEmbedding(PlannedStyle):
    """A token embedding cut along its vocabulary, which need not divide; other ranks' rows count as zero."""

    accepts = (nn.Embedding,)

    def check(self, module: nn.Module, tp: int) -> None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise LayoutError(f"{self.name}: max_norm, scale_grad_by_freq and sparse cannot be cut; use replicate.")

    def placement(self, name: str) -> Placement:
        return Shard(0)

    def run(self, module: nn.Module, inner: Callable[..., Any], ids: Tensor) -> Tensor:
        assert isinstance(module, nn.Embedding)
        start, stop = self.axis.chunk(module.num_embeddings)
        weight = local(module.weight)
        if start == stop:  # more ranks than rows: this one adds nothing, but its (empty) weight stays in the graph
            return self.leave(weight.new_zeros(*ids.shape, weight.shape[-1]) + weight.sum())
        here = (ids >= start) & (ids < stop)
        padding = module.padding_idx
        mine = padding - start if padding is not None and start <= padding < stop else None
        rows = F.embedding((ids - start).where(here, 0), weight, mine)
        return self.leave(rows * here.unsqueeze(-1).to(rows.dtype))


class OnEveryRank(PlannedStyle):
    """Parameters whole on every rank, and a look at whether their gradients are what the word says.

    A wrong word here gives a right loss and a wrong gradient, so the first backward pass compares the ranks.
    """

    same = True
    """Whether every rank is expected to find the same local gradient."""

    advice = ""

    def check(self, module: nn.Module, tp: int) -> None:
        self.seen: set[str] = set()

    def piece(self, name: str, parameter: Tensor) -> Tensor:
        plain = super().piece(name, parameter)
        if plain.requires_grad and name not in self.seen and not torch.compiler.is_compiling():
            plain.register_hook(partial(self.compare, name))
        return plain

    def compare(self, name: str, gradient: Tensor) -> None:
        """Raises LayoutError when the ranks' gradients are the same but should not be, or the other way round."""
        if name in self.seen:
            return
        wide = gradient.detach().double()
        mine = torch.stack([wide.norm(), wide.sum() / max(1, wide.numel()) ** 0.5])
        ranks = all_gather(mine.unsqueeze(0), self.axis)
        scale = ranks[:, 0].max()
        if not torch.isfinite(ranks).all() or scale == 0:
            return  # nothing to learn from
        self.seen.add(name)
        same = bool((ranks.amax(0) - ranks.amin(0)).max() <= 1e-3 * scale)
        if same != self.same:
            found = "the same" if same else "different"
            norms = ", ".join(f"{n:.4g}" for n in ranks[:, 0].tolist())
            raise LayoutError(
                f"{self.name}.{name}: the tp ranks found {found} gradients (norms {norms}): {self.advice}"
            )


class ReplicateStyle(OnEveryRank):
    """The module computes the same on every rank, from whole values."""

    advice = (
        "it works inside a region, on this rank's heads or features. Use the word 'partial', or 'copied' for a matrix "
        "that reads the whole input."
    )

    def gradient(self, name: str) -> Placement:
        return Replicate()

    def run(self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.recurse and self.sp:  # around modules that are cut: parameters of its own meet a DTensor residual
            out = inner(*args, **kwargs)
            return out if self.name else _plain(out)
        if not self.recurse:
            with self.plain_parameters(module):
                return inner(*args, **kwargs)
        given = (*args, *kwargs.values())
        residual = self.sp and (isinstance(module, nn.Embedding) or any(isinstance(value, DTensor) for value in given))
        with self.plain_parameters(module):
            out = inner(*map(_whole, args), **{name: _whole(value) for name, value in kwargs.items()})
        if self.name and residual and isinstance(out, Tensor):
            return DTensor.from_local(out, self.mesh, [Replicate()], run_check=False)
        return out


class PartialStyle(OnEveryRank):
    """Parameters whole on every rank, used inside a region on this rank's heads or features (a norm of queries)."""

    same = False
    advice = "it computes the same everywhere. Use the word 'replicate'."

    def gradient(self, name: str) -> Placement:
        return Partial()

    def run(self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.plain_parameters(module):
            return inner(*args, **kwargs)


class Copied(PartialStyle):
    """A linear layer whole on every rank that begins a region: the one key or value head that all queries read."""

    accepts = (nn.Linear,)

    def run(self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        return super().run(module, inner, self.door.enter(x, self.axis), **kwargs)


class Sequence(PlannedStyle):
    """A module that treats every token by itself, on this rank's tokens: norms, with sp."""

    def gradient(self, name: str) -> Placement:
        return Partial()

    def run(self, module: nn.Module, inner: Callable[..., Any], x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            raise LayoutError(
                f"{self.name}: with sp a 'sequence' module reads the residual, which the embedding cuts along its "
                "tokens; give the embedding the word 'rowwise_embedding', and no 'sequence' to modules inside a region."
            )
        x = x.redistribute(placements=[TOKENS])
        with self.plain_parameters(module):
            y: Tensor = inner(x.to_local())
        if y.shape != x.to_local().shape:
            raise LayoutError(
                f"{self.name}: 'sequence' needs a module that keeps its input's shape, not {tuple(y.shape)}."
            )
        return DTensor.from_local(
            y.contiguous(), self.mesh, [TOKENS], run_check=False, shape=x.shape, stride=x.stride()
        )
