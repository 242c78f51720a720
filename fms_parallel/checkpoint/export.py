"""Weights out of a model, in any layout and any format: read piece by piece, each file by the rank nearest to it.

    file                 tensors               written by        who sends
    model-00001-of-2     layers of stage 0     a rank of stage 0     the other ranks of stage 0
    model-00002-of-2     layers of stage 1     a rank of stage 1     the other ranks of stage 1

It knows modules, adapters and the order that ranks must keep; what a file looks like is in `files.py`, how ranks read
together in `spread.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from fms_parallel.checkpoint.adapter import Adapter
from fms_parallel.checkpoint.agree import on_every_rank, rank_and_world
from fms_parallel.checkpoint.files import lay_out, put_in_place, synced, temporaries, write_file, write_text
from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.checkpoint.quantised import refuse_to_save
from fms_parallel.checkpoint.spread import Reading, busiest, spread_tensors
from fms_parallel.checkpoint.words import listed
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError


def save_weights(
    model: nn.Module,
    directory: str | Path,
    adapter: Adapter | None,
    *,
    extra_files: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write the model's weights as safetensors files. Collective over all ranks, whatever they hold of the model.

    The files are those of one process, byte for byte. No tensor is ever whole on a rank that does not hold it whole:
    a file's writer takes in `lazy.PIECE_BYTES` at a time. Tied weights are written once: under the name that the
    adapter's format gives them, or without an adapter under the first.

    Args:
        directory: the same for every rank, on a disk that all of them see.
        adapter: from native to the format; None writes native names and shapes.
        extra_files: name -> text of files beside the weights (`config.json`), written before them.
        max_shard_bytes: weights above this are spread over several files with an index.
    Raises:
        CheckpointError: on every rank, when any rank failed: a full disk, a folder that cannot be written, keys that
            the adapter does not know. Nothing half-written stays under a final name.
    """
    refuse_to_save(model)
    directory, rank = Path(directory), rank_and_world()[0]
    tensors, reading = spread_tensors(model)
    with on_every_rank(f"preparing {directory}"):
        native = {name: tensor for names, tensor in tensors.items() for name in (names if adapter else names[:1])}
        exported = adapter.from_native(dict(native)) if adapter else dict(native)
        files = lay_out(exported, max_shard_bytes)
        writers = _writers(exported, files, reading)
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in (extra_files or {}).items():
                write_text(directory / name, text)
    with temporaries(directory, files) as temporary:
        with on_every_rank(f"writing {directory}"):
            _write(exported, files, writers, temporary, reading)
        with on_every_rank(f"finishing {directory}"):
            if rank == 0:
                _check_seen(temporary, files)
                put_in_place(directory, temporary, exported, files)


def _writers(exported: Mapping[str, LazyTensor], files: Mapping[str, list[str]], reading: Reading) -> dict[str, int]:
    """File -> the rank that holds most of it."""
    found: dict[str, int] = {}
    for name, keys in files.items():
        reading.reader, reading.bytes_held = None, Counter({0: 0})
        for key in keys:
            for _ in exported[key].read_rows():
                pass
        found[name] = busiest(reading.bytes_held, Counter(found.values()))
    return found


def _write(
    exported: Mapping[str, LazyTensor],
    files: Mapping[str, list[str]],
    writers: Mapping[str, int],
    temporary: Mapping[str, Path],
    reading: Reading,
) -> None:
    """This rank's files, and its part in those of others."""
    failure: OSError | None = None
    for name, keys in files.items():
        reading.reader = writers[name]
        drawn = {key: _Drawn(exported[key]) for key in keys}
        try:
            if failure is None and writers[name] == rank_and_world()[0]:
                with synced(temporary[name]) as file:
                    write_file(file, drawn)
        except OSError as error:
            failure = error
        # Those who do not write, and who no longer can: nobody leaves while others send or wait.
        for tensor in drawn.values():
            for _ in tensor.read_rows():
                pass
    if failure is not None:
        raise failure


def _check_seen(temporary: Mapping[str, Path], files: Mapping[str, list[str]]) -> None:
    unseen = [name for name in files if not temporary[name].is_file()]
    if unseen:
        raise CheckpointError(
            f"rank 0 does not see what other ranks wrote ({listed('files', unseen)}): every rank must see the same "
            "folder. Use a shared file system."
        )


class _Drawn(LazyTensor):
    """Rows of a tensor, each read once however often somebody begins to read them."""

    def __init__(self, inner: LazyTensor) -> None:
        super().__init__(inner.shape, inner.dtype)
        self._inner, self._rows = inner, inner.read_rows()

    def _read(self, box: Box) -> Tensor:
        return self._inner.read(box)

    def read_rows(self) -> Iterator[Tensor]:
        """What is left of them."""
        while (rows := next(self._rows, None)) is not None:
            yield rows
