"""A tensor plan read off a model's graph: which matrices are cut along their outputs, which along their inputs.

    1   for each matrix B: the matrices right before it, cut along their outputs, are followed through the graph
        (`flow.py`); if the cut ends in B, they are colwise and B is rowwise
    2   what the model's code counts by itself (`view(..., self.num_heads, ...)`) is divided by tp: those attributes
        with which the model, run on shapes with cut matrices, gives the shapes that step 1 predicted at every operation
    3   token embedding and head that go together are cut along the vocabulary; a mixture's experts are dealt out

Whatever is not found is replicated. It knows modules, names and graphs; it knows no ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from torch import fx, nn

from fms_parallel.auto.blocks import find_blocks
from fms_parallel.auto.flow import (
    MATRICES,
    Blocked,
    Cut,
    Facts,
    Flow,
    HeadsBlocked,
    Packed,
    Wanted,
    facts_of,
    input_of,
    weight_of,
)
from fms_parallel.auto.flow_rules import RULES
from fms_parallel.auto.graph import Traced, operation, shape_of, tensors_of, trace, words_of
from fms_parallel.auto.self_check import shortened
from fms_parallel.auto.tensor_styles import Columns, Features, Numbers, Rows, as_expressions, experts_of
from fms_parallel.errors import LayoutError
from fms_parallel.strategy.ties import tied_names

_STOPS = ("layer_norm", "rms_norm", "group_norm", "native_layer_norm")
_NUMBERED = re.compile(r"(^|\.)\d+\\?(\.|$)")
"""An expression for one module of a list."""

_SHAPED = words_of(
    "view reshape _unsafe_view expand repeat split split_with_sizes chunk zeros ones full new_zeros new_ones new_full "
    "unflatten slice arange empty"
)
"""Operations that are told sizes, which differ in a share."""


@dataclass
class Region:
    """Matrices that are cut together.

    Attributes:
        columns: matrix (or lookup) -> parts of its output. rows: those that end it. partial: parameters that each
            rank uses on its share. cuts: of every value inside.
    """

    columns: dict[fx.Node, tuple[int, ...]]
    rows: list[fx.Node]
    partial: set[fx.Node]
    cuts: dict[fx.Node, Any] = field(repr=False)


def infer_tensor_plan(
    model: nn.Module, example_batch: Mapping[str, Any], tp: int = 2, stages: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Expression over module names -> word, for `parallelize(tensor_plan=)`.

    Args:
        model: on the meta device or anywhere. example_batch: what its forward is given, `[B, ...]` each.
        stages: block -> its pipeline stage: a plan that needs a cut value to cross between two is refused.
    Raises:
        LayoutError: heads that tp does not divide; nothing can be cut; the graph is not known.
    """
    try:  # the first blocks say it all, as a rule: 2 instead of 48
        blocks = find_blocks(model)
        short = shortened(model, blocks)
        here = {name for name, _ in short.named_modules()}
        apart = {block: number for number, block in enumerate(blocks) if block in here} if stages else {}
        plan = _Inference(short, example_batch, tp).plan(apart)
        if not any(_NUMBERED.search(expression) for expression in plan):
            return plan
    except LayoutError:
        pass
    return _Inference(model, example_batch, tp).plan(stages or {})


