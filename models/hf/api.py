"""`to_hf_api`: one of our causal models as a `transformers` model that shares its tensors.

    model = to_hf_api(get_model("llama", "micro", distributed_strategy="tp=2"))
    model.generate(input_ids, attention_mask=..., num_beams=4)        pipeline("text-generation", model=model, ...)

It translates arguments: attention masks to ours, transformers' cache to a `KVStore`, shifted labels to a mean loss. The
config is the real one of the architecture, so whatever reads a config finds what it expects. transformers is an extra.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError
from fms_parallel.modules.loss import IGNORE
from fms_parallel.strategy.base import parallel_of

from ..build import get_model, save_hf
from ..registry import REGISTRY

WITHOUT_EFFECT = ("return_dict", "output_attentions", "output_hidden_states", "cache_position")
"""Words that transformers passes along; those that ask for something must be unset or false."""


def to_hf_api(model: nn.Module) -> Any:
    """A `transformers.PreTrainedModel` around a causal model of `get_model`, in any layout but pp and cp.

    `generate` (greedy, sampling, beams, left-padded batches), `pipeline("text-generation")`, `Trainer`, the loss,
    `save_pretrained` and `from_pretrained` work. On several ranks every rank makes the same calls.

    Raises:
        ConfigError: transformers is not installed, the model has no causal Hugging Face form, or its layout has
            stages or cuts the sequence.
    """
    known = REGISTRY.get(getattr(model, "architecture", ""))
    layout = parallel_of(model).layout
    if known.to_hf is None or not _is_causal(model):
        raise ConfigError(f"{known.name} has no causal Hugging Face form.")
    if layout.pp > 1 or layout.cp > 1:
        raise ConfigError(f"layout {str(layout)!r}: transformers calls whole models; use a layout without pp and cp.")
    transformers = _transformers()
    raw = known.to_hf(model.config)
    config = transformers.AutoConfig.for_model(**raw)
    return _wrapper()(config, model)


def _is_causal(model: nn.Module) -> bool:
    from inspect import signature

    return {"cache", "last", "mask"} <= set(signature(type(model).forward).parameters)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("the Hugging Face face needs transformers: pip install 'fms_parallel[hf]'.") from None
    return transformers


class CacheStore:
    """transformers' cache as a `KVStore`: it may be re-ordered by a beam search between two calls."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store behind what `layer` holds; return all of it."""
        found: tuple[Tensor, Tensor] = self.store.update(keys, values, layer)
        return found


@cache
def _wrapper() -> Any:
    """The class, made once and only where transformers is there."""
    transformers = _transformers()
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class FmsForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc, name-defined]
        """Ours behind transformers' words. Its name tells the Trainer that labels are shifted inside."""

        base_model_prefix = "model"
        main_input_name = "input_ids"
        _supports_sdpa = True
        _supports_flash_attn = False

        def __init__(self, config: Any, model: nn.Module) -> None:
            super().__init__(config)
            self.model = model
            self.train(model.training)

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int = 0,
            num_items_in_batch: Tensor | int | None = None,
            **others: Any,
        ) -> Any:
            """As `LlamaForCausalLM.forward`: labels are not shifted yet, the loss is a mean."""
            _refuse_others(others)
            if use_cache and past_key_values is None:
                past_key_values = transformers.DynamicCache()
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            mask, positions = _masked(attention_mask, input_ids, start)
            logits = self.model(
                input_ids,
                positions=positions if position_ids is None else position_ids,
                first_position=start,
                mask=mask,
                cache=None if past_key_values is None else CacheStore(past_key_values),
                last=logits_to_keep or None,
            )
            loss = None if labels is None else _mean_loss(logits, labels, num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

        def get_input_embeddings(self) -> nn.Module:
            return self.model.get_submodule("embedding")

        def get_output_embeddings(self) -> nn.Module:
            return self.model.get_submodule("head")

        def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
            """The architecture's own Hugging Face folder, which transformers loads as such. Collective."""
            save_hf(self.model, save_directory)
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                self.generation_config.save_pretrained(save_directory)

        @classmethod
        def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
            """Ours from a Hugging Face folder; options as of `get_model`."""
            return to_hf_api(get_model("hf_pretrained", model_path=folder, **options))

    return FmsForCausalLM


def _refuse_others(others: dict[str, Any]) -> None:
    strange = [f"{n}={v!r}" for n, v in others.items() if n not in WITHOUT_EFFECT and v is not None]
    asked = [n for n in ("output_attentions", "output_hidden_states") if others.get(n)]
    if strange or asked:
        raise ConfigError(f"not supported by a wrapped model: {', '.join(strange + asked)}. It would be ignored.")


def _masked(attention_mask: Tensor | None, input_ids: Tensor, start: int) -> tuple[Tensor | None, Tensor | None]:
    """(bool mask `[B, 1, S, T]`, positions `[B, S]`) of a 2-D attention mask `[B, T]`; (None, None) without padding."""
    if attention_mask is None:
        return None, None
    if attention_mask.dim() != 2:
        raise ConfigError(f"attention_mask has {attention_mask.dim()} dimensions: give it as [batch, tokens so far].")
    if bool(attention_mask.all()):
        return None, None
    end = start + input_ids.shape[1]
    real = attention_mask[:, :end].bool()
    keys = torch.arange(end, device=input_ids.device)
    queries = keys[start:, None]
    # A padded column sees itself: with nothing to see its softmax would be 0 / 0.
    mask = ((keys <= queries) & real[:, None, :]) | (keys == queries)
    positions = (real.cumsum(1) - 1).clamp(min=0)[:, start:]
    return mask.unsqueeze(1), positions


def _mean_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """Cross-entropy of the next token: mean over valid labels, or their sum over `items`."""
    wanted = labels[:, 1:].flatten()
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(wide), wanted, ignore_index=IGNORE, reduction="sum"
    )
    return total / ((wanted != IGNORE).sum() if items is None else items)
