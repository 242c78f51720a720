"""Blocks for a few tokens as compiled pieces: all that lies between their attentions and their sums over ranks.

    norm, query key value, rotation | attention | output, add, norm, ... down, add; norm, query ... | attention | output
    `----- compiled: block 0 -----' |           | `--------------- compiled: blocks 0 and 1 ------' |           | `-- ..

A decoding step computes little, so the small operations between products cost as much as a fifth of it. They are not
written again here: the blocks' own forwards are traced once, what they ask of their cache and of other ranks stays a
call, and the rest goes to torch's compiler, from one call to the next whichever block it is of. Pieces that compute the
same are compiled once, and given the parameters of their place.

It knows blocks that are called as `block(x, sequences)`; it knows no model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fms_parallel import compat
from fms_parallel.distributed.collectives import Means, all_reduce
from fms_parallel.errors import ConfigError
from fms_parallel.inference.compiled import Operands, products
from fms_parallel.inference.graphs import Function, Graphs
from fms_parallel.inference.one_query import Attentions, OneQuery, stretches_of
from fms_parallel.inference.watched import Watched
from fms_parallel.modules.linear import Multiplies, Product
from fms_parallel.modules.sequences import RaggedStore, Sequences
from fms_parallel.modules.tp import TPModule


@dataclass(frozen=True)
class Attention:
    """What a block asks of its store.

    Attributes:
        layer, scale, window: as of `RaggedStore`. heads: H, K and D.
        kernel: what does it where every row lies in one stretch of memory.
    """

    layer: int
    scale: float | None
    window: int | None
    heads: tuple[int, int, int]
    kernel: OneQuery | None = None

    def __call__(self, store: RaggedStore, qkv: Sequence[Tensor]) -> Tensor:
        """`q [1, N, H, D]`, `k, v [1, N, K, D]` -> `[1, N, H, D]`."""
        stretches = self.kernel and stretches_of(store, self.layer, qkv[1], self.window)
        if not stretches:
            return store.attend(self.layer, qkv[0], qkv[1], qkv[2], self.scale, self.window)
        return self.kernel(qkv[0], qkv[1], qkv[2], stretches)  # type: ignore[misc]


@dataclass(frozen=True)
class SumOverRanks:
    """What a block asks of other ranks."""

    module: TPModule

    def __call__(self, store: RaggedStore, given: Sequence[Tensor]) -> Tensor:
        """A tensor, in place."""
        return all_reduce(given[0], self.module.axis)


Call = Attention | SumOverRanks


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
        self.calls.append(Attention(layer, scale, window, (q.shape[2], k.shape[2], q.shape[3])))
        return _attends(q, k, v, len(self.calls) - 1)  # type: ignore[no-any-return]

    def means_of(self, module: TPModule) -> Means:
        """How a twin talks while it is listened to."""

        def sum_over_ranks(x: Tensor, group: object) -> None:
            self.calls.append(SumOverRanks(module))
            x.copy_(_sums(x, len(self.calls) - 1))

        return Means(sum_over_ranks, _refuse, _refuse, _refuse)


def _refuse(*_: object) -> NoReturn:
    raise ConfigError("only sums over ranks are made between compiled pieces.")


@contextmanager
def listened(blocks: Iterable[nn.Module]) -> Iterator[_Listener]:
    """The blocks in eval mode, with stand-ins for other ranks; afterwards their modules are as they were."""
    listener = _Listener()
    before = [(module, dict(module.__dict__)) for block in blocks for module in block.modules()]
    try:
        for module, _ in before:
            module.training = False
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
    """The matrices of blocks that have kernels of this library for so many rows, as inputs of their trace."""

    groups: list[tuple[Multiplies, str, Operands]]

    @classmethod
    def of(cls, blocks: Iterable[nn.Module], x: Tensor) -> _Matrices:
        """Those that there are; what else multiplies is traced as it is."""
        found = []
        for module in (module for block in blocks for module in block.modules()):
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


# ---- blocks, for so many tokens -------------------------------------------------------------------------------------


class Pieces:
    """Compiled pieces made so far: what computes the same is one.

    Args:
        graphs: what launches the kernels of a piece at once, on a GPU (None: wherever there is one).
    """

    def __init__(self, graphs: Graphs | None = None) -> None:
        self._made: dict[Any, Function] = {}
        self._graphs, self._always = graphs or Graphs(), graphs is not None
        self.alone = threading.Lock()  # pieces share memory on a GPU, and blocks know one store at a time

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


class CompiledBlocks:
    """The forward of some consecutive blocks for N tokens. One at a time.

    Args:
        x, seq: activations `[1, N, E]` and what the blocks are told, as examples.
        attentions: kernels for their queries, where there are any.
    Raises:
        ConfigError: the blocks cannot be traced, for the reason given.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], x: Tensor, seq: Sequences, pieces: Pieces, attentions: Attentions
    ) -> None:
        self._watched = Watched(blocks)
        matrices = _Matrices.of(blocks, x)
        with listened(blocks) as listener:
            graph = _traced(blocks, x, replace(seq, cache=listener), matrices)
        _check(graph)
        self._calls = [_with_kernel(call, attentions, x) for call in listener.calls]
        self._store = cast(RaggedStore, listener)
        self._constants = [*matrices.tensors, *_constants_as_inputs(graph)]
        own = {tensor.untyped_storage().data_ptr() for tensor in self._watched.tensors}
        self.extra_bytes = sum(t.nbytes for t in matrices.tensors if t.untyped_storage().data_ptr() not in own)
        self._alone = pieces.alone
        self._run = self._split(graph, pieces)

    def __call__(self, x: Tensor, rope: Sequence[Tensor], store: RaggedStore) -> Tensor:
        """`[1, N, E]` -> `[1, N, E]`. From any thread: others wait."""
        with self._alone:
            made = self.steps(x, rope, store)[-1]
            return made.clone() if made.is_cuda else made  # a graph's next call, of another thread, writes there

    def steps(self, x: Tensor, rope: Sequence[Tensor], store: RaggedStore) -> tuple[Tensor, ...]:
        """What each block makes."""
        if self._watched.changed():
            raise ConfigError("a weight has changed since prepare_for_decode: undo() it, and prepare again.")
        self._store = store
        return self._run.forward(x, *rope, *self._constants)  # type: ignore[no-any-return]

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
            delattr(split, name)
            split.__dict__[name] = _call_alone(child) or _Piece(_numbered(child), pieces, self._constants)  # type: ignore[arg-type]
        return split

    def _called(self, call: int, *tensors: Tensor) -> Tensor:
        return self._calls[call](self._store, tensors).contiguous()


