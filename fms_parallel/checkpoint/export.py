"""Weights out of a model, in any layout and any format: gathered one tensor at a time, written by rank 0.

It knows modules, adapters and the order that ranks must keep; the files themselves are written by `files.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.checkpoint.adapter import Adapter
from fms_parallel.checkpoint.agree import on_every_rank, rank_and_world
from fms_parallel.checkpoint.files import write_text, write_weights
from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.checkpoint.slots import slots_of
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError
from fms_parallel.strategy.base import parallel_of


def save_weights(
    model: nn.Module,
    directory: str | Path,
    adapter: Adapter | None,
    *,
    extra_files: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write the model's weights as safetensors files. Collective over all ranks; each takes part in every gather.

    Tied weights are written once: under the name that the adapter's format gives them, or without an adapter under
    the first. At any time a rank holds one gathered tensor beside its shards.

    Args:
        adapter: from native to the format; None writes native names and shapes.
        extra_files: name -> text of files beside the weights (`config.json`), written before them.
        max_shard_bytes: weights above this are spread over several files with an index.
    Raises:
        CheckpointError: on every rank, when any rank failed: a full disk, a folder that cannot be written, keys that
            the adapter does not know. Nothing half-written stays under a final name.
    """
    if parallel_of(model).pipeline is not None:
        raise CheckpointError("weights are not written from pipeline stages yet: load the run without pp, then export.")
    directory = Path(directory)
    rank, _ = rank_and_world()
    with on_every_rank(f"preparing {directory}"):
        exported = _exported(model, adapter)
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in (extra_files or {}).items():
                write_text(directory / name, text)
    with on_every_rank(f"writing {directory}"):
        pending = dict(exported)
        try:
            if rank == 0:
                reads = {key: _Tracked(key, tensor, pending) for key, tensor in exported.items()}
                write_weights(directory, reads, max_shard_bytes=max_shard_bytes)
        finally:
            # The other ranks, and rank 0 after a failed write: nobody leaves a gather that others are in.
            for tensor in pending.values():
                tensor.read_all()


def _exported(model: nn.Module, adapter: Adapter | None) -> dict[str, LazyTensor]:
    """Lazy tensors whose reading gathers, under the names to be written. The same, in the same order, on every rank."""
    gatherer = _Gatherer()
    native: dict[str, LazyTensor] = {}
    for slot in slots_of(model):
        slot.box()  # refuses placements that do not gather to what was sharded
        gathered = GatheredTensor(slot.tensor, gatherer)
        native.update(dict.fromkeys(slot.names if adapter else slot.names[:1], gathered))
    return adapter.from_native(native) if adapter else native


class _Gatherer:
    """Makes parameters whole and keeps the last one: parts of a fused tensor are read one after the other."""

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._full: Tensor | None = None

    @torch.no_grad()
    def full(self, tensor: Tensor) -> Tensor:
        """The full tensor; collective over its mesh unless it was asked for last time."""
        if self._full is None or self._source is not tensor:
            self._source = self._full = None  # free the old one before the new one comes
            self._full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
            self._source = tensor
        return self._full


class GatheredTensor(LazyTensor):
    """A parameter of any layout as a lazy tensor. Reading is collective: all ranks read the same, in the same order."""

    def __init__(self, tensor: Tensor, gatherer: _Gatherer) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self._tensor = tensor
        self._gatherer = gatherer

    def _read(self, box: Box) -> Tensor:
        return self._gatherer.full(self._tensor)[box.slices]


class _Tracked(LazyTensor):
    """Passes reads on, and strikes its key from the list of those that are still to be read."""

    def __init__(self, key: str, inner: LazyTensor, pending: dict[str, LazyTensor]) -> None:
        super().__init__(inner.shape, inner.dtype)
        self._key = key
        self._inner = inner
        self._pending = pending

    def _read(self, box: Box) -> Tensor:
        del self._pending[self._key]
        return self._inner.read(box)

    def read_rows(self) -> Iterator[Tensor]:
        """All at once: the other ranks take part in one gather."""
        yield self.read_all()
