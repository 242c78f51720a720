"""What the families built like LLaMA are tested with: tiny transformers models with every parameter shaken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.inference.cache import KVCache
from fms_parallel.models import get_model, save_hf
from fms_parallel.models.registry import REGISTRY
from tests.models.parity import TOLERANCE, config_words, gradient_errors, relative, shaken

TINY: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 43, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
}


def reference(kind: str, folder: Path, **options: Any) -> nn.Module:
    """A tiny transformers model of a family (`Mistral`, ...), saved to `folder`."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(TINY | config_words(options)))
    return shaken(getattr(transformers, f"{kind}ForCausalLM")(config), folder)


def as_saved(theirs: nn.Module) -> Any:
    """A model's gradients under the names that it is saved with: in memory transformers joins a block's experts."""
    found: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None and ".experts." in name:  # transformers 4: an expert of its own that nobody visited
            parameter.grad = torch.zeros_like(parameter)
        assert parameter.grad is not None, name
        block, _, rest = name.partition(".mlp.")
        moe = f"{block}.block_sparse_moe"
        if rest == "gate.weight":
            found[f"{moe}.{rest}"] = parameter.grad
        elif rest == "experts.gate_up_proj":
            for expert, grad in enumerate(parameter.grad):
                found |= {
                    f"{moe}.experts.{expert}.w{n}.weight": half for n, half in zip("13", grad.chunk(2), strict=True)
                }
        elif rest == "experts.down_proj":
            found |= {f"{moe}.experts.{expert}.w2.weight": grad for expert, grad in enumerate(parameter.grad)}
        else:
            found[name] = parameter.grad
    return SimpleNamespace(named_parameters=lambda **_: [(n, SimpleNamespace(grad=grad)) for n, grad in found.items()])


def assert_parity(theirs: nn.Module, folder: Path, length: int = 40, **overrides: Any) -> nn.Module:
    """Logits and every gradient of the folder's model in our form are theirs; returns it."""
    ours = get_model("hf_pretrained", model_path=folder, **overrides)
    ids, labels = torch.randint(97, (2, length)), torch.randint(97, (2, length))
    logits, expected = ours.eval()(ids), theirs(ids).logits
    assert relative(logits, expected) <= TOLERANCE
    for found in (logits, expected):
        torch.nn.functional.cross_entropy(found.flatten(0, 1), labels.flatten()).backward()
    adapter = REGISTRY.get(ours.architecture).adapters["hf"](ours.config)  # type: ignore[arg-type]
    errors = gradient_errors(ours, as_saved(theirs), adapter)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, (worst, errors[worst])
    return ours


def assert_loads_there(ours: nn.Module, theirs: nn.Module, folder: Path) -> None:
    """What `save_hf` writes is, in transformers, the model that ours came from."""
    save_hf(ours, folder)
    again, info = type(theirs).from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(97, (2, 30))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)


def cached_logits(model: nn.Module, ids: Tensor, pieces: list[int]) -> Tensor:
    """Logits of `ids [B, S]`, fed in so many tokens at a time through a cache."""
    cache = KVCache(ids.shape[1])
    done, found = 0, []
    for count in pieces:
        found.append(model(ids[:, done : done + count], first_position=done, cache=cache))
        done += count
    return torch.cat(found, 1)
