"""`get_model`: from an architecture's name to a model that is spread over the ranks and filled.

Everything that can be wrong with a request is said before a process group starts or a byte is read. It knows no
architecture: those are in the registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel.checkpoint.adapter import Adapter
from fms_parallel.checkpoint.export import save_weights
from fms_parallel.checkpoint.load import load_weights
from fms_parallel.checkpoint.low_rank import load_factors, save_factors
from fms_parallel.distributed.start import Launch, pick_device, require_group
from fms_parallel.errors import CheckpointError, ConfigError, unknown
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.low_rank import LowRank, is_adapter, without_adapters
from fms_parallel.shape import ModelShape
from fms_parallel.strategy.base import Strategy
from fms_parallel.strategy.compose import DTYPES as STORED_AS
from fms_parallel.strategy.compose import check_layout, compose
from fms_parallel.strategy.materialise import initialise, materialise

from .checked import checked
from .hf.pretrained import CONFIGURED, PRETRAINED, described
from .quantised import check_linear_type, drawn_tensors, quantised_filler
from .registry import REGISTRY, Architecture, config_of, list_sources, replaced
from .sources import check_described, open_native

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def find_model(
    architecture: str, variant: str | None, model_path: str | Path | None, overrides: dict[str, Any]
) -> tuple[Architecture, Any]:
    """The registered architecture and the config that a request means; errors as in `get_config`."""
    if architecture not in (PRETRAINED, CONFIGURED):
        known = REGISTRY.get(architecture)
        return known, checked(config_of(known, variant, overrides), known.name)
    if variant is not None:
        raise ConfigError(f"{architecture} has no variant {variant!r}: config.json gives every size; leave it out.")
    known, config = described(map(REGISTRY.get, REGISTRY.names()), model_path)
    return known, checked(replaced(known, config, overrides), known.name)


def get_config(
    architecture: str, variant: str | None = None, model_path: str | Path | None = None, **overrides: Any
) -> Any:
    """A variant's config with some fields replaced.

    Args:
        architecture: a registered name; or `hf_pretrained` or `hf_configured`, which read model_path/config.json.
    Raises:
        ConfigError: unknown architecture, variant or field, with the nearest known name.
    """
    return find_model(architecture, variant, model_path, overrides)[1]


def get_shape(architecture: str, variant: str | None = None, **overrides: Any) -> ModelShape:
    """The sizes of a variant, without building it."""
    shape: ModelShape = get_config(architecture, variant, **overrides).shape()
    return shape


def get_model(
    architecture: str,
    variant: str | None = None,
    model_path: str | Path | None = None,
    source: str | None = None,
    device_type: str = "cpu",
    data_type: str | torch.dtype | None = None,
    distributed_strategy: str | ParallelLayout | Strategy | None = None,
    checkpoint_sharding: str | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    seed: int = 0,
    compile_blocks: bool = False,
    fill: Callable[[nn.Module], None] | None = None,
    mesh: DeviceMesh | None = None,
    linear_type: str | None = None,
    linear_skip: tuple[str, ...] = (),
    adapters: LowRank | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model, spread it over the ranks, and fill it.

    Args:
        architecture: a registered name; or `hf_pretrained` (architecture and config from model_path/config.json) or
            `hf_configured` (the same, with weights drawn from `seed`). variant: one of its variants; the first if None.
        model_path: weights to load (a file, or a folder of them); None draws weights from `seed`.
        source: whose keys and files these are: `hf`, `meta`, `native`; None finds out.
        device_type: `cpu` or `cuda`. data_type: of the parameters (`fp32`, `bf16`, ... or a torch dtype); None is what
            the layout's precision asks for.
        distributed_strategy: None (one process), a layout string, a `ParallelLayout`, or a `Strategy` object.
        checkpoint_sharding: None or `layer`: how the files are cut is read from them; another word is refused.
        group: the ranks to spread over; only the whole world (None) is supported.
        seed: of the initial weights: the same seed gives the same global weights in every layout.
        compile_blocks: torch.compile each block.
        fill: writes the weights instead, say from a training checkpoint. mesh: the layout's, when it exists already.
        linear_type: how matrices are stored (`int8`); weights are rounded while they are read. None: in `data_type`.
        linear_skip: modules whose matrices are not, as `skip` of `modules.linear_types.quantise`.
        adapters: matrices that get low-rank adapters, drawn from `seed`; everything else is frozen.
        overrides: config fields to replace.
    Returns:
        the module, holding this rank's shards, with `.config` and `.parallel`.
    Raises:
        ConfigError, LayoutError, CheckpointError: naming the number, the rule and the way out.
    """
    known, config = find_model(architecture, variant, model_path, overrides)
    if architecture == CONFIGURED:
        model_path = None
    _check_request(known, model_path, source, checkpoint_sharding, group)
    dtype = dtype_of(data_type)
    launch = Launch.read()
    strategy = distributed_strategy if isinstance(distributed_strategy, Strategy) else None
    shape = config.shape()
    layout = ParallelLayout() if strategy else _layout(distributed_strategy, launch, shape)  # type: ignore[arg-type]
    check_layout(layout, shape=shape, model=known.build, compile_blocks=compile_blocks)
    check_linear_type(linear_type, linear_skip, layout, own_fill=fill is not None)
    if model_path is not None:
        check_described(known, config, Path(model_path))
    if layout.world_size > 1:
        require_group()
    device = pick_device(device_type, launch)
    with torch.device("meta"):
        model = known.build(config)
    if adapters is not None:
        _give_adapters(model, adapters, linear_type)
    if fill is not None and model_path is not None:
        raise ConfigError(f"model_path={str(model_path)!r} and fill both write the weights: give one of them.")
    if linear_type is not None:
        if model_path is None:
            tensors = drawn_tensors(model, seed, dtype or STORED_AS[layout.precision])
        else:
            tensors = open_native(known, config, Path(model_path), source)
        fill = quantised_filler(model, linear_type, linear_skip, tensors, str(model_path or f"seed {seed}"))
    fill = fill or _filler(known, config, model_path, source, seed)
    if adapters is not None and model_path is not None:
        fill = _beside_adapters(fill, seed)
    if strategy is not None:
        model = strategy.distribute(model if dtype is None else model.to(dtype))
        materialise(model, device)
        fill(model)
    else:
        model = compose(model, layout, device=device, mesh=mesh, fill=fill, compile_blocks=compile_blocks, dtype=dtype)
    model.architecture = known.name  # type: ignore[assignment]
    return model


