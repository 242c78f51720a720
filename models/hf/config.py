"""Reading a Hugging Face `config.json`, all of it: a field that nobody asked for is an error, not a default.

It knows the fields that mean nothing here, and both spellings of rotary positions (transformers 4 and 5); it knows no
architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fms_parallel.errors import CheckpointError, ConfigError

# Bookkeeping of transformers: nothing of it changes what the model computes from token ids.
MEANINGLESS = frozenset(
    (
        *("_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "architectures"),
        *("transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict", "chunk_size_feed_forward"),
        *("output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "pretraining_tp"),
        *("auto_map", "max_length", "task_specific_params", "tokenizer_class"),
    )
)

# Fields that we support at one value only.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "attention_dropout": (0, 0.0),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "torchscript": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
}

_ROPE_WORDS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Rope:
    """Rotary positions as a config describes them; names as in `modules.positions.Rotary`."""

    base: float
    kind: str
    options: dict[str, Any]
    partial: float


@dataclass
class HFFields:
    """The fields of one config.json; each is taken once, and what is left at the end is an error."""

    raw: Mapping[str, Any]
    taken: set[str] = field(default_factory=set)

    def take(self, name: str, *default: Any) -> Any:
        """A field's value; without it the default, or an error when there is none."""
        self.taken.add(name)
        if name in self.raw:
            return self.raw[name]
        if not default:
            raise ConfigError(f"config.json has no {name!r}: this architecture cannot be built without it.")
        return default[0]

    def token_id(self, name: str) -> int | None:
        """A token id; of several (Llama 3.1 has three end tokens) the first."""
        value = self.take(name, None)
        return value[0] if isinstance(value, list) else value

    def rope(self, default_base: float = 10000.0) -> Rope:
        """Rotary positions: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).

        Raises:
            ConfigError: both are there and disagree.
        """
        old = dict(self.take("rope_scaling", None) or {})
        base = self.take("rope_theta", None)
        partial = self.take("partial_rotary_factor", None)
        new = self.take("rope_parameters", None)
        if new is None:
            new = {**old, "rope_theta": default_base if base is None else base}
        elif base not in (None, new.get("rope_theta", base)) or (old and _kind(old) != _kind(new)):
            raise ConfigError(
                f"config.json says rope_theta={base}, rope_scaling={old} and rope_parameters={new}: which?"
            )
        return Rope(
            base=float(new.get("rope_theta", default_base if base is None else base)),
            kind=_kind(new),
            options={name: value for name, value in new.items() if name not in _ROPE_WORDS},
            partial=float(new.get("partial_rotary_factor", 1.0 if partial is None else partial)),
        )

    def finish(self) -> None:
        """Every field was read, means nothing here, or has the one value that we support.

        Raises:
            ConfigError: naming those that we do not support.
        """
        left = {
            name: value for name, value in self.raw.items() if name not in self.taken | MEANINGLESS | {"model_type"}
        }
        strange = {name: value for name, value in left.items() if value not in FIXED.get(name, ())}
        if strange:
            shown = ", ".join(f"{name}={value!r}" for name, value in sorted(strange.items()))
            raise ConfigError(f"config.json has fields that are not supported: {shown}. Loading would ignore them.")


def _kind(words: Mapping[str, Any]) -> str:
    return str(words.get("rope_type") or words.get("type") or "default")


def hf_activation(name: str) -> str:
    """Our name of an activation as transformers spells it."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def read_config_json(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json; None and errors as in `read_json`."""
    return read_json(folder / "config.json")


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file.

    Raises:
        CheckpointError: it is not JSON, or no object.
    """
    if not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must hold one JSON object, not a {type(raw).__name__}.")
    return raw
