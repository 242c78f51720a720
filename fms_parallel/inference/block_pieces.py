"""A block's forward for a few tokens as compiled pieces: all that lies between its attention and its sums over ranks.

    norm, query key value, rotation | attention | output | sum | add, norm, gate and up, their product, down | sum | add
    `------------ compiled -------' |   eager   | compiled     `------------------ compiled ------------------'

A decoding step computes little, so the small operations between products cost as much as a fifth of it. They are not
written again here: the block's own forward is traced once, what it asks of its cache and of other ranks stays a call,
and the rest goes to torch's compiler. Blocks of one shape share the compiled pieces, and bring their own parameters.

It knows blocks that are called as `block(x, sequences)`; it knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fms_parallel import compat
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.distributed.collectives import Means, all_reduce
from fms_parallel.errors import ConfigError
from fms_parallel.inference.compiled import Operands, products
from fms_parallel.inference.graphs import Function, Graphs
from fms_parallel.modules.linear import Multiplies, Product
from fms_parallel.modules.sequences import RaggedStore, Sequences
from fms_parallel.modules.tp import TPModule

Call = Callable[[RaggedStore, Sequence[Tensor]], Tensor]
"""Something that a block asks for in its midst, of the store at hand and of tensors."""


# ---- what a trace puts where a call was -----------------------------------------------------------------------------


@torch.library.custom_op("fms_parallel::attends", mutates_args=())
def _attends(q: Tensor, k: Tensor, v: Tensor, call: int) -> Tensor:
    """Stands for attention: another number for every change of what is given."""
    return q * 0.5 + (k - 2 * v).mean(2, keepdim=True)


@torch.library.custom_op("fms_parallel::sums", mutates_args=())
def _sums(x: Tensor, call: int) -> Tensor:
    """Stands for a sum over ranks."""
    return x * 1.5


_STAND_INS = (torch.ops.fms_parallel.attends.default, torch.ops.fms_parallel.sums.default)


class _Listener:
    """A store that notes what a block asks of it and of other ranks, and answers with a stand-in."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """See `RaggedStore`."""
        self.calls.append(lambda store, qkv: store.attend(layer, qkv[0], qkv[1], qkv[2], scale, window))
        return _attends(q, k, v, len(self.calls) - 1)  # type: ignore[no-any-return]

    def means_of(self, module: TPModule) -> Means:
        """How a twin talks while it is listened to."""

        def sum_over_ranks(x: Tensor, group: object) -> None:
            self.calls.append(lambda store, x: all_reduce(x[0], module.axis))
            x.copy_(_sums(x, len(self.calls) - 1))

        return Means(sum_over_ranks, _refuse, _refuse, _refuse)


def _refuse(*_: object) -> NoReturn:
    raise ConfigError("only sums over ranks are made between compiled pieces.")


@contextmanager
def listened(block: nn.Module) -> Iterator[_Listener]:
    """The block in eval mode, with stand-ins for other ranks; afterwards its modules are as they were."""
    listener, before = _Listener(), [(module, dict(module.__dict__)) for module in block.modules()]
    try:
        block.eval()
        for module in block.modules():
            if isinstance(module, TPModule) and module.axis.size > 1:
                module.axis = replace(module.axis, own_means=listener.means_of(module))
        yield listener
    finally:
        for module, state in before:
            for name in ("training", "axis", "fast"):
                if name in state:
                    module.__dict__[name] = state[name]
                else:
                    module.__dict__.pop(name, None)


@dataclass
class _Matrices:
    """The matrices of a block that have kernels of this library for so many rows, as inputs of its trace."""

    groups: list[tuple[Multiplies, str, Operands]]

    @classmethod
    def of(cls, block: nn.Module, x: Tensor) -> _Matrices:
        """Those that there are; what else multiplies is traced as it is."""
        found = []
        for module in block.modules():
            for name in module.groups() if isinstance(module, Multiplies) else ():
                operands = Operands.of(module.matrices(name, x), x.shape[1])  # type: ignore[union-attr, operator]
                if operands is not None:
                    found.append((module, name, operands))
        return cls(found)  # type: ignore[arg-type]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, flat."""
        return [tensor for *_, operands in self.groups for tensor in operands.tensors]

    def install(self, tensors: Sequence[Tensor]) -> None:
        """Multiply by these in the place of `tensors`."""
        given = iter(tensors)
        for module, name, operands in self.groups:
            mine = [next(given) for _ in operands.tensors]
            module.fast = {**module.fast, name: _product(operands, mine)}


def _product(operands: Operands, tensors: Sequence[Tensor]) -> Product:
    def product(x: Tensor) -> tuple[Tensor, ...]:
        found = products(x.reshape(-1, x.shape[-1]), operands.form, tensors)
        return tuple(y.view(*x.shape[:-1], -1) for y in found)

    return product


# ---- one block, for so many tokens ---------------------------------------------------------------------------------


class Pieces:
    """Compiled pieces made so far: blocks of one shape share them.

    Args:
        graphs: what launches the kernels of a piece at once, on a GPU (None: wherever there is one).
    """

    def __init__(self, graphs: Graphs | None = None) -> None:
        self._made: dict[Any, Function] = {}
        self._graphs, self._always = graphs or Graphs(), graphs is not None

    def of(self, graph: GraphModule, given: Sequence[Tensor]) -> Function:
        """The piece that computes `graph` for tensors like these. Raises ConfigError: the compiler cannot."""
        key = (graph.code, *((t.dtype, t.device, t.shape, t.stride()) for t in given))
        if key not in self._made:
            try:
                self._made[key] = compat.compile_traced(graph, given)
            except Exception as error:  # anything, from a compiler
                said = str(error).strip().splitlines() or [""]
                raise ConfigError(f"cannot be compiled: {type(error).__name__}: {said[0]}") from error
        return self._made[key]

    def launched(self, piece: Function, given: Sequence[Tensor], held: Sequence[Tensor]) -> Function:
        """A piece for a block that brings `held` to every call."""
        return self._graphs.of(piece, given, held) if self._always or given[0].is_cuda else piece


