"""The words of a recording: what a model's blocks are, what they hand out, and what was read.

It knows modules and names; how a recording is made is in `record.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from fms_parallel.errors import LayoutError


class Carried(NamedTuple):
    """A tensor that a block hands out: leaf `leaf` of its output, or of the output of a module inside it.

    `module` is `""` for the block itself. A tensor of a module inside it is carried when something outside reads it
    behind the block's back, as mixtures of experts do with the logits of their routers.
    """

    block: int
    module: str
    leaf: int


class Meta(NamedTuple):
    """Shape, dtype and whether a gradient flows back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Output:
    """What a module returned: its structure, and for each leaf a `Meta`, `Same(i)` or the constant itself."""

    spec: Any
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class Same:
    """This leaf is the module's own input leaf of that number, untouched."""

    argument: int


@dataclass
class BlockCall:
    """One block as it ran.

    Attributes:
        reads: what its arguments were made from: names of parameters outside blocks, and `Carried`.
        flops: of its forward. inside: what modules within it returned, by name relative to it.
    """

    name: str
    reads: frozenset[Any]
    output: Output
    flops: int = 0
    inside: dict[str, Output] = field(default_factory=dict)


@dataclass
class Recording:
    """What one forward did.

    Attributes:
        blocks: in the order in which they ran. outside: what modules outside blocks returned, call by call.
        final_reads: what the result was made from. metas: of every `Carried` that somebody reads.
        gap_flops: spent before block 0, between blocks, and after the last one (len(blocks) + 1 numbers).
    """

    blocks: list[BlockCall]
    outside: dict[str, list[Output]]
    final_reads: frozenset[Any]
    metas: dict[Carried, Meta]
    gap_flops: list[int]


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated blocks: children of the outermost `nn.ModuleList`s and `nn.Sequential`s that have at least
    two parameterised ones of one class. Encoder-decoders have two such lists.

    Raises:
        LayoutError: there is none.
    """
    found: list[str] = []

    def search(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if _repeats(child):
                found.extend(f"{prefix}{name}.{index}" for index, _ in child.named_children())
            else:
                search(child, f"{prefix}{name}.")

    if _repeats(model):
        return [name for name, _ in model.named_children()]
    search(model, "")
    if not found:
        raise LayoutError(
            f"{type(model).__name__} has no repeated blocks: pp cuts between the children of an nn.ModuleList (or "
            "nn.Sequential) that has two of one class with parameters. Use fsdp or tp, or put the layers into one."
        )
    return found


def _repeats(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    kinds = [type(child) for child in module.children() if any(True for _ in child.parameters())]
    alike = max((kinds.count(kind) for kind in kinds), default=0)
    # A Sequential of different layers is one layer (a classifier head); a ModuleList may mix kinds of blocks.
    return alike >= 2 and (isinstance(module, nn.ModuleList) or alike == len(list(module.children())))


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every parameter name -> the first name of the same parameter."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


@contextmanager
def hooked(model: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Inside, every module of `model` calls `before(module, args)` and then `after(module, args, output)`."""
    handles = [module.register_forward_pre_hook(before) for module in model.modules()]
    handles += [module.register_forward_hook(after) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
