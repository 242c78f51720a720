"""Files that torch.save wrote (`.bin`, `.pth`, `.pt`): mapped, never read whole, and only if they hold plain tensors.

Pickled code is never run. It knows one file; folders and indices are in `files.py`, Meta's numbered files in `meta.py`.
"""

from __future__ import annotations

from os import SEEK_CUR
from pathlib import Path
from struct import unpack
from typing import BinaryIO
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor, nn

from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError

KEPT_BYTES = 1 << 23
"""What reads of one file may leave mapped in memory: after so many bytes it is mapped anew."""

_WAY_OUT = (
    "Only files of plain tensors in torch's zip format are read, because others can run code. Convert it to "
    "safetensors where you trust it."
)


def open_torch(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file by key; no element is read.

    Raises:
        CheckpointError: it is torn, holds code, or anything but a dict of dense tensors under names.
    """
    _check_archive(path)
    file = TorchFile(path)
    return {key: MappedTensor(file, key, tensor) for key, tensor in file.tensors().items()}


class TorchFile:
    """One mapped file. Pages that were read stay in memory as long as the mapping does, so it is dropped at times."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[str, Tensor] | None = None
        self._touched = 0

    def tensors(self) -> dict[str, Tensor]:
        """The mapped tensors."""
        if self._mapped is None:
            self._mapped, self._touched = _load(self.path), 0
        return self._mapped

    def read(self, key: str, box: Box) -> Tensor:
        """A copy of what lies in `box`."""
        tensor = self.tensors().get(key)
        if tensor is None:
            raise CheckpointError(f"{self.path}: {key} is no longer there.")
        found = tensor[box.slices].clone(memory_format=torch.contiguous_format)
        self._touched += found.nbytes
        if self._touched > KEPT_BYTES:
            self._mapped = None
        return found


class MappedTensor(LazyTensor):
    """A tensor of a `TorchFile`."""

    def __init__(self, file: TorchFile, key: str, like: Tensor) -> None:
        super().__init__(like.shape, like.dtype)
        self._file, self._key = file, key

    def _read(self, box: Box) -> Tensor:
        return self._file.read(self._key, box)


def _check_archive(path: Path) -> None:
    """torch trusts the archive's tables: a flipped bit there, or in the pickle, could put other elements in a tensor.

    All but the elements is compared with its check sum, and where elements begin and end with what is around them.
    """
    try:
        with path.open("rb") as file, ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
            for info, end in zip(infos, ends, strict=True):
                with archive.open(info) as entry:  # compares the names in both tables
                    if "/data/" not in info.filename:
                        entry.read()
                if not _adds_up(file, info, end):
                    raise CheckpointError(f"{path} is damaged: the header of {info.filename} in it does not add up.")
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises whatever its parts raise
        raise CheckpointError(f"{path} was not loaded: {error}. {_WAY_OUT}") from error


def _adds_up(file: BinaryIO, info: ZipInfo, end: int) -> bool:
    """Whether header, name, extra field, content and trailing sizes (0, 16 or 24 bytes) of a record reach to `end`."""
    file.seek(info.header_offset + 26)
    name, extra = unpack("<HH", file.read(4))
    file.seek(name, SEEK_CUR)
    rest = file.read(extra)  # pieces of (identity, length, content), each length 2 bytes
    while len(rest) >= 4 and len(rest) >= (piece := 4 + unpack("<H", rest[2:4])[0]):
        rest = rest[piece:]
    return not rest and end - (info.header_offset + 30 + name + extra + info.compress_size) in (0, 16, 24)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever its parts raise; each means that this file cannot be used
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} was not loaded: {reason} {_WAY_OUT}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
    for key, value in content.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a plain tensor under a name.")
    return content


def _is_plain(value: object) -> bool:
    """Dense, on the CPU, and no subclass that computes something else when it is sliced."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