def save_hf(model: nn.Module, folder: str | Path) -> None:
    """Write a model of `get_model` as a Hugging Face folder (config.json and safetensors). Collective over all ranks.

    Raises:
        ConfigError: its architecture or a field of its config has no Hugging Face form.
        CheckpointError: on every rank when any rank failed to write.
    """
    known = REGISTRY.get(getattr(model, "architecture", ""))
    if known.to_hf is None or "hf" not in known.adapters:
        raise ConfigError(f"{known.name} has no Hugging Face form.")
    text = json.dumps(known.to_hf(model.config), indent=2)
    with without_adapters(model):
        save_weights(model, folder, known.adapters["hf"](model.config), extra_files={"config.json": text})


def save_lora(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of a model of `get_model` as peft reads them beside the model of `save_hf`. Collective.

    Raises:
        ConfigError: it has no adapters, or no Hugging Face form.
    """
    save_factors(model, folder, _hf_names(model))


def load_lora(model: nn.Module, folder: str | Path) -> None:
    """Fill the adapters from what `save_lora` (or peft) wrote, in any layout. Collective.

    Raises:
        CheckpointError: adapters of other matrices or of another rank; of a fused matrix, parts with different A.
    """
    load_factors(model, folder, _hf_names(model))


def _hf_names(model: nn.Module) -> Adapter:
    known = REGISTRY.get(getattr(model, "architecture", ""))
    if "hf" not in known.adapters:
        raise ConfigError(f"{known.name} has no Hugging Face form.")
    return known.adapters["hf"](model.config)


def _give_adapters(model: nn.Module, adapters: LowRank, linear_type: str | None) -> None:
    from fms_parallel.auto.lora import add_low_rank

    if linear_type is not None:
        raise ConfigError(
            f"linear_type={linear_type!r} with adapters: such weights pass no gradient on to what is before them. "
            "Leave one of them out."
        )
    add_low_rank(model, adapters)


def _beside_adapters(fill: Callable[[nn.Module], None], seed: int) -> Callable[[nn.Module], None]:
    """Fills a model with adapters from weights that have none; the adapters start as `seed` says."""

    def filled(model: nn.Module) -> None:
        initialise(model, seed, only=is_adapter)
        with without_adapters(model):
            fill(model)

    return filled


def _layout(word: str | ParallelLayout | None, launch: Launch, shape: ModelShape) -> ParallelLayout:
    """None, and a `ParallelLayout` of one process, are one process whatever the launcher started."""
    if word is None or word == "":
        return ParallelLayout()
    if isinstance(word, ParallelLayout) and word.resolved and word.world_size == 1:
        return word
    world = dist.get_world_size() if dist.is_initialized() else launch.world_size
    return ParallelLayout.parse(word).resolve(world, launch.local_world_size, shape)


def _check_request(
    known: Architecture,
    model_path: str | Path | None,
    source: str | None,
    checkpoint_sharding: str | None,
    group: dist.ProcessGroup | None,
) -> None:
    if source is not None and source not in list_sources(known.name):
        raise ConfigError(unknown(f"source of {known.name}", source, list_sources(known.name)))
    if source is not None and model_path is None:
        raise ConfigError(f"source={source!r} without model_path: there is nothing to read.")
    if model_path is not None and not Path(model_path).exists():
        raise CheckpointError(f"{model_path}: no such file or folder.")
    if checkpoint_sharding not in (None, "layer"):
        raise ConfigError(
            f"checkpoint_sharding={checkpoint_sharding!r}: not needed, each rank reads its own slices of any "
            "files; leave it out."
        )
    if group is not None and group is not dist.group.WORLD:
        raise ConfigError("group: only the whole world is supported; leave it out and choose a layout.")


def dtype_of(data_type: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype by its short name; None stays None."""
    if isinstance(data_type, str):
        if data_type not in DTYPES:
            raise ConfigError(unknown("data_type", data_type, DTYPES))
        return DTYPES[data_type]
    return data_type


def _filler(
    known: Architecture, config: Any, model_path: str | Path | None, source: str | None, seed: int
) -> Callable[[nn.Module], None]:
    """What writes the parameters: a checkpoint's reader, or the seed."""
    if model_path is None:
        return lambda model: initialise(model, seed)
    tensors = open_native(known, config, Path(model_path), source)
    return lambda model: load_weights(model, tensors, source=str(model_path))
