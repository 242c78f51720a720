"""What a model computes, as a graph of operations: costs of its blocks, and which parameter is which node.

One forward runs on fake tensors (shapes without memory) and is written down as an FX graph of the operations that the
model's code calls (`linear`, `scaled_dot_product_attention`, ...), not of what they decompose into. It is the level
that `torch.export` shows, made by the tracer that is under it: a graph of one example, never run, so nothing of a model
has to be exportable. It knows modules by name and operations by shape; what may be cut is in `flow.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fms_parallel import compat
from fms_parallel.auto.blocks import find_blocks, hooked
from fms_parallel.auto.record import without_eager_experts
from fms_parallel.errors import LayoutError


@dataclass(frozen=True)
class Traced:
    """One forward.

    Attributes:
        nodes: operations in the order in which they ran, inputs first; `node.meta["val"]` is a fake result.
        parameters: node -> first name of the parameter that it stands for.
        places: node -> names of the modules that were running, outermost first.
    """

    nodes: tuple[fx.Node, ...]
    parameters: dict[fx.Node, str]
    places: dict[fx.Node, tuple[str, ...]]


@dataclass(frozen=True)
class PartCost:
    """What one block, or everything outside blocks, costs in a forward.

    Attributes:
        flops: of its matrix products, attention and convolutions (a multiply and an add are two).
        bytes_read, bytes_written: by its operations, each by itself; views move nothing.
        parameter_bytes: of the parameters that it reads. entering, leaving: bytes of the activations that cross its
            boundary, each tensor once.
    """

    name: str
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    parameter_bytes: int = 0
    entering: int = 0
    leaving: int = 0


@dataclass(frozen=True)
class Analysis:
    """A model's forward: its blocks in order, what is outside of them (`""`), and the graph."""

    blocks: tuple[PartCost, ...]
    outside: PartCost
    traced: Traced

    @property
    def flops(self) -> int:
        """Of the whole forward."""
        return self.outside.flops + sum(block.flops for block in self.blocks)


