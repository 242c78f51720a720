"""Weight files: safetensors in and out, `.bin` / `.pth` / `.pt` in (`torch_files.py`), one file or a folder of them.

Opening reads headers only. Everything that a file, a folder or an index can have wrong is found here and named, before
any model sees it. Pickled code is never run. It knows files and lazy tensors; it knows no models and no ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fms_parallel.checkpoint.lazy import FileTensor, LazyTensor
from fms_parallel.checkpoint.torch_files import open_torch
from fms_parallel.errors import CheckpointError
from fms_parallel.log import get_logger

logger = get_logger(__name__)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Names of dtypes in safetensors headers."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WRITING = ".writing"
"""Ending of a file or folder that is not finished."""

_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PREFERRED = ("*.safetensors", "pytorch_model*.bin", "*.bin", "*.pth", "*.pt")


# ---- reading ----------------------------------------------------------------------------------------------------


def open_weights(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors of a weight file, or of a folder of them, by key. Only headers are read.

    A folder's `*.index.json` says which of its files hold what; without one, all its safetensors files (or, lacking
    those, its `.bin`, `.pth` or `.pt` files) belong together.

    Raises:
        CheckpointError: naming the file and what is wrong with it: missing, empty, truncated, a corrupt header, not
            listed by or not as listed by the index, a key in two files, anything but plain tensors in a pickle.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder.")
    if path.is_file():
        return _open_file(path)
    for pattern in _PREFERRED:
        indices, files = sorted(path.glob(f"{pattern}.index.json")), sorted(path.glob(pattern))
        if len(indices) > 1:
            raise CheckpointError(
                f"{path} holds {len(indices)} indices: {_names(indices)}. Leave the one that is meant."
            )
        if indices:
            return _open_indexed(indices[0], files)
        if files:
            return _merged({file: _open_file(file) for file in files})
    raise CheckpointError(f"{path} holds no weights; looked for {', '.join(_PREFERRED)}.")


def _merged(files: Mapping[Path, dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    holder: dict[str, Path] = {}
    for file, tensors in files.items():
        for key, tensor in tensors.items():
            if key in holder:
                raise CheckpointError(f"{key} is in {holder[key]} and in {file.name}: which one is meant?")
            found[key], holder[key] = tensor, file
    return found


def _open_indexed(index: Path, present: Sequence[Path]) -> dict[str, LazyTensor]:
    """The files that an index lists, each checked against it key by key. `present`: weight files beside it."""
    listed: dict[str, set[str]] = {}
    for key, name in _weight_map(index).items():
        listed.setdefault(name, set()).add(key)
    files = {}
    for name, keys in sorted(listed.items()):
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{index} lists {name!r}, and there is no such file beside it.")
        files[file] = _open_file(file)
        wrong = keys ^ files[file].keys()
        if wrong:
            key = min(wrong)
            where = "in the file but not in the index" if key in files[file] else "in the index but not in the file"
            raise CheckpointError(f"{file} is not as {index.name} says: {len(wrong)} keys differ, {key} is {where}.")
    unlisted = [file for file in present if file not in files]
    if unlisted:
        logger.warning("%s does not list %s: not read.", index, _names(unlisted))
    return _merged(files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not readable as JSON: {error}.") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index}: needs a 'weight_map' from every key to its file.")
    return found


def _open_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix not in _READERS:
        raise CheckpointError(f"{path}: unknown kind of weight file; known are {', '.join(_READERS)}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes). Copy or download it again.")
    return _READERS[path.suffix](path)


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                entry = file.get_slice(name)
                kind = entry.get_dtype()
                if kind not in DTYPES:
                    raise CheckpointError(f"{path}: {name} is of type {kind}, which is not supported.")
                found[name] = FileTensor(path, name, entry.get_shape(), DTYPES[kind])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}. Copy or download it again.") from error
    return found


_READERS: dict[str, Callable[[Path], dict[str, LazyTensor]]] = {
    ".safetensors": _open_safetensors,
    **dict.fromkeys((".bin", ".pth", ".pt"), open_torch),
}


# ---- writing ----------------------------------------------------------------------------------------------------


def write_weights(
    directory: str | Path,
    tensors: Mapping[str, LazyTensor],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write `model.safetensors`, or `model-0000i-of-0000n.safetensors` with an index, as Hugging Face lays them out.

    Tensors are read in the order of `tensors`, each once and some rows at a time: no more than those are in memory.
    Everything is written under temporary names and synced; then earlier weights of these names are removed and the new
    ones renamed, the index last. A failure before that leaves the folder's weights as they were; a crash in the middle
    leaves a folder that lacks files, never one that mixes two models.

    Args:
        metadata: text for every file's header, beside `format: pt`, which transformers asks for.
        max_shard_bytes: a larger tensor gets a file of its own.
    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or a dtype that safetensors has no name for.
    """
    directory = Path(directory)
    files = lay_out(tensors, max_shard_bytes)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with temporaries(directory, files) as temporary:
            for name, keys in files.items():
                with synced(temporary[name]) as file:
                    write_file(file, {key: tensors[key] for key in keys}, metadata)
            put_in_place(directory, temporary, tensors, files)
    except OSError as error:
        raise CheckpointError(f"{directory}: weights were not written: {error}.") from error


