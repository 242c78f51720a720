"""What holds for every family built like LLaMA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fms_parallel.models import get_config, get_model, list_variants
from fms_parallel.models.registry import REGISTRY

FAMILIES = ("llama", "mistral", "qwen3", "granite", "mixtral")
SMALL: dict[str, Any] = {"width": 32, "layers": 2, "ffn_width": 48}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_one_graph(family: str) -> None:
    """fullgraph=True raises at the first break."""
    torch.compiler.reset()
    model = get_model(family, "micro", **SMALL).eval()
    ids = torch.randint(256, (2, 20))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_forward_is_one_graph(family: str) -> None:
    torch.compiler.reset()
    model = get_model(family, "micro", **SMALL)
    ids, labels = torch.randint(256, (2, 20)), torch.randint(256, (2, 20))
    expected = model(ids, labels)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels)
    torch.testing.assert_close(found, expected)
    found.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "variant"), [(f, v) for f in FAMILIES for v in list_variants(f)])
def test_parameters_of_the_module_are_those_of_its_shape(family: str, variant: str) -> None:
    config = get_config(family, variant)
    with torch.device("meta"):
        model = REGISTRY.get(family).build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.shape().parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_takes_the_char_tokenizers_ids(family: str) -> None:
    config = get_config(family, "micro")
    assert (config.vocab_size, config.bos_id, config.eos_id) == (256, 2, 3)
