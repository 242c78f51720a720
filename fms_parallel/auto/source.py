"""Where a model comes from: a module, a transformers config, or a folder; and a copy of it without memory.

A rank needs the whole model's structure and never its parameters. Buffers that no checkpoint holds (rotary tables,
position ids) are made by the modules' own constructors, for real, while parameters are made on the meta device.
It knows transformers' classes by the names that configs carry; it imports it only when it is needed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.auto.blocks import canonical_names
from fms_parallel.errors import ConfigError

AUTO_CLASSES = {
    "causal_lm": ("AutoModelForCausalLM",),
    "masked_lm": ("AutoModelForMaskedLM",),
    "seq2seq": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "classification": ("AutoModelForImageClassification", "AutoModelForSequenceClassification"),
}
"""Task -> transformers' classes that can make a model of a config, when the config does not name one."""

INSTALL = "transformers models need transformers: pip install 'fms_parallel[hf]'."


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory, and real buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device; ties and buffers stay."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = meta
    return copy.deepcopy(model, memo)


def build_skeleton(source: Any, task: str | None = None) -> tuple[nn.Module, dict[str, Tensor], Path | None]:
    """The model without memory, the values it came with, and the folder of its weights.

    Args:
        source: a module (in memory or on meta), a transformers config, a folder with config.json and weights, or a
            function without arguments that builds the module: then its parameters never have memory.
    Returns:
        (skeleton, first parameter name -> value, folder or None).
    Raises:
        ConfigError: none of these, or a config that no class takes.
    """
    if isinstance(source, nn.Module):
        return skeleton_of(source), values_of(source), None
    if isinstance(source, str | Path):
        folder = Path(source)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{folder} has no config.json: give a folder that save_pretrained wrote, a config or a module."
            )
        return _from_config(_read_config(folder), task), {}, folder
    if hasattr(source, "model_type"):
        return _from_config(source, task), {}, None
    if callable(source):
        with parameters_on_meta():
            return source(), {}, None
    raise ConfigError(
        f"{type(source).__name__}: give an nn.Module, a transformers config, a folder, or a function that builds one."
    )


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """First name -> value of every parameter that has memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.is_meta}


def _read_config(folder: Path) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ConfigError(INSTALL) from None
    words = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "model_type" not in words:
        raise ConfigError(f"{folder}/config.json names no model_type: build the module yourself and give that.")
    return AutoConfig.from_pretrained(str(folder))


def _from_config(config: Any, task: str | None) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ConfigError(INSTALL) from None
    config = copy.deepcopy(config)
    named = [] if task is not None else list(getattr(config, "architectures", None) or [])[:1]
    if named and (made := getattr(transformers, named[0], None)) is not None:
        with parameters_on_meta():
            model: nn.Module = made(config)
        return model
    if task is None:
        raise ConfigError(
            f"a {config.model_type} config without architectures does not say which model: give task= "
            f"({', '.join(AUTO_CLASSES)}), or the module."
        )
    for name in AUTO_CLASSES.get(task, ()):
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            with parameters_on_meta():
                return auto.from_config(config)  # type: ignore[no-any-return]
    raise ConfigError(f"transformers has no model for task {task!r} and config {config.model_type!r}.")


# ---- initial values ---------------------------------------------------------------------------------------------


def draw(skeleton: nn.Module, blocks: Sequence[str], wanted: set[str], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Initial values of the parameters named in `wanted`, part by part: the same for every rank and layout.

    Each module draws as it says itself (transformers: `_init_weights`, torch: `reset_parameters`), with random numbers
    keyed by the seed and the module's name. One block is in memory at a time. What a module around a block says of what
    is inside (a rescaling by depth, a table of positions) is done to each block, the rest having no memory then.

    Raises:
        ConfigError: a parameter that no module says how to start.
    """
    first = canonical_names(skeleton)
    for prefix, part, recurse in _parts(skeleton, "", tuple(blocks)):
        names = {name: prefix + name for name, _ in part.named_parameters(recurse=recurse, remove_duplicate=False)}
        todo = {name: full for name, full in names.items() if first[full] == full and full in wanted}
        if not todo:
            continue
        real = _real_copy(part, list(names))
        with torch.no_grad():
            for name, module in reversed(list(real.named_modules()) if recurse else [("", real)]):
                _initialise(skeleton, module, prefix + name, seed)
            _initialise_from_outside(skeleton, real, prefix.removesuffix("."), seed)
        for name, full in todo.items():
            value = real.get_parameter(name).detach()
            if not bool(torch.isfinite(value).all()):
                raise ConfigError(
                    f"nobody says how {full} starts: give its module a reset_parameters(), load weights, or hand over "
                    "a model in memory."
                )
            yield full, value


def _parts(module: nn.Module, prefix: str, blocks: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, bool]]:
    """(prefix, module, whether all below is its) of what is drawn together: blocks, modules beside them."""
    yield prefix, module, False
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if full not in blocks and any(block.startswith(f"{full}.") for block in blocks):
            yield from _parts(child, f"{full}.", blocks)
        else:
            yield f"{full}.", child, True


def _real_copy(part: nn.Module, names: list[str]) -> nn.Module:
    """The part with memory in these parameters; NaN, until somebody writes them."""
    memo: dict[int, Any] = {}
    for name in names:
        parameter = part.get_parameter(name)
        value = torch.full(parameter.shape, math.nan, dtype=parameter.dtype)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return copy.deepcopy(part, memo)


def _initialise(skeleton: nn.Module, module: nn.Module, name: str, seed: int) -> None:
    """Let a module draw its own parameters, if it knows how."""
    own: Callable[..., Any] | None = getattr(skeleton, "_init_weights", None)
    reset: Callable[..., Any] | None = getattr(module, "reset_parameters", None)
    if own is None and reset is None:
        return
    state = torch.get_rng_state()
    torch.manual_seed(seed_of(seed, name))
    try:
        if own is not None:
            own(module)
        elif reset is not None:
            reset()
    finally:
        torch.set_rng_state(state)


def _initialise_from_outside(skeleton: nn.Module, real: nn.Module, name: str, seed: int) -> None:
    """Let the modules around a part do to it what they say (transformers only), innermost first."""
    if not name or not hasattr(skeleton, "_init_weights"):
        return
    path = name.split(".")
    parent = skeleton.get_submodule(".".join(path[:-1]))
    before = parent._modules[path[-1]]
    parent._modules[path[-1]] = real
    try:
        for depth in reversed(range(len(path))):
            outer = ".".join(path[:depth])
            _initialise(skeleton, skeleton.get_submodule(outer), f"{outer}>{name}", seed)
    finally:
        parent._modules[path[-1]] = before


def seed_of(seed: int, name: str) -> int:
    """The seed of what is drawn under a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
