"""A model in any layout -> the files that its own library reads, under its own names.

Files are written by the ranks that hold most of what is in them, and tensors go there in pieces; where transformers
writes one of the module's tensors as several (experts), that one is whole on the file's writer for a moment. No rank
ever holds the model. It knows engines and names; how ranks write together is in `checkpoint/export.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.auto.blocks import canonical_names
from fms_parallel.auto.lora import is_adapter
from fms_parallel.auto.weights import disk_names, to_disk
from fms_parallel.checkpoint.agree import from_every_rank, on_every_rank, rank_and_world
from fms_parallel.checkpoint.export import save_weights
from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError
from fms_parallel.strategy.base import Parallel

if TYPE_CHECKING:
    from fms_parallel.auto.engine import Engine


def save_pretrained(engine: Engine, folder: str | Path, max_shard_bytes: int) -> None:
    """Write the model's weights and, of a transformers model, its config. Collective over all ranks.

    Adapters are left out: merge them first, or save them with `save_lora`.

    Raises:
        CheckpointError: on every rank, when any rank failed.
    """
    folder = Path(folder)
    with on_every_rank(f"preparing {folder}"):
        if rank_and_world()[0] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _save_config(engine.skeleton, folder)
    adapter: Any = DiskNames(engine.skeleton)
    save_weights(as_module(engine, once=True), folder, adapter, max_shard_bytes=max_shard_bytes)


def as_module(engine: Engine, once: bool = False) -> nn.Module:
    """This rank's parameters and persistent buffers in one module, under the model's own names.

    Args:
        once: of a parameter that two stages of this rank hold take one, for saving; else that is refused.
    """
    root = nn.Module()
    for name, parameter in engine.all_named():
        owner, attribute = _owner(root, name)
        if attribute in owner._parameters and once:
            continue
        if attribute in owner._parameters:
            raise CheckpointError(
                f"{name} is held by two stages of this rank, which a checkpoint has no names for: use a split or a "
                "schedule that puts them on different ranks."
            )
        owner.register_parameter(attribute, parameter)
    for name, tensor in engine.state_dict().items():
        owner, attribute = _owner(root, name)
        if name not in engine.first_names and attribute not in owner._parameters:
            owner.register_buffer(attribute, tensor)
    order = tuple(name for name in engine.skeleton.state_dict() if engine.first_names.get(name, name) == name)
    root.parallel = Parallel(engine.layout, engine.mesh, names=order)  # type: ignore[assignment]
    return root


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module for a name, made on the way, and the last word of the name."""
    *path, attribute = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root, attribute


class DiskNames:
    """Names in the module -> keys and tensors as its own library writes them; tied weights under their first name."""

    def __init__(self, skeleton: nn.Module) -> None:
        self.skeleton = skeleton

    def from_native(self, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """As `Adapter.from_native`."""
        first = canonical_names(self.skeleton)
        names = [name for name in tensors if first.get(name, name) == name and not is_adapter(name)]
        found: dict[str, LazyTensor] = {}
        for name, keys in disk_names(self.skeleton, names).items():
            one = tensors[name]
            if [shape for _, shape in keys] == [one.shape]:
                found[keys[0][0]] = one
            else:
                whole = Whole(self.skeleton, name, one)
                found.update({key: Written(whole, key, shape) for key, shape in keys})
        return found


class Whole:
    """The tensors that one of the module's is written as; they are read one after the other."""

    def __init__(self, skeleton: nn.Module, name: str, inner: LazyTensor) -> None:
        self.skeleton, self.name, self.inner = skeleton, name, inner

    def read(self, key: str) -> Tensor:
        """Without memory where the whole has none, on ranks that only send."""
        return to_disk(self.skeleton, self.name, self.inner.read_all())[key]


class Written(LazyTensor):
    """One of them."""

    def __init__(self, whole: Whole, key: str, shape: tuple[int, ...]) -> None:
        super().__init__(shape, whole.inner.dtype)
        self.whole, self.key = whole, key

    def _read(self, box: Box) -> Tensor:
        return self.whole.read(self.key)[box.slices]

    def read_rows(self) -> Iterator[Tensor]:
        """All at once: its rows would each make the whole one."""
        yield self.read_all()


def full_state(engine: Engine, which: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Parameters and persistent buffers, whole, on rank 0; an empty dict on the others. Collective.

    Args:
        which: of their names, the same on every rank.
    """
    whole = WholeTensors(engine)
    found = {name: whole.read(name) for name in whole.names if which(name)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class WholeTensors:
    """The engine's tensors, made whole one by one on rank 0. Every rank reads the same, in the same order.

    Attributes:
        names: of parameters (the first of tied ones) and persistent buffers, in the model's order.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        first = canonical_names(engine.skeleton)
        self.mine: dict[str, Tensor] = {}
        for name, tensor in engine.state_dict().items():
            self.mine.setdefault(first.get(name, name), tensor)
        held = from_every_rank(sorted(self.mine))
        everywhere = {name for names in held for name in names}
        self.likes = engine.skeleton.state_dict()
        self.names = [n for n in self.likes if n in everywhere and first.get(n, n) == n]
        self.homes: dict[str, int] = {}
        if engine.mesh is not None and engine.layout.pp > 1:
            places: list[Any] = [None] * engine.layout.pp
            dist.all_gather_object(places, sorted(self.mine), group=engine.mesh["pp"].get_group())
            self.homes = {name: min(r for r, names in enumerate(places) if name in names) for name in self.names}

    @torch.no_grad()
    def read(self, name: str) -> Tensor | None:
        """The whole tensor on rank 0, None elsewhere."""
        mesh, rank = self.engine.mesh, rank_and_world()[0]
        if mesh is None:
            return self.mine[name].detach()
        home, here = self.homes.get(name, 0), mesh["pp"].get_local_rank()
        whole: Tensor | None = None
        if here == home:
            tensor = self.mine[name].detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if home != 0 and rank in _first_pipeline(mesh):
            whole = self._sent(name, whole, home, here, mesh["pp"].get_group())
        return whole if rank == 0 else None

    def _sent(self, name: str, whole: Tensor | None, home: int, here: int, group: Any) -> Tensor | None:
        """From the stage that holds it to rank 0."""
        if here == home:
            assert whole is not None
            dist.send(whole.contiguous(), group=group, group_dst=0)
        elif here == 0:
            like = self.likes[name]
            whole = torch.empty(like.shape, dtype=like.dtype, device=self.engine.device)
            dist.recv(whole, group=group, group_src=home)
        return whole


def _first_pipeline(mesh: Any) -> set[int]:
    """The ranks of the pipeline that rank 0 is in."""
    return set(mesh.mesh.reshape(mesh.mesh.shape[0], -1)[:, 0].tolist())


def _save_config(skeleton: Any, folder: Path) -> None:
    config = getattr(skeleton, "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(skeleton).__name__]
        config.save_pretrained(str(folder))
