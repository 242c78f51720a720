"""Low-rank adapters (LoRA, arXiv 2106.09685) on any model, before it is parallelised, and merged or saved after.

    y = W x + (alpha / r) B A x        W frozen, A [r, in] random, B [out, r] zero: training begins where W is

The adapters of `attn.q_proj` are its neighbours `attn.q_proj_lora_a` and `attn.q_proj_lora_b`, and a hook on `q_proj`
adds what they give: no name of the model changes, so plans, weights and saving work as without them, and stages, FSDP
and tp cut adapters with their blocks. Blocks of this library multiply by weights themselves: theirs are factors that
they know of (`modules/low_rank.py`). It knows modules and names; the engine knows ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.auto.source import seed_of
from fms_parallel.checkpoint.low_rank import peft_config, peft_key
from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.errors import ConfigError
from fms_parallel.modules.linear import Multiplies
from fms_parallel.modules.low_rank import A, B, Factor, LowRank, give_factors, is_adapter, matrix_of
from fms_parallel.modules.tp import TPModule, twin_of
from fms_parallel.strategy.base import Parallel

if TYPE_CHECKING:
    from fms_parallel.auto.engine import Engine

TP_WORDS = {
    "colwise": (None, "colwise"),
    "colwise_gather": (None, "colwise_gather"),
    "rowwise": ("rowwise", None),
}
"""Word of the adapted layer -> words of A and B; None is whole on every rank."""


class Add:
    """The hook of an adapted layer: adds what its adapters give. An object, so that copies of a model get their own."""

    def __init__(self, a: nn.Module, b: nn.Module, scale: float) -> None:
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """`output + scale * B A x`."""
        return output + self.b(self.a(args[0])) * self.scale


def add_lora(
    model: nn.Module, targets: str | Sequence[str], rank: int = 8, alpha: float = 16.0, train_also: str | None = None
) -> list[str]:
    """Give linear layers adapters and freeze everything else, in place. Call it before `parallelize`.

    Args:
        targets: last words of module names (`["q_proj", "v_proj"]`), or one regular expression for whole names.
        rank: r. alpha: adapters count alpha / r. train_also: expression for names of parameters to train as well.
    Returns:
        the names of the adapted layers.
    Raises:
        ConfigError: nothing matches, or something that matches is no linear layer that a block multiplies by.
    """
    names = [name for name, module in model.named_modules() if name and _matches(name, targets)]
    if rank < 1:
        raise ConfigError(f"LoRA rank {rank}: must be >= 1, usually 8.")
    if not names:
        raise ConfigError(f"LoRA targets {targets!r} match no module of {type(model).__name__}.")
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    for name, parent in parents.items():
        if not _multiplies(parent, name):
            _sizes(name, model.get_submodule(name))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parent in parents.items():
        if _multiplies(parent, name):
            give_factors(parent, name.rpartition(".")[2], rank, alpha / rank, key=f"0/{name}")
        else:
            _hook(parent, name, model.get_submodule(name), rank, alpha)
    for name, parameter in model.named_parameters():
        if train_also is not None and re.fullmatch(train_also, name):
            parameter.requires_grad_(True)
    model.lora = {"rank": rank, "alpha": alpha, "targets": names}  # type: ignore[assignment]
    return names


def add_low_rank(model: nn.Module, wanted: LowRank) -> list[str]:
    """`add_lora` as one value says it."""
    return add_lora(model, wanted.targets, wanted.rank, wanted.alpha)


def _multiplies(parent: nn.Module, name: str) -> bool:
    """Whether a block multiplies by this child's weight itself, as those of this library do; a hook would never run."""
    if isinstance(parent, Multiplies) and any(name.rpartition(".")[2] in each for each in parent.groups().values()):
        if isinstance(parent.get_submodule(name.rpartition(".")[2]).weight, DTensor):
            raise ConfigError(f"LoRA target {name} is spread over ranks already: give adapters before that.")
        return True
    if twin_of(parent) is not None or isinstance(parent, TPModule):
        raise ConfigError(
            f"LoRA target {name}: {type(parent).__name__} uses its children's weights without calling them, so "
            "adapters beside them would never run. Matrices of attention and feed-forward blocks can have them."
        )
    return False


