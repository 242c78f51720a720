"""What must not change unnoticed: every variant's parameter names and shapes, and what the small ones compute.

The expectations lie in `expectations/`, one file per architecture; `pytest tests/models --capture-signatures` writes
them anew, and the difference is then read in review.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.models import get_config, get_model, list_models, list_variants
from fms_parallel.models.registry import REGISTRY

EXPECTATIONS = Path(__file__).parent / "expectations"


def names_of(architecture: str, variant: str) -> dict[str, Any]:
    """Number of parameters, and a digest of all names with their shapes."""
    with torch.device("meta"):
        model = REGISTRY.get(architecture).build(get_config(architecture, variant))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]
    return {"parameters": sum(p.numel() for p in model.parameters()), "names": digest}


def outputs_of(architecture: str) -> list[float]:
    """Range of each position's outputs, of the first variant with the weights of seed 0."""
    model = get_model(architecture, next(iter(list_variants(architecture))), data_type="fp64", seed=0).eval()
    with torch.no_grad():
        out = model(torch.arange(4, 20).unsqueeze(0))
    out = out if isinstance(out, torch.Tensor) else torch.cat([part.flatten(1) for part in out], 1)
    spread = out.flatten(0, -2).amax(-1) - out.flatten(0, -2).amin(-1)
    return [float(f"{value:.6g}") for value in spread]


@pytest.mark.parametrize("architecture", list_models())
def test_names_and_outputs_are_those_that_were_written_down(architecture: str, request: pytest.FixtureRequest) -> None:
    found = {
        "variants": {variant: names_of(architecture, variant) for variant in list_variants(architecture)},
        "outputs": outputs_of(architecture),
    }
    file = EXPECTATIONS / f"{architecture}.json"
    if request.config.getoption("--capture-signatures"):
        EXPECTATIONS.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(file.read_text(encoding="utf-8"))
    assert found["variants"] == expected["variants"]
    assert found["outputs"] == pytest.approx(expected["outputs"], rel=1e-5)
