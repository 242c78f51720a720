"""What autograd keeps of one forward for the backward pass, in bytes. It knows torch's hooks only."""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor


def saved_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the memory that `model(*inputs)` keeps, each piece once, without the model's own parameters."""
    parameters = {_local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensor keeps its address from being used again

    def keep(tensor: Tensor) -> Tensor:
        kept[_local(tensor).untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(*inputs)
    assert result.requires_grad
    return sum(_local(tensor).untyped_storage().nbytes() for key, tensor in kept.items() if key not in parameters)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
