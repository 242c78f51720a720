"""What each operation does to a cut: a table, for `flow.py`.

An operation that is not in it refuses: missing a cut costs speed, a wrong one would cost the result.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import fx

from fms_parallel.auto.flow import (
    ELEMENTWISE,
    KEEPING,
    MATRICES,
    Blocked,
    Cut,
    Flow,
    HeadsBlocked,
    Packed,
    Rule,
    Wanted,
    input_of,
    weight_of,
)
from fms_parallel.auto.graph import operation, shape_of


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
    dims = (
        range(rank)
        if given is None
        else [_dim(d, rank) for d in (given if isinstance(given, list | tuple) else [given])]
    )
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


def _unbound(flow: Flow, node: fx.Node) -> list[Cut]:
    return [_elsewhere(flow, node, _argument(node, 1, "dim", 0), keep=False)] * len(node.meta["val"])


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
    if any(part % inner for part in parts):
        raise Blocked(f"{node.name}: a view that divides the cut dimension unevenly")
    heads = " + ".join(str(part // inner) for part in parts)
    reason, count = f"tp={flow.tp} does not divide {heads} heads of {inner}", new[after[0]]
    packed = len(parts) == 1 and count in (2, 3) and len(after) > 1 and new[after[1]] % flow.tp == 0
    if packed and sum(parts) == shape_of(cut.seed)[-1]:
        raise Packed(cut.seed, (parts[0] // count,) * count, reason)
    raise HeadsBlocked(reason)


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


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(KEEPING, _same),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "_unsafe_view"), _viewed),
    **dict.fromkeys(("transpose", "permute", "t", "swapaxes"), _transposed),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "cumsum", "flip", "roll"), _elsewhere),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "prod"), _reduced),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys((*MATRICES, "bmm"), _matrix),
    **{"unsqueeze": _unsqueezed, "squeeze": _squeezed, "expand": _expanded, "repeat": _repeated},
    **{"repeat_interleave": _interleaved, "slice": _sliced, "select": _selected, "cat": _joined, "stack": _joined},
    **{"split": _split, "chunk": _split, "split_with_sizes": _split, "getitem": _item},
    "unbind": _unbound,
    "scaled_dot_product_attention": _attention,
}
"""Operation -> what it does to a cut."""