class _Piece:
    """A part of a traced block: compiled for what it is first given. `held`: what the block brings to every call."""

    def __init__(self, graph: GraphModule, pieces: Pieces, held: Sequence[Tensor]) -> None:
        self._graph, self._pieces, self._held = graph, pieces, held
        self._made: Function | None = None

    def __call__(self, *given: Tensor) -> Any:
        if self._made is None:
            self._made = self._pieces.launched(self._pieces.of(self._graph, given), given, self._held)
        return self._made(*given)


class CompiledBlock:
    """A block's forward for N tokens: `(x [1, N, E], rope, store) -> [1, N, E]`. One forward at a time.

    Raises:
        ConfigError: the block cannot be traced, for the reason given.
    """

    def __init__(self, block: nn.Module, x: Tensor, seq: Sequences, pieces: Pieces) -> None:
        held = [local_tensor(parameter) for parameter in block.parameters()]
        self._watched = [tensor for tensor in held if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._watched]
        matrices = _Matrices.of(block, x)
        with listened(block) as listener:
            graph = _traced(block, x, replace(seq, cache=listener), matrices)
        _check(graph)
        self._calls, self._store = listener.calls, cast(RaggedStore, listener)
        self._constants = [*matrices.tensors, *_constants_as_inputs(graph)]
        own = {tensor.untyped_storage().data_ptr() for tensor in held}
        self.extra_bytes = sum(t.nbytes for t in matrices.tensors if t.untyped_storage().data_ptr() not in own)
        self._run = self._split(graph, pieces)

    def __call__(self, x: Tensor, rope: Sequence[Tensor], store: RaggedStore) -> Tensor:
        for tensor, version in zip(self._watched, self._versions, strict=True):
            if tensor._version != version:
                raise ConfigError("a weight has changed since prepare_for_decode: undo() it, and prepare again.")
        self._store = store
        return self._run(x, *rope, *self._constants)  # type: ignore[no-any-return]

    def _split(self, graph: GraphModule, pieces: Pieces) -> GraphModule:
        """Stand-ins become calls; what lies between them, pieces."""
        part = {}
        number = 0
        for node in graph.graph.nodes:
            stands = node.target in _STAND_INS
            number += stands
            part[node] = number
            number += stands
            if stands:
                _forget_copy(node)
                *tensors, call = node.args
                node.target, node.args = _named(self._called, call), tuple(tensors)
        graph.recompile()
        split = compat.split_traced(graph, lambda node: part[node])
        for name, child in list(split.named_children()):
            if not any(getattr(node.target, "is_call", False) for node in child.graph.nodes):  # type: ignore[union-attr]
                delattr(split, name)
                split.__dict__[name] = _Piece(child, pieces, self._constants)  # type: ignore[arg-type]
        return split

    def _called(self, call: int, *tensors: Tensor) -> Tensor:
        return self._calls[call](self._store, tensors).contiguous()


def _forget_copy(node: Node) -> None:
    """A sum takes the place of what was summed: whatever reads that, copied into, reads the sum."""
    for user in [user for user in node.users if user.target is torch.ops.aten.copy_.default]:
        user.replace_all_uses_with(node)
        user.graph.erase_node(user)


def _named(called: Callable[..., Tensor], call: int) -> Callable[..., Tensor]:
    """A function that a graph can hold."""

    def asked(*tensors: Tensor) -> Tensor:
        return called(call, *tensors)

    asked.is_call = True  # type: ignore[attr-defined]
    return asked


def _traced(block: nn.Module, x: Tensor, seq: Sequences, matrices: _Matrices) -> GraphModule:
    forward, rope = type(block).forward, seq.rope or ()

    def whole(x: Tensor, *given: Tensor) -> Tensor:
        matrices.install(given[len(rope) :])
        return forward(block, x, replace(seq, rope=given[: len(rope)] or None))  # type: ignore[arg-type, no-any-return]

    try:
        return compat.trace(whole, [x, *rope, *matrices.tensors])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{type(block).__name__} cannot be traced: {type(error).__name__}: {error}") from error


_TAGS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded)


def _check(graph: GraphModule) -> None:
    """Raises ConfigError when the graph would not be the same for other numbers."""
    for node in graph.graph.nodes:
        if any(tag in getattr(node.target, "tags", ()) for tag in _TAGS):
            raise ConfigError(f"what {node.target} gives depends on the numbers at hand.")


def _constants_as_inputs(graph: GraphModule) -> list[Tensor]:
    """Make every tensor that the graph holds an input, in place; returns them."""
    nodes = graph.graph.nodes
    last = [node for node in nodes if node.op == "placeholder"][-1]
    found: dict[str, Node] = {}
    for node in [node for node in nodes if node.op == "get_attr"]:
        if node.target not in found:
            with graph.graph.inserting_after(last):
                last = found[node.target] = graph.graph.placeholder(f"held_{len(found)}")
        node.replace_all_uses_with(found[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return [getattr(graph, name).detach() for name in found]