# ---- the graph --------------------------------------------------------------------------------------------------


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    numbers: Mapping[tuple[str, str], int] | None = None,
) -> Traced:
    """The graph of `model(**inputs)` in evaluation mode. Nothing of the model is changed or read but shapes.

    Args:
        model: on the meta device or anywhere. inputs: tensors, of which shape and dtype count, or constants.
        shapes: parameter -> the shape to run with instead of its own.
        numbers: (module, attribute) -> the number to run with instead of its own.
    Raises:
        LayoutError: the forward needs the values of tensors, or fails.
    """
    places: list[tuple[Any, tuple[str, ...]]] = []
    with (
        compat.unreal_tensors(),
        without_eager_experts(model),
        torch.no_grad(),
        _evaluating(model),
        _numbers(model, numbers or {}),
    ):
        given = {name: _fake(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        state, names = _fake_state(model, shapes or {})
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}

        def run(state: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
            out = torch.func.functional_call(model, state, (), {**given, **tensors}, tie_weights=False)
            return [leaf for leaf in compat.flatten_tree(out)[0] if isinstance(leaf, Tensor)]

        with _watched(model, places):
            try:
                graph = compat.trace_operations(run, state, tensors)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
                raise LayoutError(
                    f"{type(model).__name__}: the example batch does not run through it on shapes alone "
                    f"({type(error).__name__}: {error}), so its graph is not known."
                ) from error
    nodes = tuple(graph.nodes)
    holders = [node for node in nodes if node.op == "placeholder"]
    parameters = {node: names[key] for node, key in zip(holders, state, strict=False) if key in names}
    return Traced(nodes, parameters, _places(nodes, places))


def _fake_state(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Fake parameters and buffers, tied ones one tensor; and for those that are parameters their first name."""
    state: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    made: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = shapes.get(first.setdefault(id(parameter), name))
        state[name] = made.setdefault(id(parameter), _fake(parameter, shape))
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state[name] = made.setdefault(id(buffer), _fake(buffer))
    return state, names


def _fake(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """On the CPU, of this shape: called where tensors have no memory."""
    return torch.empty(tensor.shape if shape is None else shape, dtype=tensor.dtype)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: nothing is dropped or skipped at random."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _numbers(model: nn.Module, numbers: Mapping[tuple[str, str], int]) -> Iterator[None]:
    before = {key: getattr(model.get_submodule(key[0]), key[1]) for key in numbers}
    try:
        for (name, attribute), number in numbers.items():
            setattr(model.get_submodule(name), attribute, number)
        yield
    finally:
        for (name, attribute), number in before.items():
            setattr(model.get_submodule(name), attribute, number)


@contextlib.contextmanager
def _watched(model: nn.Module, places: list[tuple[Any, tuple[str, ...]]]) -> Iterator[None]:
    """Notes into `places` behind which node which modules were running."""
    names = {id(module): name for name, module in model.named_modules()}
    running: list[str] = []

    def note() -> None:
        places.append((compat.traced_so_far(), tuple(running)))

    def opened(module: nn.Module, args: Any) -> None:
        running.append(names[id(module)])
        note()

    def closed(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()
        note()

    with hooked(model, opened, closed):
        yield


def _places(nodes: tuple[fx.Node, ...], marks: list[tuple[Any, tuple[str, ...]]]) -> dict[fx.Node, tuple[str, ...]]:
    """Which modules were running when a node was made. Marks are at nodes of the tracer's own graph, of which the
    result is a copy without what nobody reads: names are the same."""
    starts = {newest.name: running for newest, running in marks if newest is not None}
    running: tuple[str, ...] = ()
    by_name: dict[str, tuple[str, ...]] = {}
    for node in next((newest.graph.nodes for newest, _ in marks if newest is not None), ()):
        by_name[node.name] = running
        running = starts.get(node.name, running)
    return {node: by_name.get(node.name, ()) if node.op == "call_function" else () for node in nodes}


# ---- costs ------------------------------------------------------------------------------------------------------


def operation(node: fx.Node) -> str:
    """The name of an operation without overload and without the mark of working in place; `""` for none."""
    if node.op != "call_function" or not hasattr(node.target, "overloadpacket"):
        return "getitem" if getattr(node.target, "__name__", "") == "getitem" else ""
    name = str(node.target.overloadpacket).rpartition(".")[2]
    return name if name.startswith("__") else name.removesuffix("_")


def shape_of(node: Any) -> tuple[int, ...]:
    """Of the tensor that a node gives; `()` for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def tensors_of(node: fx.Node) -> list[Tensor]:
    """What a node gives, as a list."""
    return [leaf for leaf in compat.flatten_tree(node.meta.get("val"))[0] if isinstance(leaf, Tensor)]


def _contracted(node: fx.Node) -> int:
    first = node.args[1] if operation(node) in ("addmm", "baddbmm") else node.args[0]
    return 2 * math.prod(shape_of(node)) * shape_of(first)[-1]


def _attention(node: fx.Node) -> int:
    queries, keys, values = (shape_of(arg) for arg in node.args[:3])
    return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def _convolved(node: fx.Node) -> int:
    weight = shape_of(node.args[1])
    return 2 * math.prod(shape_of(node)) * math.prod(weight[1:])


FLOPS: dict[str, Callable[[fx.Node], int]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"), _contracted),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolved),
}
"""Operation -> floating-point operations of one call. Everything else counts as none."""


def words_of(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


VIEWS = words_of(
    "view reshape transpose permute unsqueeze squeeze expand slice select split chunk getitem t alias detach flatten "
    "unflatten lift_fresh_copy to contiguous _unsafe_view dropout"
)
"""Operations that as a rule move no bytes (dropout does nothing in evaluation, `to` where the dtype is right)."""


def analyse(model: nn.Module, example: Mapping[str, Any]) -> Analysis:
    """Costs of a model's repeated blocks, from the graph of one forward.

    Args:
        example: what the forward is given: tensors `[B, ...]` or constants. Costs are those of this batch.
    Raises:
        LayoutError: no repeated blocks, or the forward needs values.
    """
    blocks = find_blocks(model)
    traced = trace(model, example)
    part_of = {node: _innermost(place, set(blocks)) for node, place in traced.places.items()}
    costs = [_cost(name, traced, part_of) for name in ("", *blocks)]
    return Analysis(tuple(costs[1:]), costs[0], traced)


def _innermost(place: tuple[str, ...], blocks: set[str]) -> str:
    return next((name for name in place if name in blocks), "")


def _cost(name: str, traced: Traced, part_of: Mapping[fx.Node, str]) -> PartCost:
    flops = read = written = 0
    parameters: set[fx.Node] = set()
    entering: set[fx.Node] = set()
    leaving: set[fx.Node] = set()
    for node in traced.nodes:
        if part_of[node] != name or node.op != "call_function":
            continue
        sources = [source for source in node.all_input_nodes if tensors_of(source)]
        parameters |= {source for source in sources if source in traced.parameters}
        entering |= {s for s in sources if part_of[s] != name and s not in traced.parameters and s.op != "get_attr"}
        if any(part_of[user] != name or user.op == "output" for user in node.users):
            leaving.add(node)
        flops += FLOPS[operation(node)](node) if operation(node) in FLOPS else 0
        if operation(node) not in VIEWS:
            read += sum(map(_bytes, sources))
            written += _bytes(node)
    return PartCost(name, flops, read, written, *(sum(map(_bytes, group)) for group in (parameters, entering, leaving)))


def _bytes(node: fx.Node) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(node))
