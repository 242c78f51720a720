"""From a folder with a Hugging Face `config.json` to the architecture and the config that it describes.

It knows `model_type` and `architectures`, the two fields that say which model it is; each architecture reads the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms_parallel.errors import CheckpointError, ConfigError, unknown

from ..checked import config_from_hf
from .config import read_config_json

if TYPE_CHECKING:
    from ..registry import Architecture

PRETRAINED, CONFIGURED = "hf_pretrained", "hf_configured"
"""In the place of an architecture: what `model_path`/config.json describes, with its weights or with new ones."""


def described(architectures: Iterable[Architecture], folder: str | Path | None) -> tuple[Architecture, Any]:
    """The architecture and the config of a folder's `config.json`, or of the one beside a file.

    Raises:
        CheckpointError: no folder, or no config.json in it.
        ConfigError: a model type or a class that no architecture reads, naming those that are; a field that the
            architecture does not support.
    """
    if folder is None:
        raise ConfigError(f"{PRETRAINED} and {CONFIGURED} read model_path/config.json: give model_path.")
    folder = Path(folder).parent if Path(folder).is_file() else Path(folder)
    raw = read_config_json(folder)
    if raw is None:
        raise CheckpointError(f"{folder}/config.json: no such file; name the architecture, or give the model's folder.")
    readers = [known for known in architectures if known.from_hf is not None]
    types = {kind: [k for k in readers if kind in (k.model_types or (k.name,))] for kind in _types(readers)}
    kind = str(raw.get("model_type"))
    if kind not in types:
        raise ConfigError(f"{folder}/config.json: {unknown('model_type', kind, types)}")
    known = _of_class(types[kind], raw, folder)
    return known, config_from_hf(known, raw, folder / "config.json")


def _types(readers: Iterable[Architecture]) -> set[str]:
    return {kind for known in readers for kind in known.model_types or (known.name,)}


def _of_class(fitting: list[Architecture], raw: dict[str, Any], folder: str | Path) -> Architecture:
    """The one of several architectures whose class the config names: they share a body and differ in their heads."""
    if len(fitting) == 1:
        return fitting[0]
    written = raw.get("architectures")
    wanted = [str(name) for name in written] if isinstance(written, list) else []
    for known in fitting:
        if set(known.hf_classes) & set(wanted):
            return known
    classes = [name for known in fitting for name in known.hf_classes]
    raise ConfigError(f"{folder}/config.json: {unknown('class in architectures', ', '.join(wanted), classes)}")
