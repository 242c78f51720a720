"""What the comparisons with transformers have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.checkpoint.adapter import Adapter
from fms_parallel.checkpoint.lazy import MemoryTensor

TOLERANCE = 1e-5
"""Largest relative error in fp32."""


def shaken(model: nn.Module, folder: Path, seed: int = 0) -> nn.Module:
    """A transformers model without a constant parameter (zero biases hide mistakes), saved to `folder`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model.eval()


def config_words(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a transformers config in the spelling of the version that is installed: 5 has `rope_parameters`."""
    import transformers

    if "rope_parameters" not in options or int(transformers.__version__.split(".")[0]) >= 5:
        return options
    rope = dict(options["rope_parameters"])
    others = {name: value for name, value in options.items() if name != "rope_parameters"}
    return others | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}


def relative(one: Tensor, other: Tensor, scale: float = 0.0) -> float:
    return float((one - other).detach().abs().max()) / max(float(other.detach().abs().max()), scale)


def gradient_errors(ours: nn.Module, theirs: nn.Module, adapter: Adapter) -> dict[str, float]:
    """Relative error of every gradient, by their names.

    Gradients are shaped like weights, so the adapter carries them over. Those that are zero in exact arithmetic (a
    key's bias, that of scores over positions) are nothing but rounding: compared on the scale of the model.
    """
    tensors = {n: MemoryTensor(_gradient(p)) for n, p in ours.named_parameters()}
    for name, parameter in ours.named_parameters(remove_duplicate=False):
        if name not in tensors:
            tensors[name] = next(tensors[n] for n, p in ours.named_parameters() if p is parameter)
    found = {name: lazy.read_all() for name, lazy in adapter.from_native(dict(tensors)).items()}
    # A parameter of two names: transformers 4 and 5 do not save the same one.
    wanted = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    once = {name for name, p in theirs.named_parameters() if p.grad is not None}
    assert once <= found.keys() <= wanted.keys()
    scale = 1e-2 * max(float(grad.abs().max()) for grad in wanted.values())
    return {name: relative(grad, wanted[name], scale) for name, grad in found.items()}


def _gradient(parameter: Any) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
