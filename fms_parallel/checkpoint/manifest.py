"""The page that makes a training checkpoint valid: what it is of, and the length and SHA-256 of every file.

It is written last, so a folder without it, or with a file that is not as long as it says, is not a checkpoint. It
carries a digest of itself. It knows files and JSON; it knows no tensors and no ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fms_parallel.checkpoint.files import write_text
from fms_parallel.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when a later library writes what this one cannot read."""
_BLOCK = 1 << 22


def library_version() -> str:
    """Of fms_parallel, where it is installed."""
    try:
        return version("fms_parallel")
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class FileMark:
    """Length in bytes and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileMark:
        """Read the file. Raises OSError."""
        digest, length = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                length += len(block)
        return cls(length, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """What a training checkpoint says of itself.

    Attributes:
        step: optimizer steps done. numbers: the caller's plain JSON values.
        layout: the layout it was saved in, for people; it can be loaded in any.
        optimizer: class of the optimizer. stateless: parameters that it trains and had no state of yet.
        files: name -> length and digest of every file but this page.
    """

    step: int
    numbers: Mapping[str, Any]
    layout: str
    optimizer: str
    stateless: tuple[str, ...]
    files: Mapping[str, FileMark]
    library: str = field(default_factory=library_version)
    torch: str = str(torch.__version__)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all. Raises OSError."""
        content = asdict(self)
        write_text(folder / MANIFEST, json.dumps({**content, "digest": _digest(content)}, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint folder.

        Raises:
            CheckpointError: there is none, it is cut off or changed, or a later library wrote it.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {MANIFEST}: it is not a training checkpoint, or one whose saving never ended. "
                "latest_training_state finds the newest whole one in the folder above."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is of format {content.get('format')}, this library reads format {FORMAT}."
                )
            if content.pop("digest") != _digest(content):
                raise CheckpointError(f"{path} was changed after it was written.")
            files = {name: FileMark(**mark) for name, mark in content.pop("files").items()}
            return cls(**{**content, "stateless": tuple(content["stateless"]), "files": files})
        except CheckpointError:
            raise
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}.") from error

    def check_lengths(self, folder: Path) -> None:
        """Every file is there and as long as it was.

        Raises:
            CheckpointError: naming the first that is not.
        """
        for name, mark in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing. {_WAY_OUT}")
            if (length := path.stat().st_size) != mark.bytes:
                raise CheckpointError(f"{path} has {length} bytes and was written with {mark.bytes}. {_WAY_OUT}")

    def check_contents(self, folder: Path, names: Iterable[str]) -> None:
        """These files have the contents that they were written with.

        Raises:
            CheckpointError: naming the first that has not, or cannot be read.
        """
        for name in names:
            try:
                found = FileMark.of(folder / name)
            except OSError as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}. {_WAY_OUT}") from error
            if found != self.files[name]:
                raise CheckpointError(f"{folder / name} was changed after it was written: SHA-256 differs. {_WAY_OUT}")


_WAY_OUT = "Copy it again, or use an earlier checkpoint."


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
