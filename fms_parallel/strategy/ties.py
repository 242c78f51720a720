"""Parameters that several names share, kept shared while parameters are replaced.

torch's `parallelize_module` and `to_empty` replace parameters name by name and so untie them silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from fms_parallel.errors import LayoutError


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of names of one parameter each, first name first; only parameters with several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@contextmanager
def keep_ties(model: nn.Module) -> Iterator[None]:
    """Whatever replaces parameters inside the block, names that shared one share the first name's new one after it.

    Raises:
        LayoutError: the new parameters are cut differently, so one cannot stand for the others.
    """
    groups = tied_names(model)
    yield
    for first, *others in groups:
        parameter = model.get_parameter(first)
        for name in others:
            if (here := _cut(parameter)) != (there := _cut(model.get_parameter(name))):
                raise LayoutError(
                    f"{first} and {name} are one parameter but are cut differently ({here}, {there}): cut both alike."
                )
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)


def _cut(parameter: Tensor) -> tuple[Placement, ...]:
    return parameter.placements if isinstance(parameter, DTensor) else ()
