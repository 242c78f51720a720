"""`TensorParallelStrategy`: cut a model's matrices over the tp axis, with or without sequence parallelism.

A model whose modules have twins needs no plan: each native is swapped for its twin. Anything else takes a plan
(`strategy/plan.py`). Both go through torch's `parallelize_module`, so parameters end up as DTensors on one mesh.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from fms_parallel.errors import LayoutError
from fms_parallel.modules.embedding import TPHead
from fms_parallel.modules.tp import TPModule, adopt, twin_of
from fms_parallel.strategy.base import Strategy
from fms_parallel.strategy.styles import PlannedStyle
from fms_parallel.strategy.ties import keep_ties


class TwinStyle(ParallelStyle):
    """The style that swaps a native module for its twin."""

    def __init__(self, sp: bool = False, parts: str = "all") -> None:
        super().__init__()
        self.sp, self.parts = sp, parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return adopt(module, device_mesh, self.sp, self.parts)


class TensorParallelStrategy(Strategy):
    """Tensor parallelism over a one-dimensional mesh.

    Args:
        mesh: the tp dimension.
        sp: keep norms, residuals and dropout on 1/tp of the tokens.
        loss_parallel: keep logits cut over the vocabulary up to the loss.
        parts: which halves of a block are cut, as `tp_parts` of a layout.
        plan: name -> style for modules without twins, as `generate_layer_plan` makes it.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        sp: bool = False,
        loss_parallel: bool = True,
        parts: str = "all",
        plan: Mapping[str, ParallelStyle] | None = None,
    ) -> None:
        self.mesh, self.sp, self.loss_parallel, self.plan = mesh, sp, loss_parallel, dict(plan or {})
        self.parts = parts

    def distribute(self, model: nn.Module) -> nn.Module:
        """Cut `model` in place.

        Raises:
            LayoutError: a module with parameters that has neither a twin nor a place in the plan; tied parameters that
                are cut differently; sp with a plan made without it, or with a plan beside twins; parts to leave whole
                that the model does not have.
        """
        if self.mesh.size() == 1:
            return model
        refuse_parts(model, self.parts)
        twins = {name: TwinStyle(self.sp, self.parts) for name in modules_with_twins(model)}
        self._check_plan(twins)
        with keep_ties(model):
            model = parallelize_module(model, self.mesh, {**twins, **self.plan})
        self._check_covered(model)
        for module in model.modules():
            if isinstance(module, TPHead):
                module.loss_parallel = self.loss_parallel
        return model

    def _check_plan(self, twins: Mapping[str, ParallelStyle]) -> None:
        """Both sides of a model must agree on the form of what they hand each other."""
        if any(isinstance(style, PlannedStyle) and style.sp != self.sp for style in self.plan.values()):
            raise LayoutError(
                f"the layout has sp={self.sp}, the plan was made without that: generate_layer_plan(..., sp={self.sp})."
            )
        if self.sp and twins and self.plan:
            raise LayoutError("sp with twins and a plan in one model: they keep tokens in different forms. Drop sp.")

    def _check_covered(self, model: nn.Module) -> None:
        """A parameter left as a plain tensor in a tp region has a wrong gradient and a right loss: refuse it."""
        lost = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if lost:
            shown = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
            raise LayoutError(
                f"tp={self.mesh.size()}: {len(lost)} parameters belong to modules without a twin or a style ({shown}). "
                "Give them a plan: generate_layer_plan(model, patterns)."
            )


def refuse_parts(model: nn.Module, parts: str) -> None:
    """Raises LayoutError when all of the model's modules are cut, whatever `parts` (`tp_parts` of a layout) says."""
    if parts != "all" and all(twin_of(module, parts) is twin_of(module) for module in model.modules()):
        raise LayoutError(
            f"tp_parts={parts}: {type(model).__name__} has no feed-forward of ours that could be left whole; drop it."
        )


def modules_with_twins(model: nn.Module) -> list[str]:
    """Names of the modules that have a twin and are not one yet, inner ones first."""
    names = [name for name, m in model.named_modules() if twin_of(m) is not None and not isinstance(m, TPModule)]
    return sorted(names, key=lambda name: -name.count("."))
