"""`TransformersModel`: a causal model of transformers as the engine runs one, with the engine's own cache.

transformers lets the function that computes attention be replaced. Ours stores keys and values where the engine wants
them and lets each token see its own row, so rows of any lengths go through the unchanged model side by side, without
padding. With tp the model is cut by the plan that `auto/` finds; with pp see `inference/transformers_stages.py`.

    InferenceEngine --ragged [1, N]--> the model's own forward --q, k, v--> RaggedBatch.attend

A model that mixes tokens elsewhere than in attention would mix rows; so two rows are compared with what the model
computes by itself before anything is served. It knows transformers by its attention interface and its configs only.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError
from fms_parallel.inference.ragged import Piece, RaggedBatch
from fms_parallel.modules.sequences import Wanted
from fms_parallel.strategy.base import Parallel

NAME = "fms_parallel_rows"
"""Of our attention among transformers'."""

CHANGES_SCORES = ("softcap", "s_aux", "position_bias", "head_mask")
"""What some models hand to attention beside q, k and v, and ours does not do."""

LAYER_TYPES = ("full_attention", "sliding_attention")
TEST_ROWS = ((1, 2, 0, 3), (4, 0))
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far logits of the test rows may differ, as a part of the largest; half precision: 0.1."""


def is_transformers(model: nn.Module) -> bool:
    """Whether this is a model of transformers (which is not imported to find out)."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


