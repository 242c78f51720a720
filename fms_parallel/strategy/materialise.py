"""From the meta device to memory: allocate what this rank holds, and draw the initial weights.

It knows boxes and how each module says its parameters start; a checkpoint fills them otherwise. No parameter is ever
left with whatever the memory held before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.errors import ConfigError
from fms_parallel.modules.initial import Fill, Init, Normal, Uniform


def materialise(model: nn.Module, device: torch.device, parameters_on: torch.device | None = None) -> None:
    """Give every meta parameter and buffer memory on `device`: local shards only. Contents are not yet defined.

    The parameter objects stay the same, so ties and FSDP's references hold. `parameters_on`: where those go instead.
    """
    seen: set[int] = set()
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or not tensor.is_meta or id(tensor) in seen:
                    continue
                is_parameter = isinstance(tensor, nn.Parameter)
                new = torch.empty_like(tensor, device=parameters_on or device if is_parameter else device)
                if is_parameter:
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                torch.utils.swap_tensors(tensor, new)
                seen.add(id(store[name]))


def initialise(model: nn.Module, seed: int, only: Callable[[str], bool] = lambda name: True) -> None:
    """Draw every parameter from (seed, its name): the same global weights in every layout, bit for bit.

    Args:
        only: of these names.
    Raises:
        ConfigError: a parameter that no module says how to start.
    """
    with torch.no_grad():
        for name, parameter, init in initial_values(model):
            if not only(name):
                continue
            box, shape = local_box(parameter), tuple(parameter.shape)
            init.fill(local_tensor(parameter), box, shape, key=f"{seed}/{name}")


def initial_values(model: nn.Module) -> Iterator[tuple[str, Tensor, Init]]:
    """(name, parameter, how it starts) of every parameter, shared ones once."""
    known = dict(_declared(model))
    for name, parameter in model.named_parameters():
        if name not in known:
            raise ConfigError(
                f"nobody says how {name} starts: give its module an `initial()` that returns {{name: Init}}, "
                "or load a checkpoint."
            )
        yield name, parameter, known[name]


def _declared(model: nn.Module) -> Iterator[tuple[str, Init]]:
    """Inits by full name, from inner modules first so that an outer module's word wins."""
    for prefix, module in reversed(list(model.named_modules())):
        values = module.initial() if hasattr(module, "initial") else _torch_defaults(module)  # type: ignore[operator]
        for name, init in values.items():
            yield (f"{prefix}.{name}" if prefix else name), init


def _torch_defaults(module: nn.Module) -> dict[str, Init]:
    """What torch's own modules start with, by kind."""
    if isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        return {"weight": Uniform(bound), "bias": Uniform(bound)}
    if isinstance(module, nn.Embedding):
        return {"weight": Normal(1.0)}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"weight": Fill(1.0), "bias": Fill(0.0)}
    return {}


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this rank holds."""
    return sum(local.numel() * local.element_size() for local in map(local_tensor, model.parameters()))


def is_distributed(parameter: Tensor) -> bool:
    """Whether a parameter is spread over a mesh."""
    return isinstance(parameter, DTensor)
