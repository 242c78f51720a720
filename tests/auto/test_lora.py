"""What cannot have adapters is said before anything of the model is changed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fms_parallel.auto.lora import add_lora
from fms_parallel.errors import ConfigError
from fms_parallel.models import get_model


@pytest.mark.parametrize("targets", [["query", "value"], r".*feed_forward\.down"])
def test_layers_that_nobody_calls_are_refused_and_stay_as_they_were(targets: Any) -> None:
    model = get_model("llama", "micro", layers=1)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(
        ConfigError, match=r"layers\.0\..*(Attention|FeedForward) multiplies with its layers' weights itself"
    ):
        add_lora(model, targets)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_what_matches_nothing_or_is_no_matrix_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    for targets, words in ((["nowhere"], "match no module"), (["0"], "is a Embedding: adapters go to linear layers")):
        with pytest.raises(ConfigError, match=words):
            add_lora(model, targets)