class _Inference:
    """One inference over one model."""

    def __init__(self, model: nn.Module, example: Mapping[str, Any], tp: int) -> None:
        self.model, self.example, self.tp = model, example, tp
        self.traced: Traced = trace(model, example)
        self.facts: dict[fx.Node, Facts] = facts_of(self.traced)
        self.matrices = {node: owner for node in self.traced.nodes if (owner := self._owner(node)) is not None}
        self.regions: list[Region] = []
        self.why: dict[str, str] = {}

    def plan(self, stages: Mapping[str, int]) -> dict[str, Any]:
        """As `infer_tensor_plan`."""
        self._find_regions()
        numbers = self._agree()
        if not self.regions and not experts_of(self.model, self.tp):
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.why.items())[:3])
            raise LayoutError(
                f"tp={self.tp}: nothing of {type(self.model).__name__} can be cut by itself "
                f"({reasons or 'no matrices'}). Give tensor_plan={{expression: word}}, or use pp and fsdp."
            )
        self._check_crossings(stages)
        words: dict[str, Any] = dict(experts_of(self.model, self.tp))
        for region in self.regions:
            words.update(self._words(region))
        words.update(self._vocabulary(words))
        divided: dict[str, list[str]] = {}
        for name, attribute in sorted(numbers):
            divided.setdefault(name, []).append(attribute)
        for name, attributes in divided.items():
            if name not in words:  # a matrix that is cut counts for itself
                words[name] = Numbers(tuple(attributes))
        return as_expressions(words, [name for name, _ in self.model.named_modules()])

    # ---- matrices -------------------------------------------------------------------------------------------------

    def _owner(self, node: fx.Node) -> str | None:
        """The module whose weight this matrix product or lookup uses, if nobody else uses it."""
        weight = weight_of(node, self.traced)
        if weight is None or len(weight.users) != 1:
            return None
        name = self.traced.parameters[weight].rpartition(".")[0]
        module = self.model.get_submodule(name)
        own = {key for key, value in module._parameters.items() if value is not None}
        kinds = {"linear": nn.Linear, "embedding": nn.Embedding}
        if not own <= {"weight", "bias"} or not isinstance(module, kinds.get(operation(node), nn.Module)):
            return None
        return name

    def _before(self, node: fx.Node) -> set[fx.Node]:
        """The nearest matrices and lookups that a value is made from."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        todo = [node]
        while todo:
            one = todo.pop()
            if one in seen or one.op == "placeholder":
                continue
            seen.add(one)
            if operation(one) in ("linear", "addmm", "embedding") or weight_of(one, self.traced) is not None:
                found.add(one)
            elif operation(one) not in _STOPS:
                todo.extend(one.all_input_nodes)
        return found

    def _find_regions(self) -> None:
        taken: set[fx.Node] = set()
        for matrix in self.matrices:
            if operation(matrix) not in MATRICES or matrix in taken:
                continue
            seeds = self._before(input_of(matrix))
            if seeds & taken:
                continue  # it begins another region
            if not any(operation(seed) in MATRICES for seed in seeds):
                self.why[self.matrices[matrix]] = "no matrix comes before it without a norm between"
                continue
            try:
                region = self._grow(seeds, taken)
            except HeadsBlocked as blocked:
                names = ", ".join(sorted(self.matrices.get(seed, seed.name) for seed in seeds))
                raise LayoutError(
                    f"{names}: {blocked}, and each rank holds whole heads. Use a tp that divides all head counts "
                    "(query and key-value), or give tensor_plan=."
                ) from None
            except Blocked as blocked:
                self.why[self.matrices[matrix]] = str(blocked)
                continue
            if matrix in region.rows:
                self.regions.append(region)
                taken |= {*region.columns, *region.rows}

    def _grow(self, first: set[fx.Node], taken: set[fx.Node]) -> Region:
        """Follow the seeds, with whatever else has to be cut along with them."""
        seeds: dict[fx.Node, tuple[int, ...]] = {seed: (shape_of(seed)[-1],) for seed in first}
        doubts: list[str] = []
        flow = None
        try:
            while flow is None:
                for seed in seeds:
                    if seed in taken or seed not in self.matrices:
                        raise Blocked(f"{seed.name} is used otherwise")
                flow = self._follow(seeds, doubts)
        except Blocked:
            if doubts:  # what looked like parts were heads
                raise HeadsBlocked(doubts[0]) from None
            raise
        if any(row in taken or row not in self.matrices for row in flow.rows):
            raise Blocked("it ends in a matrix that is used otherwise")
        return Region(seeds, flow.rows, flow.partial, flow.cuts)

    def _follow(self, seeds: dict[fx.Node, tuple[int, ...]], doubts: list[str]) -> Flow | None:
        """Where the seeds lead; None when they had to be changed first."""
        try:
            return Flow(self.traced, self.facts, self.tp, seeds, RULES).run()
        except Packed as packed:
            if len(seeds[packed.seed]) > 1:
                raise Blocked(f"{packed.seed.name} is divided twice") from None
            seeds[packed.seed] = packed.parts
            doubts.extend(filter(None, [packed.otherwise]))
        except Wanted as wanted:
            more = self._before(wanted.node) - set(seeds)
            if not more:
                raise Blocked(f"{wanted.node.name} meets cut values and is whole") from None
            seeds.update({seed: (shape_of(seed)[-1],) for seed in more})
        return None

    # ---- shapes and numbers ---------------------------------------------------------------------------------------

    def _agree(self) -> set[tuple[str, str]]:
        """The attributes to divide; regions for which there are none are given up."""
        kinds: dict[tuple[str, ...], list[Region]] = {}
        for region in self.regions:
            kinds.setdefault(self._kind(region), []).append(region)
        found: set[tuple[str, str]] = set()
        kept: list[Region] = []
        for regions in kinds.values():
            wrong = ""
            for chosen in self._choices(regions):
                wrong = self._differs(regions, chosen)
                if not wrong:
                    found |= chosen
                    kept.extend(regions)
                    break
            else:
                self.why[self.matrices[regions[0].rows[0]]] = wrong
        self.regions = kept
        return found

    def _holders(self, region: Region) -> set[str]:
        """Modules whose code works on cut values, matrices aside."""
        cut = {self.matrices[node] for node in (*region.columns, *region.rows)}
        places = (self.traced.places[node] for node in (*region.cuts, *region.rows))
        return {next((name for name in reversed(place) if name not in cut), "") for place in places}

    def _kind(self, region: Region) -> tuple[str, ...]:
        return tuple(sorted({type(self.model.get_submodule(name)).__name__ for name in self._holders(region)}))

    def _choices(self, regions: list[Region]) -> Iterator[set[tuple[str, str]]]:
        """Sets of attributes that may have to be divided, small ones first: numbers that are sizes of a cut."""
        always = {key for region in regions for key in self._of_transposed(region)}
        sizes = {size for region in regions for cut in region.cuts.values() for size in _sizes(cut)}
        by_kind: dict[tuple[type, str], set[tuple[str, str]]] = {}
        for name in {name for region in regions for name in self._holders(region)}:
            module = self.model.get_submodule(name)
            for attribute, value in vars(module).items():
                if type(value) is int and value in sizes and value % self.tp == 0:
                    by_kind.setdefault((type(module), attribute), set()).add((name, attribute))
        candidates = sorted(by_kind, key=lambda key: (key[0].__name__, key[1]))
        for count in range(min(len(candidates), 4) + 1):
            for chosen in combinations(candidates, count):
                yield always.union(*(by_kind[key] for key in chosen))

    def _of_transposed(self, region: Region) -> Iterator[tuple[str, str]]:
        """Numbers with which modules with transposed weights (Conv1D) say how wide their output is."""
        for node in region.columns:
            if operation(node) not in ("linear", "embedding"):
                name = self.matrices[node]
                for attribute, value in vars(self.model.get_submodule(name)).items():
                    if type(value) is int and value == shape_of(node)[-1]:
                        yield name, attribute

    def _differs(self, regions: list[Region], chosen: set[tuple[str, str]]) -> str:
        """What goes otherwise than predicted when the model runs on shapes with matrices cut and numbers divided."""
        numbers = {key: getattr(self.model.get_submodule(key[0]), key[1]) // self.tp for key in chosen}
        try:
            local = trace(self.model, self.example, shapes=self._local_shapes(regions), numbers=numbers)
        except LayoutError as error:
            return str(error)
        if len(local.nodes) != len(self.traced.nodes):
            return "it computes otherwise when it is cut"
        cuts = {node: cut for region in regions for node, cut in region.cuts.items()}
        for node, here in zip(self.traced.nodes, local.nodes, strict=True):
            if node.op == "output" or node in self.traced.parameters:
                continue
            other = node.op == "call_function" and node.target != here.target
            if other or not self._as_predicted(node, here, cuts):
                return f"{'.'.join(self.traced.places[node][-1:])}: {node.name} has another shape than its share"
        return ""

    def _as_predicted(self, node: fx.Node, here: fx.Node, cuts: Mapping[fx.Node, Any]) -> bool:
        found = cuts.get(node)
        known = list(found) if isinstance(found, list) else [found] * len(tensors_of(node))
        for whole, piece, cut in zip(tensors_of(node), tensors_of(here), known, strict=True):
            want = [list(whole.shape)]
            if cut is not None:
                want[0][cut.dim] //= self.tp
            free = self.facts[node].uniform if cut is None else frozenset()
            if len(piece.shape) != len(want[0]):
                return False
            if any(
                a != b and not (d in free and b == a * self.tp)
                for d, (a, b) in enumerate(zip(piece.shape, want[0], strict=True))
            ):
                return False
        return operation(node) in _SHAPED or _constants(node) == _constants(here)

    def _local_shapes(self, regions: Iterable[Region]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for region in regions:
            for node in (*region.columns, *region.rows):
                weight = weight_of(node, self.traced)
                assert weight is not None
                shape, out = list(shape_of(weight)), node in region.columns
                shape[0 if out == (operation(node) == "linear") else 1] //= self.tp
                found[self.traced.parameters[weight]] = tuple(shape)
                bias = self.model.get_submodule(self.matrices[node])._parameters.get("bias")
                if out and bias is not None:
                    found[f"{self.matrices[node]}.bias"] = (len(bias) // self.tp,)
        return found

    def _check_crossings(self, stages: Mapping[str, int]) -> None:
        """Between stages values are whole: their shapes are known from a run without a cut."""
        block = {n: next((p for p in place if p in stages), "") for n, place in self.traced.places.items()}
        for region in self.regions if stages else ():
            for node in region.cuts:
                for user in node.users:
                    here, there = block[node], block[user]
                    if here != there and stages.get(here, -1) != stages.get(there, -1):
                        raise LayoutError(
                            f"{here or node.name} hands a tensor that tp cuts ({node.name}) to {there or user.name} in "
                            "another pipeline stage: not supported. Use tp without pp, pp with fsdp, or another split."
                        )

    # ---- words ----------------------------------------------------------------------------------------------------

    def _words(self, region: Region) -> dict[str, Any]:
        words: dict[str, Any] = {}
        for node, parts in region.columns.items():
            if operation(node) == "embedding":
                words[self.matrices[node]] = Features()
            elif operation(node) == "linear" and len(parts) == 1:
                words[self.matrices[node]] = "colwise"
            else:
                words[self.matrices[node]] = Columns(parts, transposed=operation(node) != "linear")
        for node in region.rows:
            words[self.matrices[node]] = "rowwise" if operation(node) == "linear" else Rows()
        for parameter in region.partial:
            name = self.traced.parameters[parameter].rpartition(".")[0]
            words.setdefault(name, "partial")
        return words

    def _vocabulary(self, words: Mapping[str, Any]) -> dict[str, str]:
        """The head and the token embeddings of its size, if they can be cut alike."""
        modules = dict(self.model.named_modules())
        for node in reversed(self.traced.nodes):
            weight = weight_of(node, self.traced) if operation(node) == "linear" else None
            if weight is None or not any(user.op == "output" or user.op == "call_function" for user in node.users):
                continue
            users = self._names_of(self.traced.parameters[weight])
            heads = [name for name in users if isinstance(modules.get(name), nn.Linear)]
            if len(heads) != 1 or heads[0] in words or not self._ends(node):
                return {}
            size = modules[heads[0]].out_features
            tables = {n for n, m in modules.items() if isinstance(m, nn.Embedding) and m.num_embeddings == size}
            tables = {n for n in tables if type(modules[n]) is nn.Embedding and n not in words}
            bias = modules[heads[0]]._parameters.get("bias")
            alone = bias is None or len(self._names_of(f"{heads[0]}.bias")) == 1
            if not tables or not alone or not (set(users) - set(heads)) <= tables:
                return {}
            return {heads[0]: "colwise_gather", **dict.fromkeys(tables, "rowwise_embedding")}
        return {}

    def _ends(self, node: fx.Node) -> bool:
        """Whether nothing comes behind a matrix but what keeps its shape."""
        while True:
            users = list(node.users)
            if any(user.op == "output" for user in users):
                return True
            if len(users) != 1 or shape_of(users[0]) != shape_of(node):
                return False
            node = users[0]

    def _names_of(self, parameter: str) -> list[str]:
        """Modules that have this parameter, under any name that `named_modules` knows."""
        groups = [group for group in tied_names(self.model) if parameter in group] or [[parameter]]
        modules = {id(module): name for name, module in self.model.named_modules()}
        names = [name.rpartition(".")[0] for name in groups[0]]
        return list(dict.fromkeys(modules[id(self.model.get_submodule(name))] for name in names))


def _sizes(cut: Any) -> set[int]:
    cuts: list[Cut] = cut if isinstance(cut, list) else [cut]
    return {size for one in cuts for size in (*one.parts, sum(one.parts))}


def _constants(node: fx.Node) -> str:
    """What an operation is told beside tensors."""
    return repr(fx.map_arg((node.args, dict(node.kwargs)), lambda other: None))
