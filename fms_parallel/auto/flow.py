"""How a cut of one dimension runs through a graph of operations, and where it ends.

Seeds are matrices cut along their outputs. Behind them every value that is made from a cut one is cut too, along one
of its dimensions, or nothing is known about it and the seeds are refused. The cut ends in matrices that contract over
it: those are cut along their inputs, and the sum over the ranks is whole again.

    x [B,S,E] -linear-> [B,S,E/] -view-> [B,S,H/,D] -transpose-> [B,H/,S,D] -attention-> ... -view-> [B,S,E/] -linear->

A cut dimension may consist of parts (query, key and value beside each other): each rank holds its share of each part.
It knows operations and shapes; it knows no modules. Rules are a table, and an operation that is not in it refuses:
missing a cut costs speed, a wrong one would cost the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fms_parallel.auto.graph import Traced, operation, shape_of


@dataclass(frozen=True)
class Cut:
    """A value is cut along `dim`, each of the `parts` that lie there one after the other by itself."""

    dim: int
    parts: tuple[int, ...]
    seed: fx.Node


class Blocked(Exception):
    """The seeds cannot be cut: why."""


class HeadsBlocked(Blocked):
    """The only reason is that tp does not divide the number of heads."""


class Wanted(Exception):
    """`node` must be cut along with the seeds."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


class Packed(Exception):
    """The output of `seed` has these parts."""

    def __init__(self, seed: fx.Node, parts: tuple[int, ...]) -> None:
        super().__init__(seed.name)
        self.seed, self.parts = seed, parts


MATRICES = ("linear", "addmm", "matmul", "mm")


def weight_of(node: fx.Node, traced: Traced) -> fx.Node | None:
    """The parameter of a matrix product or a lookup, if the node is one of an untransposed parameter."""
    place = {"linear": 1, "addmm": 2, "matmul": 1, "mm": 1, "embedding": 0}.get(operation(node))
    found = node.args[place] if place is not None else None
    if not isinstance(found, fx.Node) or found not in traced.parameters or len(shape_of(found)) != 2:
        return None
    return found


def input_of(node: fx.Node) -> fx.Node:
    """What a matrix is multiplied with."""
    found = node.args[1 if operation(node) == "addmm" else 0]
    assert isinstance(found, fx.Node)
    return found


@dataclass(frozen=True)
class Facts:
    """What holds of a node whatever is cut.

    Attributes:
        uniform: dimensions along which the value is the same. parameters: those that it is made from.
        plain: made from nothing but parameters and constants, without a matrix or a lookup.
    """

    uniform: frozenset[int]
    parameters: frozenset[fx.Node]
    plain: bool


FILLS = frozenset("zeros ones full zeros_like ones_like full_like new_ones new_zeros new_full empty".split())
_KEEPING = frozenset("to contiguous clone detach alias lift_fresh_copy dropout".split())


def facts_of(traced: Traced) -> dict[fx.Node, Facts]:
    """Of every node of a graph."""
    found: dict[fx.Node, Facts] = {}
    for node in traced.nodes:
        sources = [found[source] for source in node.all_input_nodes if source in found]
        parameters = frozenset([node]) if node in traced.parameters else frozenset()
        parameters = parameters.union(*(source.parameters for source in sources))
        plain = node in traced.parameters or node.op == "get_attr" or (bool(sources) and all(s.plain for s in sources))
        if operation(node) in (*MATRICES, "embedding", "scaled_dot_product_attention"):
            plain = False
        found[node] = Facts(_uniform(node, found), parameters, plain)
    return found


def _uniform(node: fx.Node, found: dict[fx.Node, Facts]) -> frozenset[int]:
    shape, name = shape_of(node), operation(node)
    every = frozenset(range(len(shape)))
    if name in FILLS:
        return every
    if name == "expand" and isinstance(node.args[0], fx.Node):
        before = shape_of(node.args[0])
        shift = len(shape) - len(before)
        return frozenset(d for d in every if d < shift or (before[d - shift] == 1 and shape[d] > 1))
    if name not in ELEMENTWISE and name not in _KEEPING:
        return frozenset()
    kept = every
    for source in node.all_input_nodes:
        before = shape_of(source)
        shift = len(shape) - len(before)
        of_source = found[source].uniform
        kept &= {d for d in every if d < shift or before[d - shift] == 1 or d - shift in of_source}
    return kept


