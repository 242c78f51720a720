"""Meta's checkpoint files: `consolidated.00.pth` .. one per rank of the training that wrote them, each with its slices.

    4 files, wq [E, E] cut along dim 0:   file 0 holds rows 0 .. E/4, file 1 rows E/4 .. E/2, ...
             wo [E, E] cut along dim 1, norms whole in every file

Opened they are one dict of full tensors whose boxes are read from the files that they meet, so any number of files
loads into any layout. It knows files and cuts; which key is cut where is the model's to say.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

from fms_parallel.checkpoint.files import WRITING, open_weights, sync_folder
from fms_parallel.checkpoint.lazy import Agreeing, Concatenated, LazyTensor, Section, copy_box
from fms_parallel.checkpoint.template import Template
from fms_parallel.checkpoint.torch_files import KEPT_BYTES
from fms_parallel.checkpoint.words import listed
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError, ConfigError

_NAME = re.compile(r"consolidated\.(\d\d)\.pth")


@dataclass(frozen=True)
class Cut:
    """Where the tensors of one kind are cut.

    Attributes:
        key: template. dims: the dimension; none when every file holds the tensor whole. Of several, writing takes the
            first and reading the one that gives `shape`: Llama 3 cuts its embedding along the vocabulary, Llama 2
            along the width.
        shape: of the full tensor, needed when there are several dims.
    """

    key: str
    dims: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class MetaFiles:
    """How a model's tensors lie in Meta's files.

    Attributes:
        cuts: one for every key.
        most: files that can be written: each holds a whole kv head.
    """

    cuts: tuple[Cut, ...]
    most: int

    def fits(self, path: Path) -> bool:
        """Whether this is one of Meta's files or a folder of them."""
        return bool(_NAME.fullmatch(path.name)) if path.is_file() else bool(_numbered(path))

    def open(self, path: Path) -> dict[str, LazyTensor]:
        """Full tensors by key; no element is read.

        Raises:
            CheckpointError: no such files, a number that is missing, a file that `open_weights` refuses, a key without
                a cut or that another file lacks, pieces that do not fit together.
        """
        files = [path] if path.is_file() else [path / name for name in _numbered(path)]
        numbers = [int(file.name.split(".")[1]) for file in files if _NAME.fullmatch(file.name)]
        if not files or len(files) != len(numbers):
            raise CheckpointError(f"{path} holds no consolidated.00.pth: is it a folder of Meta's files?")
        if path.is_dir() and numbers != list(range(len(files))):
            raise CheckpointError(f"{path} has files {numbers} of Meta's numbered ones: one is missing.")
        opened = [open_weights(file) for file in files]
        self._check_keys(files, opened)
        return {key: self._joined(key, [tensors[key] for tensors in opened]) for key in opened[0]}

    def _check_keys(self, files: Sequence[Path], opened: Sequence[Mapping[str, LazyTensor]]) -> None:
        for file, tensors in zip(files, opened, strict=True):
            if wrong := sorted(tensors.keys() ^ opened[0].keys()):
                raise CheckpointError(
                    f"{file} and {files[0].name} must have the same keys; {listed('differing', wrong)}."
                )

    def _cut(self, key: str) -> Cut:
        for cut in self.cuts:
            if Template(cut.key).match(key) is not None:
                return cut
        raise CheckpointError(f"{key} is no key of Meta's: nothing says how it is cut over the files.")

    def _joined(self, key: str, pieces: Sequence[LazyTensor]) -> LazyTensor:
        if len(pieces) == 1:
            return pieces[0]
        try:
            dims = self._cut(key).dims
            if not dims:
                return Agreeing(pieces, f"the {len(pieces)} files hold it whole")
            if len(dims) == 1:
                return Concatenated(pieces, dims[0])
            return self._fitting(self._cut(key), pieces)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from error

    @staticmethod
    def _fitting(cut: Cut, pieces: Sequence[LazyTensor]) -> LazyTensor:
        for dim in cut.dims:
            whole = list(pieces[0].shape)
            whole[dim] *= len(pieces)
            if tuple(whole) == cut.shape:
                return Concatenated(pieces, dim)
        raise CheckpointError(f"{len(pieces)} pieces of shape {pieces[0].shape} do not make {cut.shape}.")

    # ---- writing ------------------------------------------------------------------------------------------------

    def write(self, directory: Path, tensors: Mapping[str, LazyTensor], files: int = 1) -> None:
        """Write `files` files; one piece of a tensor is in memory at a time. Earlier files of these names go.

        Raises:
            ConfigError: so many files cannot be. CheckpointError: a key without a cut, or the disk's error.
        """
        if not 1 <= files <= min(self.most, 100):
            raise ConfigError(f"{files} of Meta's files: this model can be cut into 1 to {min(self.most, 100)}.")
        pieces = [self._pieces(tensors, index, files) for index in range(files)]
        names = [f"consolidated.{index:02d}.pth" for index in range(files)]
        temporary = [directory / f"{name}{WRITING}" for name in names]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for path, mine in zip(temporary, pieces, strict=True):
                _write(path, mine)
            for name in _numbered(directory):
                (directory / name).unlink()
            for path, name in zip(temporary, names, strict=True):
                path.replace(directory / name)
            sync_folder(directory)
        except OSError as error:
            raise CheckpointError(f"{directory}: weights were not written: {error}.") from error
        finally:
            for path in temporary:
                with suppress(OSError):
                    path.unlink()

    def _pieces(self, tensors: Mapping[str, LazyTensor], index: int, count: int) -> dict[str, LazyTensor]:
        """What file `index` of `count` holds."""
        pieces: dict[str, LazyTensor] = {}
        for key, tensor in tensors.items():
            dims = self._cut(key).dims[:1] if count > 1 else ()
            for dim in dims:
                if tensor.shape[dim] % count:
                    raise ConfigError(f"{key} {list(tensor.shape)} does not divide by {count} files along dim {dim}.")
                size = tensor.shape[dim] // count
                tensor = Section.along(tensor, dim, index * size, size)
            pieces[key] = tensor
        return pieces


def _numbered(folder: Path) -> list[str]:
    """Names of Meta's files in this folder, in order."""
    return sorted(path.name for path in folder.glob("consolidated.*.pth") if _NAME.fullmatch(path.name))


def _write(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """A file as torch.save lays it out: first its skeleton without elements, then each tensor into its place.

    The file is mapped to be written to, and mapped anew now and then: what was written leaves memory with the mapping.
    """
    skeleton = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in tensors.items()}
    try:
        with skip_data():  # no element of these is ever touched, so none takes memory
            torch.save(skeleton, path)
    except RuntimeError as error:  # how torch says that the disk refused
        raise CheckpointError(f"{path.parent}: weights were not written, the disk may be full: {error}.") from error
    _take_room(path)
    places: dict[str, Tensor] = {}
    written = 0
    for key, tensor in tensors.items():
        if not places or written > KEPT_BYTES:
            places.clear()
            with set_default_mmap_options(mmap.MAP_SHARED):
                places.update(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            written = 0
        copy_box(tensor, Box.whole(tensor.shape), places[key])
        written += tensor.nbytes
    places.clear()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _take_room(path: Path) -> None:
    """Have the disk keep room for every byte: a mapped page that it has no room for kills the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
