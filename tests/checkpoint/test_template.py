"""Templates. Oracle: filling undoes matching."""

from __future__ import annotations

import pytest

from fms_parallel.checkpoint.template import Template, templates_alike
from fms_parallel.errors import ConfigError


@pytest.mark.parametrize("number", ["0", "7", "123"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_fill_undoes_match(number: str, kind: str) -> None:
    template = Template("model.layers.{n}.q_proj.{kind}")
    key = f"model.layers.{number}.q_proj.{kind}"
    values = template.match(key)
    assert values == {"n": number, "kind": kind}
    assert template.fill(values) == key


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.x.q_proj.weight",
        "model.layers.1.q_proj.scale",
        "model.layers.1.q_proj.weights",
        "a.model.layers.1.q_proj.weight",
        "modelXlayers.1.q_proj.weight",
        "model.layers..q_proj.weight",
    ],
)
def test_other_keys_do_not_match(key: str) -> None:
    assert Template("model.layers.{n}.q_proj.{kind}").match(key) is None


def test_key_without_fields_matches_itself_alone() -> None:
    assert Template("norm.weight").match("norm.weight") == {}
    assert Template("norm.weight").match("norm_weight") is None


def test_unknown_and_repeated_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'knd'\. Did you mean 'kind'"):
        Template("a.{knd}")
    with pytest.raises(ConfigError, match="same field twice"):
        Template("{n}.{n}")


def test_templates_with_other_fields_are_refused() -> None:
    assert [t.text for t in templates_alike("a.{n}", "b.{n}.c")] == ["a.{n}", "b.{n}.c"]
    with pytest.raises(ConfigError, match="must have the same fields"):
        templates_alike("a.{n}", "b.{kind}")
