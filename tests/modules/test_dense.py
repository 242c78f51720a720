from __future__ import annotations

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.modules.dense import Dense, Drops, SequenceClassifier
from fms_parallel.modules.sequences import DropoutKey, Sequences


def test_dense_is_its_formula() -> None:
    module = Dense(4, 3, "relu").double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(module(x), (x @ module.weight.t() + module.bias).clamp(min=0))


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'rellu'.*'relu'"):
        Dense(4, 3, "rellu")


def classifier(p: float = 0.0) -> SequenceClassifier:
    module = SequenceClassifier(6, 3, Drops(p, p), salt=7).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_classifier_reads_the_first_token_only() -> None:
    module, x = classifier(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    hidden = torch.tanh(x[:, 0] @ module.dense.weight.t() + module.dense.bias)
    out = module(x, Sequences(2, 5))
    torch.testing.assert_close(out, hidden @ module.out.weight.t() + module.out.bias)
    out.sum().backward()
    assert x.grad is not None and x.grad[:, 0].abs().min() > 0 and x.grad[:, 1:].abs().max() == 0


def test_classifier_drops_the_same_in_pieces() -> None:
    """Row 1 of a batch, alone: its first token is the step's fifth."""
    module, x = classifier(0.5), torch.randn(2, 5, 6, dtype=torch.float64)
    whole = module(x, Sequences(2, 5, dropout=DropoutKey(3)))
    piece = module(x[1:], Sequences(1, 5, dropout=DropoutKey(3, first_token=5)))
    torch.testing.assert_close(piece, whole[1:])
    assert not torch.allclose(whole, module.eval()(x, Sequences(2, 5)))