def _hook(parent: nn.Module, name: str, layer: nn.Module, rank: int, alpha: float) -> None:
    """Adapters beside a layer that is called."""
    word = name.rpartition(".")[2]
    wide, high = _sizes(name, layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    made: dict[str, Any] = {"bias": False, "dtype": weight.dtype, "device": weight.device}
    a, b = nn.Linear(wide, rank, **made), nn.Linear(rank, high, **made)
    nn.init.zeros_(b.weight)
    parent.add_module(word + A, a)
    parent.add_module(word + B, b)
    layer.register_forward_hook(Add(a, b, alpha / rank))


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name.rpartition(".")[2] in targets


def _sizes(name: str, layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer; transformers' Conv1D keeps its weight as `[in, out]`."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if _is_transposed(layer) and isinstance(layer.weight, Tensor):
        return layer.weight.shape[0], layer.weight.shape[1]
    raise ConfigError(f"LoRA target {name} is a {type(layer).__name__}: adapters go to linear layers.")


def adapter_patterns(model: nn.Module, patterns: dict[str, Any]) -> dict[str, Any]:
    """A tensor plan with words for the adapters of the layers that it cuts."""
    found = dict(patterns)
    for name in getattr(model, "lora", {}).get("targets", ()):
        word = next((w for p, w in patterns.items() if re.fullmatch(p, name)), None)
        for suffix, of_adapter in zip((A, B), TP_WORDS.get(str(word), (None, None)), strict=True):
            if of_adapter is not None:
                found[re.escape(name + suffix)] = of_adapter
    return found


def draw_adapter(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Initial value of an adapter's weight: B zero, A uniform in +-1/sqrt(in), the same in every layout."""
    if name.endswith(f"{B}.weight"):
        return torch.zeros(*shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    bound = shape[-1] ** -0.5
    return torch.empty(*shape, dtype=dtype).uniform_(-bound, bound, generator=generator)


# ---- merge, save ------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_lora(model: nn.Module | Engine) -> None:
    """Add each `scale * B A` to its matrix, in place: outputs stay as they are, and the adapters are gone.

    Works on a module, on one that `get_model` spread, and on an engine, in any layout (collective then). An engine
    keeps its adapters with B at zero, where they began: it can go on training. What is frozen stays frozen.
    """
    keeps = hasattr(model, "stages")
    stages = [stage.model for stage in model.stages] if keeps else [model]  # type: ignore[union-attr]
    for module in stages:
        assert isinstance(module, nn.Module)
        for layer, a, b, scale in list(_adapted(module)):
            weight: Tensor = layer.weight  # type: ignore[assignment]
            second = _whole(b)
            delta = (second.flatten(0, -2) @ _whole(a)) * scale
            delta = delta.T if _is_transposed(layer) else delta.view(*second.shape[:-1], delta.shape[-1])
            local_tensor(weight).add_(delta[local_box(weight).slices])
            local_tensor(b).zero_()
        if not keeps:
            _drop(module)


def _drop(model: nn.Module) -> None:
    """Forget the adapters: hooks, modules, and their names."""
    beside: set[int] = set()
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Add):
                del module._forward_hooks[key]
                beside |= {id(hook.a), id(hook.b)}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, Factor) or id(child) in beside:
                del module._modules[name]
        if isinstance(module, Multiplies):
            vars(module).pop("adapted", None)
    vars(model).pop("lora", None)
    if isinstance(parallel := getattr(model, "parallel", None), Parallel):
        names = tuple(name for name in parallel.names if not is_adapter(name))
        elsewhere = frozenset(name for name in parallel.elsewhere if not is_adapter(name))
        model.parallel = replace(parallel, names=names, elsewhere=elsewhere)  # type: ignore[assignment]


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, Tensor, float]]:
    """(layer, A, B, scale) of every adapted matrix."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, Add):
                yield module, hook.a.weight, hook.b.weight, hook.scale  # type: ignore[misc]
        for word, scale in getattr(module, "adapted", {}).items():
            a, b = (getattr(module, word + suffix).weight for suffix in (A, B))
            yield getattr(module, word), a, b, scale


def _is_transposed(layer: nn.Module) -> bool:
    """transformers' Conv1D keeps its weight as `[in, out]`."""
    return type(layer).__name__ == "Conv1D"


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_lora(engine: Engine, folder: str | Path) -> None:
    """Write the adapters alone, as peft reads them. Collective."""
    from fms_parallel.auto.save import full_state
    from fms_parallel.checkpoint.agree import on_every_rank, rank_and_world
    from fms_parallel.checkpoint.files import write_text, write_weights
    from fms_parallel.checkpoint.lazy import MemoryTensor

    folder, lora = Path(folder), getattr(engine.skeleton, "lora", None)
    if lora is None:
        raise ConfigError("this model has no adapters: add_lora(model, ...) before parallelize.")
    state = full_state(engine, is_adapter)
    with on_every_rank(f"writing {folder}"):
        if rank_and_world()[0] == 0:
            write_weights(folder, {_peft_name(name): MemoryTensor(value.cpu()) for name, value in state.items()})
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
            turned = any(_is_transposed(module) for module in engine.skeleton.modules())
            words = peft_config(lora["rank"], lora["alpha"], lora["targets"], turned)
            write_text(folder / "adapter_config.json", words)


def _peft_name(name: str) -> str:
    return peft_key(str(matrix_of(name)), f"{A}." in name)


def load_lora(engine: Engine, folder: str | Path) -> None:
    """Fill the adapters from what `save_lora` (or peft) wrote; every rank reads its own pieces.

    Raises:
        CheckpointError: an adapter is missing or has another shape.
    """
    from fms_parallel.auto.build import write
    from fms_parallel.checkpoint.files import open_weights
    from fms_parallel.errors import CheckpointError

    stored = open_weights(Path(folder) / "adapter_model.safetensors")
    with torch.no_grad():
        for stage in engine.stages:
            for name, parameter in stage.model.named_parameters():
                if is_adapter(name):
                    if _peft_name(name) not in stored:
                        raise CheckpointError(f"{folder} has no {_peft_name(name)}: adapters of another model.")
                    write(parameter, stored[_peft_name(name)])