def _with_kernel(call: Call, attentions: Attentions, x: Tensor) -> Call:
    if isinstance(call, SumOverRanks):
        return call
    return replace(call, kernel=attentions.of(call.heads, x, call.scale))


def _numbered(graph: GraphModule) -> GraphModule:
    """The same with values named by number, so that what computes the same reads the same."""
    found: dict[Node, Node] = {}
    new = Graph()
    for number, node in enumerate(graph.graph.nodes):
        args, kwargs = map_arg((node.args, node.kwargs), found.__getitem__)
        target = f"v{number}" if node.op == "placeholder" else node.target
        found[node] = new.create_node(node.op, target, args, kwargs, f"v{number}")
    return GraphModule(graph, new)


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


def _call_alone(graph: GraphModule) -> Callable[..., Tensor] | None:
    """The call that a part consists of, given what the part is given; None where it is a piece."""
    *given, call, _ = graph.graph.nodes
    if not getattr(call.target, "is_call", False):
        return None
    assert list(call.args) == given, "a call is given what it asks for"
    return call.target  # type: ignore[return-value]


def _traced(blocks: Sequence[nn.Module], x: Tensor, seq: Sequences, matrices: _Matrices) -> GraphModule:
    rope = seq.rope or ()

    def whole(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        matrices.install(given[len(rope) :])
        told, steps = replace(seq, rope=given[: len(rope)] or None), [x]  # type: ignore[arg-type]
        for block in blocks:
            steps.append(type(block).forward(block, steps[-1], told))  # type: ignore[arg-type]
        return tuple(steps[1:])

    try:
        return compat.trace(whole, [x, *rope, *matrices.tensors])
    except ConfigError:
        raise
    except Exception as error:
        names = " and ".join(sorted({type(block).__name__ for block in blocks}))
        raise ConfigError(f"{names} cannot be traced: {type(error).__name__}: {error}") from error


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