class Flow:
    """One try: which values are cut when these matrices are.

    Attributes:
        cuts: node -> its cut, for a node with several results a list. rows: matrices that contract over the cut.
        partial: parameters that whole ranks use on their share. inside: all nodes with a cut.
    """

    def __init__(self, traced: Traced, facts: dict[fx.Node, Facts], tp: int, seeds: dict[fx.Node, tuple[int, ...]]):
        self.traced, self.facts, self.tp, self.seeds = traced, facts, tp, seeds
        self.cuts: dict[fx.Node, Any] = {}
        self.rows: list[fx.Node] = []
        self.partial: set[fx.Node] = set()

    def run(self) -> Flow:
        """Follow the seeds.

        Raises:
            Blocked: a value cannot be cut. Wanted, Packed: not with these seeds alone.
        """
        for node in self.traced.nodes:
            if node in self.seeds:
                self._seed(node)
            elif any(source in self.cuts for source in node.all_input_nodes):
                self._step(node)
        return self

    def _seed(self, node: fx.Node) -> None:
        if any(source in self.cuts for source in node.all_input_nodes):
            raise Blocked(f"{node.name} reads what is cut already")
        last = len(shape_of(node)) - 1
        self.cuts[node] = self._checked(node, Cut(last, self.seeds[node], node))

    def _step(self, node: fx.Node) -> None:
        if node.op == "output":
            raise Blocked("what is cut leaves the model")
        name = operation(node)
        rule = RULES.get(name)
        if rule is None:
            raise Blocked(f"nobody knows what {name or node.target} does to a cut")
        cut = rule(self, node)
        if cut is None:
            return
        if str(node.target).partition(".default")[0].endswith("_") and cut != self.cut(node.args[0]):
            raise Blocked(f"{name} writes a cut value into one that is not")
        self.cuts[node] = [self._checked(node, c, at) for at, c in enumerate(cut)] if isinstance(cut, list) else (
            self._checked(node, cut)
        )

    def _checked(self, node: fx.Node, cut: Cut, at: int | None = None) -> Cut:
        if any(part % self.tp for part in cut.parts):
            raise Blocked(f"tp={self.tp} does not divide {' + '.join(map(str, cut.parts))} ({node.name})")
        return cut

    # ---- what rules ask -------------------------------------------------------------------------------------------

    def cut(self, value: Any) -> Cut | None:
        """The cut of an argument."""
        found = self.cuts.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, Cut) else None

    def aligned(self, node: fx.Node, sources: Sequence[Any], ignore: int = 0) -> Cut:
        """The common cut of operands that are broadcast against each other, counted from the right.

        Args:
            ignore: of the last dimensions, in which operands may differ.
        """
        rank = len(shape_of(node))
        operands = [source for source in sources if isinstance(source, fx.Node)]
        known = [(cut, cut.dim - len(shape_of(s))) for s in operands if (cut := self.cut(s)) is not None]
        cut, back = known[0]
        for other, its_back in known:
            if its_back != back or other.parts != cut.parts:
                raise Blocked(f"{node.name} joins values that are cut differently")
        for source in operands:
            if self.cut(source) is None:
                self.meets(source, len(shape_of(source)) + back, sum(cut.parts))
        return replace(cut, dim=rank + back)

    def meets(self, source: fx.Node, dim: int, size: int) -> None:
        """An uncut operand meets a cut one, whose dimension is `dim` of the operand, of `size`."""
        shape, facts = shape_of(source), self.facts[source]
        if 0 <= dim < len(shape) and shape[dim] == size and dim not in facts.uniform:
            raise Wanted(source)
        if facts.parameters and not facts.plain and self._has_gradient(source):
            raise Wanted(source)
        if facts.plain:
            self.partial |= facts.parameters

    def _has_gradient(self, source: fx.Node) -> bool:
        value = source.meta.get("val")
        return bool(getattr(value, "is_floating_point", lambda: False)())


# ---- rules --------------------------------------------------------------------------------------------------------

Rule = Callable[[Flow, fx.Node], Any]


def _elementwise(flow: Flow, node: fx.Node) -> Cut:
    return flow.aligned(node, node.all_input_nodes)


def _same(flow: Flow, node: fx.Node) -> Cut:
    cut = flow.cut(node.args[0])
    if cut is None:
        raise Blocked(f"{node.name} takes something from a cut value")
    return cut


def _dim(number: Any, rank: int) -> int:
    return int(number) % rank if rank else 0


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _rank(node: fx.Node) -> int:
    return len(shape_of(node.args[0]))


def _transposed(flow: Flow, node: fx.Node) -> Cut:
    cut, rank = _same(flow, node), _rank(node)
    if operation(node) == "permute":
        order = [_dim(d, rank) for d in node.args[1]]  # type: ignore[union-attr]
    else:
        one, two = (0, 1) if operation(node) == "t" else (_dim(node.args[1], rank), _dim(node.args[2], rank))
        order = list(range(rank))
        order[one], order[two] = order[two], order[one]
    return replace(cut, dim=order.index(cut.dim))


def _unsqueezed(flow: Flow, node: fx.Node) -> Cut:
    cut = _same(flow, node)
    at = _dim(node.args[1], _rank(node) + 1)
    return replace(cut, dim=cut.dim + (at <= cut.dim))


