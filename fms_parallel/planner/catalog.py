"""Models by name: the planner's own list, entry points that other packages fill, and JSON files.

It knows sizes and where they are written; it imports no model. Other packages name their shapes in the entry-point
group `fms_parallel.shapes`: each entry is a function without arguments that returns `{"arch:variant": ModelShape}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.planner.experts import Experts
from fms_parallel.planner.hardware import read_data, read_json
from fms_parallel.shape import ModelShape

GROUP = "fms_parallel.shapes"

HUGGING_FACE = {
    "layers": ("num_hidden_layers", "n_layer"),
    "width": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_width": ("head_dim",),
    "ffn_width": ("intermediate_size", "n_inner"),
    "vocab": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "n_positions"),
    "tied": ("tie_word_embeddings",),
    "attention_bias": ("attention_bias",),
    "ffn_bias": ("mlp_bias",),
}
"""Our word -> the names that a Hugging Face config.json may give it."""

WITHOUT_GATE = ("gpt2", "gpt_bigcode", "roberta", "bert", "opt", "gpt_neox")
"""`model_type` of two-matrix feed-forwards with biases, LayerNorm and learned positions."""


@dataclass(frozen=True)
class Model:
    """A model to plan for: its sizes, and its experts when it has some."""

    name: str
    shape: ModelShape
    experts: Experts | None = None

    @classmethod
    def of(cls, name: str, shape: ModelShape) -> Model:
        """A model of this shape, with the experts that the shape has."""
        experts = Experts(shape.experts, shape.experts_used, shape.ffn_width) if shape.experts > 1 else None
        return cls(name, shape, experts)

    def parameters(self) -> int:
        """Unique parameters, experts counted whole."""
        if self.experts is None:
            return self.shape.parameters()
        extra = self.experts.parameters(self.shape) - self.shape.ffn_parameters
        return self.shape.parameters() + self.shape.layers * extra

    def flops_per_token(self, sequence: int) -> float:
        """Floating-point operations of training on one token; of experts, those that it visits."""
        dense = float(self.shape.flops_per_token(sequence))
        if self.experts is None:
            return dense
        visited = (self.experts.top + self.experts.shared) * self.experts.ffn_width - self.shape.ffn_width
        return dense + 6 * self.shape.layers * (3 if self.shape.gated else 2) * self.shape.width * visited


def find_model(name: str) -> Model:
    """A model by registered `arch:variant`, seed model name, or path to a JSON file.

    Raises:
        ConfigError: unknown (the message lists the known ones), or a file that does not describe a model.
    """
    if name.endswith(".json") or Path(name).is_file():
        return _from_file(Path(name))
    own = read_data("models.json")
    if name in own:
        return _from_table(name, own[name], "models.json")
    registered = _registered(name)
    if name in registered:
        return Model.of(name, registered[name])
    raise ConfigError(unknown("model", name, {*own, *registered}) + " A JSON file with the sizes works, too.")


def _registered(name: str) -> dict[str, ModelShape]:
    """Shapes of the entry points; one that cannot be loaded is reported only when a model is not found elsewhere."""
    shapes: dict[str, ModelShape] = {}
    for entry in entry_points(group=GROUP):
        try:
            provider: Callable[[], Mapping[str, ModelShape]] = entry.load()
            shapes.update(provider())
        except ImportError as error:
            raise ConfigError(f"{name!r}: the models of {entry.value} cannot be listed: {error}.") from None
    return shapes


def _from_file(path: Path) -> Model:
    table = read_json(path)
    if "width" in table:
        return _from_table(path.stem, table, str(path))
    return _from_hugging_face(path, table)


def _from_table(name: str, table: Any, source: str) -> Model:
    known = {f.name for f in fields(ModelShape)}
    values = dict(table)
    experts = values.pop("experts", None)
    values.pop("sequence", None)
    for key in values:
        if key not in known:
            raise ConfigError(f"{source}: {name}: {unknown('field', key, {*known, 'experts'})}")
    try:
        return Model(name, _checked(values, source), Experts(**experts) if experts else None)
    except TypeError as error:
        raise ConfigError(f"{source}: {name}: {error}.") from None


def _checked(values: Mapping[str, Any], source: str) -> ModelShape:
    """A shape of whole numbers and flags.

    Raises:
        ConfigError: another kind of value, a size below 1, or heads that kv heads do not divide. TypeError: a size that
            is missing.
    """
    for f in fields(ModelShape):
        value = values.get(f.name, f.default)
        if f.type == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{source}: {f.name}={value!r}: is on or off; give true or false.")
        least = 0 if f.name == "other" else 1
        if f.type == "int" and f.name in values and (type(value) is not int or value < least):
            raise ConfigError(f"{source}: {f.name}={value!r}: needs a whole number >= {least}.")
    shape = ModelShape(**values)
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"{source}: {shape.heads} heads over {shape.kv_heads} kv heads: kv heads must divide heads.")
    return shape


def _from_hugging_face(path: Path, table: Mapping[str, Any]) -> Model:
    values: dict[str, Any] = {}
    for word, names in HUGGING_FACE.items():
        found = next((table[n] for n in names if table.get(n) is not None), None)
        if found is not None:
            values[word] = found
    for word in ("layers", "width", "heads", "vocab"):
        called = " or ".join(HUGGING_FACE[word])
        if word not in values:
            raise ConfigError(
                f"{path}: no {called}: a transformer's config.json has it; a file with our own words needs width, "
                "layers, heads, kv_heads, head_width, ffn_width, vocab and max_positions."
            )
        if type(values[word]) is not int or values[word] < 1:
            raise ConfigError(f"{path}: {called}: {values[word]!r} is no whole number >= 1.")
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_width", values["width"] // values["heads"])
    values.setdefault("ffn_width", 4 * values["width"])
    values.setdefault("max_positions", 2048)
    if table.get("model_type") in WITHOUT_GATE:
        if table.get("multi_query"):
            values["kv_heads"] = 1
        biases = {
            "gated": False,
            "attention_bias": True,
            "ffn_bias": True,
            "learned_positions": True,
            "norm_bias": True,
        }
        values.update(biases, tied=table.get("tie_word_embeddings", True))
    experts = None
    if table.get("num_local_experts"):
        experts = Experts(table["num_local_experts"], table.get("num_experts_per_tok", 2), values["ffn_width"])
    return Model(str(path), _checked(values, str(path)), experts)
