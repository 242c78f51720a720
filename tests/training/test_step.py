"""A step against plain torch: the mean over all valid tokens, clipping, and what stops a run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fms_parallel.data.feed import Batch
from fms_parallel.errors import TrainingError
from fms_parallel.training.step import logits_loss, train_step
from tests.training.runs import tiny


def batch(rows: int = 4) -> Batch:
    """The first row asks for three tokens only: a mean of means would weigh them too much."""
    tokens = torch.randint(61, (rows, 14))
    labels = tokens[:, 1:].clone()
    labels[0, 3:] = -100
    return Batch(tokens[:, :-1], labels)


def plain_step(model: nn.Module, data: Batch, max_norm: float | None) -> tuple[float, float]:
    """Loss and gradient norm by torch alone, and the update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = F.cross_entropy(model(data.input_ids).flatten(0, 1), data.labels.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    optimizer.step()
    return float(loss), float(norm)


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_matches_plain_torch(pieces: int, max_norm: float | None) -> None:
    data = batch()
    ours, theirs = tiny(data_type="fp64"), tiny(data_type="fp64")
    expected = plain_step(theirs, data, max_norm)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    result = train_step(ours, optimizer, list(data.split(pieces)), max_grad_norm=max_norm)
    assert (result.loss, result.grad_norm) == pytest.approx(expected, rel=1e-12)
    assert result.tokens == data.tokens
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # The denominator of clipping has 1e-6 in both; what is left is rounding.
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_logits_loss_is_the_models_own() -> None:
    data, ours, theirs = batch(), tiny(data_type="fp64"), tiny(data_type="fp64")
    for model, options in ((ours, {}), (theirs, {"loss_function": logits_loss})):
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [data], **options)  # type: ignore[arg-type]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_batch_without_labels_stops_the_run() -> None:
    data = Batch(torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), -100))
    model = tiny()
    with pytest.raises(TrainingError, match="no valid token"):
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [data])


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    model = tiny()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")  # type: ignore[union-attr, index, operator]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match=r"not finite.*learning rate"):
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch()])
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, model.parameters(), strict=True))


class WithAnUnusedParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()
        self.forgotten = nn.Parameter(torch.zeros(3))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.inner(input_ids, labels)
        return loss


def test_a_parameter_without_a_gradient_is_named() -> None:
    model = WithAnUnusedParameter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="forgotten"):
        train_step(model, optimizer, [batch()], check_gradients=True)