def _squeezed(flow: Flow, node: fx.Node) -> Cut:
    cut, rank = _same(flow, node), _rank(node)
    given = _argument(node, 1, "dim")
    dims = range(rank) if given is None else [_dim(d, rank) for d in (given if isinstance(given, list | tuple) else [given])]
    return replace(cut, dim=cut.dim - sum(shape_of(node.args[0])[d] == 1 for d in dims if d < cut.dim))


def _expanded(flow: Flow, node: fx.Node) -> Cut:
    cut = _same(flow, node)
    return replace(cut, dim=cut.dim + len(shape_of(node)) - _rank(node))


def _repeated(flow: Flow, node: fx.Node) -> Cut:
    cut = _expanded(flow, node)
    if shape_of(node)[cut.dim] != sum(cut.parts):
        raise Blocked(f"{node.name} repeats the cut dimension")
    return cut


def _interleaved(flow: Flow, node: fx.Node) -> Cut:
    cut, dim = _same(flow, node), _argument(node, 2, "dim")
    if dim is None or not isinstance(node.args[1], int):
        raise Blocked(f"{node.name} repeats without a dimension or a number")
    times = node.args[1] if _dim(dim, _rank(node)) == cut.dim else 1
    return replace(cut, parts=tuple(part * times for part in cut.parts))


def _elsewhere(flow: Flow, node: fx.Node, dims: Any = None, keep: bool = True) -> Cut:
    """Something happens along dimensions, none of which may be the cut one."""
    cut, rank = _same(flow, node), _rank(node)
    dims = node.args[1] if dims is None and len(node.args) > 1 else dims
    dims = [_dim(d, rank) for d in (dims if isinstance(dims, list | tuple) else [dims if dims is not None else 0])]
    if cut.dim in dims:
        raise Blocked(f"{operation(node)} works along the cut dimension")
    return cut if keep else replace(cut, dim=cut.dim - sum(d < cut.dim for d in dims))


def _sliced(flow: Flow, node: fx.Node) -> Cut:
    if shape_of(node) == shape_of(node.args[0]):
        return _same(flow, node)
    return _elsewhere(flow, node, _argument(node, 1, "dim", 0))


def _selected(flow: Flow, node: fx.Node) -> Cut:
    return _elsewhere(flow, node, node.args[1], keep=False)


def _reduced(flow: Flow, node: fx.Node) -> Cut:
    dims = _argument(node, 1, "dim")
    if dims is None or dims == []:
        raise Blocked(f"{operation(node)} takes all elements of a cut value together")
    return _elsewhere(flow, node, dims, keep=len(shape_of(node)) == _rank(node))


def _normalised(flow: Flow, node: fx.Node) -> Cut:
    cut, rank = _same(flow, node), _rank(node)
    if cut.dim >= rank - len(node.args[1]):  # type: ignore[arg-type]
        raise Blocked(f"{operation(node)} works along the cut dimension")
    for source in node.all_input_nodes[1:]:
        flow.meets(source, -1, 0)
    return cut


def _joined(flow: Flow, node: fx.Node) -> Cut:
    values = node.args[0]
    along = _argument(node, 1, "dim", 0)
    assert isinstance(values, list | tuple)
    rank = len(shape_of(values[0]))
    if operation(node) == "stack":
        cut, at = flow.aligned(values[0], values), _dim(along, rank + 1)  # type: ignore[arg-type]
        return replace(cut, dim=cut.dim + (at <= cut.dim))
    cut = flow.aligned(node, values)
    if cut.dim == _dim(along, rank):
        raise Blocked("cat works along the cut dimension")
    return cut


def _split(flow: Flow, node: fx.Node) -> list[Cut]:
    cut, rank = _same(flow, node), _rank(node)
    pieces = [tuple(piece.shape) for piece in node.meta["val"]]
    if _dim(_argument(node, 2, "dim", 0), rank) != cut.dim:
        return [cut] * len(pieces)
    sizes = tuple(shape[cut.dim] for shape in pieces)
    if sizes == cut.parts:
        return [replace(cut, parts=(size,)) for size in sizes]
    if len(cut.parts) == 1 and cut.seed in flow.seeds and sum(sizes) == shape_of(cut.seed)[-1]:
        raise Packed(cut.seed, sizes)
    raise Blocked(f"{operation(node)} divides the cut dimension")


def _item(flow: Flow, node: fx.Node) -> Cut:
    found = flow.cuts[node.args[0]]  # type: ignore[index]
    return found[node.args[1]]  # type: ignore[no-any-return]


def _viewed(flow: Flow, node: fx.Node) -> Cut:
    cut = _same(flow, node)
    old, new = shape_of(node.args[0]), shape_of(node)
    for before, after in _groups(old, new):
        if cut.dim in before:
            return _regrouped(flow, node, cut, before, after)
    raise Blocked(f"{node.name}: a view that mixes dimensions")


