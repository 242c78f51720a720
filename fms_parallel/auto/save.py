"""A model in any layout -> the files that its own library reads, under its own names.

Tensor by tensor: the ranks of its stage make it whole, the stage sends it to rank 0, rank 0 writes. No rank ever holds
more than one whole tensor beside its shards. It knows engines and files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fms_parallel.auto.blocks import canonical_names
from fms_parallel.auto.lora import is_adapter
from fms_parallel.auto.weights import disk_names, to_disk
from fms_parallel.checkpoint.agree import from_every_rank, on_every_rank, rank_and_world
from fms_parallel.checkpoint.files import write_weights
from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.distributed.boxes import Box

if TYPE_CHECKING:
    from fms_parallel.auto.engine import Engine


def save_pretrained(engine: Engine, folder: str | Path, max_shard_bytes: int) -> None:
    """Write the model's weights and, of a transformers model, its config. Collective over all ranks.

    Adapters are left out: merge them first, or save them with `save_lora`.

    Raises:
        CheckpointError: on every rank, when any rank failed.
    """
    folder = Path(folder)
    rank, _ = rank_and_world()
    whole = WholeTensors(engine)
    names = [name for name in whole.names if not is_adapter(name)]
    written = disk_names(engine.skeleton, names)
    pending = list(names)
    tensors: dict[str, LazyTensor] = {}
    for name, keys in written.items():
        for key, shape in keys:
            tensors[key] = Gathered(whole, name, key, shape, pending)
    with on_every_rank(f"preparing {folder}"):
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _save_config(engine.skeleton, folder)
    with on_every_rank(f"writing {folder}"):
        try:
            if rank == 0:
                write_weights(folder, tensors, max_shard_bytes=max_shard_bytes)
        finally:
            # The other ranks, and rank 0 after a failed write: nobody leaves a gather that others are in.
            for name in list(pending):
                whole.read(name)


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
        last: name and pieces on disk of what was read last: several keys may come of one tensor.
    """

    last: tuple[str, dict[str, Tensor]] = ("", {})

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


class Gathered(LazyTensor):
    """A tensor on its way to disk; reading it gathers what it is made of, once."""

    def __init__(self, whole: WholeTensors, name: str, key: str, shape: tuple[int, ...], pending: list[str]) -> None:
        super().__init__(shape, whole.likes[name].dtype)
        self.whole, self.name, self.key, self.pending = whole, name, key, pending

    def _read(self, box: Box) -> Tensor:
        if self.whole.last[0] != self.name:
            self.whole.last = ("", {})  # free the old one before the new one comes
            self.pending.remove(self.name)
            tensor = self.whole.read(self.name)
            assert tensor is not None
            self.whole.last = (self.name, to_disk(self.whole.engine.skeleton, self.name, tensor.cpu()))
        return self.whole.last[1][self.key][box.slices]

    def read_rows(self) -> Iterator[Tensor]:
        """All at once: the other ranks take part in one gather."""
        yield self.read_all()


def _save_config(skeleton: Any, folder: Path) -> None:
    config = getattr(skeleton, "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(skeleton).__name__]
        config.save_pretrained(str(folder))