def lay_out(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> dict[str, list[str]]:
    """File -> the keys in it, in order: a new file where the next tensor would go over the limit.

    Raises:
        CheckpointError: a dtype that safetensors has no name for.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{key} is of type {tensor.dtype}, which safetensors files cannot hold.")
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": keys for i, keys in enumerate(shards)}


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all. Raises OSError."""
    with temporaries(path.parent, [path.name]) as temporary:
        with synced(temporary[path.name]) as file:
            file.write(text.encode())
        temporary[path.name].replace(path)
    sync_folder(path.parent)


def sync_folder(directory: Path) -> None:
    """Make renames in this folder survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shards(tensors: Mapping[str, LazyTensor], limit: int) -> list[list[str]]:
    """Keys in order, cut where the next tensor would go over the limit."""
    shards: list[list[str]] = [[]]
    room = limit
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= tensor.nbytes
    return shards


def _index(tensors: Mapping[str, LazyTensor], shards: Mapping[str, Sequence[str]]) -> bytes:
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def write_file(file: BinaryIO, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file: length of the header (8 bytes), header (JSON, padded to 8 bytes), then the tensors.

    Args:
        metadata: text for the header, beside `format: pt`, which transformers asks for.
    Raises:
        OSError: and then some tensors, or rows of one, were not read.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    # Widest types first: then every tensor begins at a multiple of its element size, as readers that map it need.
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key, tensor in tensors.items():
        file.seek(8 + len(text) + header[key]["data_offsets"][0])
        for rows in tensor.read_rows():
            _write_tensor(file, rows)


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """The elements in memory order, without a copy and without numpy (which torch can do without)."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel():
        file.write(memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())))


@contextmanager
def temporaries(directory: Path, names: Iterable[str]) -> Iterator[dict[str, Path]]:
    """Names to write under for each final name, and the index; what is still there at the end is removed."""
    temporary = {name: directory / f"{name}{WRITING}" for name in (*names, INDEX)}
    try:
        yield temporary
    finally:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink()


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk when the body is done."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def put_in_place(
    directory: Path, temporary: Mapping[str, Path], tensors: Mapping[str, LazyTensor], files: Mapping[str, list[str]]
) -> None:
    """Give written files their names: earlier weights out, index first; new ones in, index last. Raises OSError.

    Args:
        temporary, files: as `temporaries` and `lay_out` gave them.
    """
    if len(files) > 1:
        with synced(temporary[INDEX]) as file:
            file.write(_index(tensors, files))
    earlier = [path for path in directory.iterdir() if _OURS.fullmatch(path.name)]
    for path in [directory / INDEX, *earlier]:
        path.unlink(missing_ok=True)
    sync_folder(directory)
    for name in [*files, *([INDEX] if len(files) > 1 else [])]:
        temporary[name].replace(directory / name)
    sync_folder(directory)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)
