"""`Watched`: whether weights are still those that something was made of.

It knows parameters; it knows nothing of what was made.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.distributed.boxes import local_tensor


class Watched:
    """The parameters of modules.

    Attributes:
        tensors: what this rank holds of them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.tensors: list[Tensor] = []
        self._seen = []
        for owner in (part for module in modules for part in module.modules()):
            for name, parameter in owner.named_parameters(recurse=False):
                held = local_tensor(parameter)
                own = held if isinstance(parameter, DTensor) else parameter  # of which `.data` may be exchanged
                version = None if held.is_inference() else held._version  # those have none
                self.tensors.append(held)
                self._seen.append((owner._parameters, name, parameter, own, version, own.data_ptr()))

    def changed(self) -> bool:
        """Whether one was written, or replaced (`load_state_dict(assign=True)`, `.to(device)`), since this was made."""
        for parameters, name, parameter, own, version, place in self._seen:
            if parameters.get(name) is not parameter or own.data_ptr() != place:
                return True
            if version is not None and own._version != version:
                return True
        return False
