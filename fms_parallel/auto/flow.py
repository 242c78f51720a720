"""How a cut of one dimension runs through a graph of operations, and where it ends.

Seeds are matrices cut along their outputs. Behind them every value that is made from a cut one is cut too, along one
of its dimensions, or nothing is known about it and the seeds are refused. The cut ends in matrices that contract over
it: those are cut along their inputs, and the sum over the ranks is whole again.

    x [B,S,E] -linear-> [B,S,E/] -view-> [B,S,H/,D] -transpose-> [B,H/,S,D] -attention-> ... -view-> [B,S,E/] -linear->

A cut dimension may consist of parts (query, key and value beside each other): each rank holds its share of each part.
It knows operations and shapes; it knows no modules. What each operation does to a cut is in `flow_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fms_parallel.auto.graph import Traced, operation, shape_of, words_of


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
    """The output of `seed` may have these parts. `otherwise`: what is wrong if it has not."""

    def __init__(self, seed: fx.Node, parts: tuple[int, ...], otherwise: str = "") -> None:
        super().__init__(seed.name)
        self.seed, self.parts, self.otherwise = seed, parts, otherwise


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


FILLS = words_of("zeros ones full zeros_like ones_like full_like new_ones new_zeros new_full empty")
ELEMENTWISE = words_of(
    "add sub rsub mul div pow neg abs sqrt rsqrt reciprocal exp log tanh sigmoid sin cos erf square gelu relu silu elu "
    "hardtanh leaky_relu softplus mish hardswish clamp clamp_min clamp_max minimum maximum where masked_fill "
    "type_as eq ne lt le gt ge bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not __and__ __or__ "
    "isnan isinf copy fill sign floor round"
)
KEEPING = words_of("to contiguous clone detach alias lift_fresh_copy dropout")


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
    if name not in ELEMENTWISE and name not in KEEPING:
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
        partial: parameters that each rank has whole and uses on its share.
    """

    def __init__(
        self,
        traced: Traced,
        facts: Mapping[fx.Node, Facts],
        tp: int,
        seeds: Mapping[fx.Node, tuple[int, ...]],
        rules: Mapping[str, Rule],
    ) -> None:
        self.traced, self.facts, self.tp, self.seeds, self.rules = traced, facts, tp, seeds, rules
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
        rule = self.rules.get(name)
        if rule is None:
            raise Blocked(f"nobody knows what {name or node.target} does to a cut")
        cut = rule(self, node)
        if cut is None:
            return
        if str(getattr(node.target, "overloadpacket", "")).endswith("_") and cut != self.cut(node.args[0]):
            raise Blocked(f"{name} writes a cut value into one that is not")
        self.cuts[node] = (
            [self._checked(node, one) for one in cut] if isinstance(cut, list) else self._checked(node, cut)
        )

    def _checked(self, node: fx.Node, cut: Cut) -> Cut:
        if any(part % self.tp for part in cut.parts):
            raise Blocked(f"tp={self.tp} does not divide {' + '.join(map(str, cut.parts))} ({node.name})")
        return cut

    # ---- what rules ask -------------------------------------------------------------------------------------------

    def cut(self, value: Any) -> Cut | None:
        """The cut of an argument."""
        found = self.cuts.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, Cut) else None

    def aligned(self, node: fx.Node, sources: Sequence[Any]) -> Cut:
        """The common cut of operands that are broadcast against each other, counted from the right."""
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


Rule = Callable[[Flow, fx.Node], Any]
"""What an operation does to the cut of its arguments: the cut of its result, a list of them, or None where it ends."""