class TransformersModel(nn.Module):
    """A `CausalModel` for the engine around one of transformers, which computes with its own modules and parameters.

    Args:
        model: of transformers. parallel: how it is spread. parts: of it that run on this rank, when not all do.
    Attributes:
        config: vocab_size, max_positions, heads, layers and windows (layer -> window; found out), under our names.
        cache_layers: layer -> kv heads and D.
        expected: of a model in stages: what `alone` gave before it was cut.
    Raises:
        ConfigError: a model whose attention cannot be replaced, or that mixes tokens elsewhere.
    """

    def __init__(
        self, model: nn.Module, parallel: Parallel | None = None, parts: Sequence[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.inner = model if parts is None else nn.ModuleList(parts)
        self.parallel = parallel
        self.expected: Tensor | None = None
        self.name = type(model).__name__
        theirs: Any = model.config
        _refuse(model, theirs)
        text = theirs.get_text_config()
        heads = text.num_attention_heads
        kv = getattr(text, "num_key_value_heads", None) or (1 if getattr(text, "multi_query", False) else heads)
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        tp = 1 if parallel is None else parallel.layout.tp
        self.watches_versions = tp > 1
        self.config = SimpleNamespace(
            vocab_size=text.vocab_size,
            max_positions=getattr(text, "max_position_embeddings", None),
            heads=heads,
            layers=text.num_hidden_layers,
            windows={},
        )
        self.activation_width = text.hidden_size
        self._attending: list[Any] = [module for module in self.inner.modules() if "layer_idx" in vars(module)]
        held = {module.layer_idx for module in self._attending}
        self.cache_layers = {layer: (max(1, kv // tp), width) for layer in range(text.num_hidden_layers)}
        if parts is not None:
            self.cache_layers = {layer: size for layer, size in self.cache_layers.items() if layer in held}
        known = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in known
        self._told = {"use_cache": False} if "use_cache" in known else {}
        _register()
        if parts is None:
            self.compare(self.alone(), self._side_by_side)

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None,
        first_position: int,
        mask: Tensor | None,
        cache: Any,
        last: Wanted,
    ) -> Tensor:
        """Logits `[1, W, V]` of the wanted positions of a ragged batch `[1, N]`, which is also the cache."""
        if not isinstance(cache, RaggedBatch):
            raise ConfigError("a model of transformers generates through InferenceEngine; or call its own generate.")
        return self.run(self.inner, cache, input_ids, positions, last)

    def run(
        self, part: nn.Module, batch: RaggedBatch, input_ids: Tensor, positions: Tensor | None, last: Wanted
    ) -> Tensor:
        """`part`, the whole model or a stage of it, over a ragged batch: logits as `forward` says."""
        kept = {"logits_to_keep": last.tokens} if self._keeps else {}
        with self._rows(batch):
            out = part(input_ids=input_ids, position_ids=positions, **kept, **self._told)
        logits: Tensor = out.logits
        return logits if self._keeps else last.of(logits)

    @contextmanager
    def _rows(self, batch: RaggedBatch) -> Iterator[None]:
        """Let attention go through `batch` meanwhile."""
        found: Any = [module.config for module in self.inner.modules() if hasattr(module, "config")]
        configs = {id(config): config for config in found}.values()
        before = [config._attn_implementation for config in configs]
        for config in configs:
            config._attn_implementation = NAME
        for module in self._attending:
            vars(module)["fms_rows"] = batch
        try:
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name
            for module in self._attending:
                vars(module).pop("fms_rows", None)

    # ---- what it does against what the model does by itself -----------------------------------------------------

    def test_pieces(self) -> list[Piece]:
        """Two short rows."""
        return [Piece([token % self.config.vocab_size for token in row], 0, len(row)) for row in TEST_ROWS]

    def alone(self) -> Tensor:
        """`[1, N, V]`: the logits of each row by itself, one row after the other; of the whole model."""
        device = next(parameter.device for parameter in self.inner.parameters())
        with _evaluating(self.inner):
            rows = [torch.tensor([piece.tokens], device=device) for piece in self.test_pieces()]
            return torch.cat([self.inner(input_ids=row, **self._told).logits for row in rows], 1)

    def _side_by_side(self, pieces: list[Piece]) -> Tensor:
        batch = RaggedBatch(pieces, None, next(parameter.device for parameter in self.inner.parameters()), whole=True)
        with _evaluating(self.inner):
            logits = self.run(self.inner, batch, batch.input_ids, batch.positions, batch.wanted)
        self.config.windows = batch.windows
        return logits

    def compare(self, alone: Tensor, run: Callable[[list[Piece]], Tensor]) -> None:
        """Hold two rows side by side against each by itself.

        Args:
            alone: what `alone` gave. run: gives the logits of all tokens of these pieces, `[..., N, V]`.
        Raises:
            ConfigError: they differ.
        """
        found = run(self.test_pieces()).view(alone.shape)
        far = float((found - alone).abs().max() / alone.abs().max().clamp(min=1e-12))
        if not far <= CLOSE.get(alone.dtype, 0.1):
            raise ConfigError(
                f"{self.name}: two rows side by side have logits {far:.1e} away from those of each by itself: this "
                "model mixes tokens elsewhere than in attention. Use its own generate()."
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, inside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _refuse(model: nn.Module, config: Any) -> None:
    name = type(model).__name__
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - set(LAYER_TYPES)
    inner = [module for module in model.modules() if hasattr(module, "_supports_attention_backend")]
    why = None
    if getattr(config, "is_encoder_decoder", False):
        why = "it has an encoder"
    elif kinds:
        why = f"it has layers of type {', '.join(sorted(kinds))}"
    elif not inner or not all(module._supports_attention_backend for module in inner):
        why = "its attention cannot be replaced (_supports_attention_backend)"
    elif getattr(model, "_is_stateful", False):
        why = "it keeps a state beside keys and values"
    if why is not None:
        raise ConfigError(f"{name} cannot be served by InferenceEngine: {why}. Use its own generate().")


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query [1, H, N, D]`, `key, value [1, K, N, D]` -> `[1, N, H, D]`."""
    rows: RaggedBatch = module.fms_rows
    changed = [name for name in CHANGES_SCORES if others.get(name) is not None]
    if (
        changed
        or not (getattr(module, "is_causal", False) if is_causal is None else is_causal)
        or key.shape != value.shape
    ):
        what = ", ".join(changed) or "its attention is not causal, or has keys and values of unequal width"
        raise ConfigError(
            f"{type(module).__name__} cannot be served by InferenceEngine ({what}): use its own generate()."
        )
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    return rows.attend(module.layer_idx, q, k, v, scaling, sliding_window), None
