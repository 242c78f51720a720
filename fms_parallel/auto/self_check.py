"""One batch through a model that a tensor plan cuts and through the whole one, before training: do they agree?

A wrong plan may run and give slightly wrong numbers. So a short copy of the model (the first blocks of each list,
random weights, fp32 or what is wider, evaluation mode) runs whole on every rank and cut over the tp ranks: the results
of all modules that give whole values are compared, and every gradient. Memory: the short copy, once whole. It knows
modules, plans and one axis of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fms_parallel import compat
from fms_parallel.auto.blocks import hooked
from fms_parallel.auto.source import skeleton_of
from fms_parallel.checkpoint.lazy import MemoryTensor, copy_box
from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.errors import LayoutError
from fms_parallel.strategy.materialise import materialise

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest relative error by dtype: rounding stays far below (some models have fp32 inside), a wrong plan above."""

Cutter = Callable[[nn.Module], None]


def check_plan(
    skeleton: nn.Module, inputs: Mapping[str, Any], blocks: Sequence[str], mesh: DeviceMesh, cut: Cutter
) -> None:
    """Compare. Collective over `mesh`, the tp dimension.

    Args:
        skeleton: the model on the meta device. inputs: of its forward. blocks: its repeated ones.
        cut: cuts a model on the meta device as the plan says.
    Raises:
        LayoutError: naming the first module or parameter that differs, on every rank; or nothing can be compared.
    """
    rows = {name: value[:2] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    device = next((value.device for value in rows.values() if isinstance(value, Tensor)), torch.device("cpu"))
    whole, gives = _reference(skeleton, rows, blocks, device)
    if gives is None:
        raise LayoutError(
            f"tp={mesh.size()}: with random weights this model's gradients are not finite, so the plan cannot be "
            "checked against one process. Use self_check=False if you know the plan to be right, or pp and fsdp."
        )
    problem = ""
    seen: dict[str, list[Tensor]] = {}
    running: list[str] = []
    gradients: dict[str, Tensor] = {}
    try:
        model = _cut_copy(whole, cut, device)
        with _noting(model, seen, running):
            _backward(model(**rows))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        problem = f"{running[-1] if running else 'the plan'}: {type(error).__name__}: {error}"
    _agree(problem, mesh)
    problem = _first_difference(seen, gives)
    _agree(problem, mesh)
    _agree(_wrong_gradient(whole, gradients), mesh)


def _agree(problem: str, mesh: DeviceMesh) -> None:
    """Raise on all ranks what one of them found."""
    found: list[Any] = [None] * mesh.size()
    dist.all_gather_object(found, problem, group=mesh.get_group())
    first = next((text for text in found if text), "")
    if first:
        raise LayoutError(
            f"tp={mesh.size()}: cut over the ranks the model does not give what it gives in one process. {first} "
            "Correct tensor_plan=, or use pp and fsdp."
        )


# ---- the whole model --------------------------------------------------------------------------------------------


def _reference(
    skeleton: nn.Module, rows: Mapping[str, Any], blocks: Sequence[str], device: torch.device
) -> tuple[nn.Module, dict[str, list[Tensor]] | None]:
    """A short (else the whole) model with random weights, and what its modules give; None when that is not finite."""
    for short in (True, False):
        model = _filled(shortened(skeleton, blocks) if short else skeleton_of(skeleton), device)
        seen: dict[str, list[Tensor]] = {}
        try:
            with _noting(model, seen, []):
                _backward(model(**rows))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
            if not short:
                raise
            continue  # it counts its own blocks
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        return model, seen if finite else None
    raise AssertionError


def shortened(skeleton: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """A copy with the first blocks of each list: two, and as many more as look different."""
    model = skeleton_of(skeleton)
    for parent in dict.fromkeys(block.rpartition(".")[0] for block in blocks):
        if not parent:
            continue
        every = model.get_submodule(parent)
        looks = [_looks(block) for block in every.children()]
        keep = max(2, *(looks.index(look) + 1 for look in looks))
        owner, _, attribute = parent.rpartition(".")
        setattr(model.get_submodule(owner), attribute, every[:keep])  # type: ignore[index]
    return model


def _looks(block: nn.Module) -> tuple[Any, ...]:
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _filled(model: nn.Module, device: torch.device) -> nn.Module:
    """In memory and in evaluation mode; all parameters random, the same on every rank."""
    model = model.to(torch.promote_types(next(model.parameters()).dtype, torch.float32)).eval()
    materialise(model, device)
    generator = torch.Generator().manual_seed(20260)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = min(0.5, parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else 0.1
            parameter.copy_(drawn * scale + (0.0 if parameter.dim() > 1 else 0.5))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def _backward(out: Any) -> None:
    """Gradients of a fixed random combination of everything that the model gives."""
    generator = torch.Generator().manual_seed(7)
    total: Any = 0
    for leaf in compat.flatten_tree(out)[0]:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            total = total + (leaf * torch.randn(leaf.shape, generator=generator).to(leaf)).sum()
    total.backward()


@contextmanager
def _noting(model: nn.Module, seen: dict[str, list[Tensor]], running: list[str]) -> Iterator[None]:
    """Notes what modules give, in the order in which they end, and which are running."""
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}

    def opened(module: nn.Module, args: Any) -> None:
        running.append(names[id(module)])

    def closed(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()
        leaves = [leaf for leaf in compat.flatten_tree(out)[0] if isinstance(leaf, Tensor)]
        seen.setdefault(names[id(module)], []).extend(leaf.detach() for leaf in leaves)

    with hooked(model, opened, closed):
        yield


# ---- the cut one ------------------------------------------------------------------------------------------------


def _cut_copy(whole: nn.Module, cut: Cutter, device: torch.device) -> nn.Module:
    model = skeleton_of(whole)
    cut(model)
    materialise(model, device)
    values = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            box = local_box(parameter)
            if box.numel:
                copy_box(MemoryTensor(values[name].detach()), box, local_tensor(parameter))
    return model


def _first_difference(seen: Mapping[str, list[Tensor]], wanted: Mapping[str, list[Tensor]]) -> str:
    """The first module whose results have the right shape and other values."""
    for name, results in seen.items():
        for mine, should in zip(results, wanted.get(name, []), strict=False):
            if mine.shape == should.shape and mine.is_floating_point():
                error = float((mine - should).abs().max() / should.abs().max().clamp(min=1e-6)) if mine.numel() else 0.0
                if not error <= TOLERANCE.get(mine.dtype, 1e-3):
                    return f"{name} is the first module with another result (relative error {error:.1e})."
    return ""


def _wrong_gradient(whole: nn.Module, gradients: Mapping[str, Tensor]) -> str:
    """The parameter with the worst gradient, if that is wrong. Collective."""
    scale = max(
        (float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None and p.numel()), default=0.0
    )
    worst, found = 0.0, ""
    for name, parameter in whole.named_parameters():
        if name not in gradients:
            continue
        gradient = gradients[name]
        mine = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        should = torch.zeros_like(mine) if parameter.grad is None else parameter.grad
        # Some gradients are zero but for rounding (the bias of keys): not measured against themselves.
        error = float((mine - should).abs().max() / (should.abs().max() + 1e-3 * scale + 1e-12))
        if not error <= max(worst, TOLERANCE.get(mine.dtype, 1e-3)):
            worst, found = error, name
    return f"{found} has another gradient (relative error {worst:.1e})." if found else ""