def _regrouped(flow: Flow, node: fx.Node, cut: Cut, before: list[int], after: list[int]) -> Cut:
    """The cut dimension is one of `before`, which become `after`: it must be the outermost, and stays that."""
    old, new = shape_of(node.args[0]), shape_of(node)
    if before[0] != cut.dim:
        raise Blocked(f"{node.name}: a view that puts another dimension outside of the cut one")
    scale = math.prod(old[d] for d in before[1:])
    parts = tuple(part * scale for part in cut.parts)
    inner = math.prod(new[d] for d in after[1:])
    if len(parts) > 1 and new[after[0]] == len(parts) and len(set(parts)) == 1 and len(after) > 1:
        inner //= new[after[1]]
        after, parts = after[1:], parts[:1]
    if all(part % inner == 0 and part // inner % flow.tp == 0 for part in parts):
        return replace(cut, dim=after[0], parts=tuple(part // inner for part in parts))
    count = new[after[0]]
    if len(parts) == 1 and count in (2, 3) and len(after) > 1 and new[after[1]] % flow.tp == 0:
        if sum(parts) == shape_of(cut.seed)[-1]:
            raise Packed(cut.seed, (parts[0] // count,) * count)
    if any(part % inner for part in parts):
        raise Blocked(f"{node.name}: a view that divides the cut dimension unevenly")
    heads = " + ".join(str(part // inner) for part in parts)
    raise HeadsBlocked(f"tp={flow.tp} does not divide {heads} heads of {inner}")


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Dimensions that belong together on both sides of a view; those of size 1 aside."""
    before, after = [d for d, n in enumerate(old) if n != 1], [d for d, n in enumerate(new) if n != 1]
    found: list[tuple[list[int], list[int]]] = []
    while before and after:
        left, right = [before.pop(0)], [after.pop(0)]
        while (one := math.prod(old[d] for d in left)) != (two := math.prod(new[d] for d in right)):
            if not (before if one < two else after):
                return found
            (left if one < two else right).append((before if one < two else after).pop(0))
        found.append((left, right))
    return found


def _matrix(flow: Flow, node: fx.Node) -> Cut | None:
    """A parameter contracts over the cut, or two cut values are multiplied head by head."""
    if operation(node) in ("linear", "addmm") or weight_of(node, flow.traced) is not None:
        given = input_of(node)
        cut, weight = flow.cut(given), weight_of(node, flow.traced)
        if cut is None or weight is None or cut.dim != len(shape_of(given)) - 1:
            raise Blocked(f"{node.name}: a matrix product that does not contract over the cut")
        if len(cut.parts) != 1:
            raise Blocked(f"{node.name} contracts over several parts")
        flow.rows.append(node)
        return None
    cut = flow.aligned(node, node.args)
    if cut.dim >= len(shape_of(node)) - 2:
        raise Blocked(f"{node.name} multiplies along the cut dimension")
    return cut


def _attention(flow: Flow, node: fx.Node) -> Cut:
    cuts = [flow.cut(arg) for arg in node.args[:3]]
    for arg, cut in zip(node.args[:3], cuts, strict=True):
        if cut is None:
            raise Wanted(arg)  # type: ignore[arg-type]
    query = cuts[0]
    assert query is not None
    if any(cut.dim != _rank(node) - 3 or len(cut.parts) != 1 for cut in cuts if cut is not None):
        raise Blocked("attention is cut otherwise than by heads")
    mask = _argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node) and flow.cut(mask) is None:
        flow.meets(mask, len(shape_of(mask)) - 3, sum(query.parts))
    return query


ELEMENTWISE = frozenset(
    "add sub rsub mul div pow neg abs sqrt rsqrt reciprocal exp log tanh sigmoid sin cos erf square gelu relu silu elu "
    "hardtanh leaky_relu softplus mish hardswish clamp clamp_min clamp_max minimum maximum where masked_fill "
    "type_as eq ne lt le gt ge bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not __and__ __or__ "
    "isnan isinf copy fill sign floor round".split()
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(_KEEPING, _same),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "_unsafe_view"), _viewed),
    **dict.fromkeys(("transpose", "permute", "t", "swapaxes"), _transposed),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "cumsum", "flip", "roll"), _elsewhere),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "prod"), _reduced),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys((*MATRICES, "bmm"), _matrix),
    **{"unsqueeze": _unsqueezed, "squeeze": _squeezed, "expand": _expanded, "repeat": _repeated},
    **{"repeat_interleave": _interleaved, "slice": _sliced, "select": _selected, "cat": _joined, "stack": _joined},
    **{"split": _split, "chunk": _split, "split_with_sizes": _split, "getitem": _item},
    "scaled_dot_product_attention": _attention,
}
"""Operation -> what it does to a cut."""
