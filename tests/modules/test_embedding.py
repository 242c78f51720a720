from __future__ import annotations

from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F

from fms_parallel.errors import ConfigError
from fms_parallel.modules.embedding import Embedding, Head
from fms_parallel.modules.sequences import Sequences
from tests.gradient import grad

V, E = 7, 4


M = TypeVar("M", Embedding, Head)


def filled(module: M) -> M:
    torch.nn.init.normal_(module.weight)
    return module.double()


def test_a_lookup_gives_the_rows() -> None:
    embedding = filled(Embedding(V, E))
    ids = torch.tensor([[0, 6, 3], [3, 3, 1]])
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_every_row_learns() -> None:
    """Defect W11 of the reference: `pad_id=-1` made the last row a padding row, which never got a gradient."""
    embedding = filled(Embedding(V, E))
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 6]])
    embedding(ids).sum().backward()
    counts = torch.tensor([1.0, 1, 1, 1, 1, 1, 2], dtype=torch.float64)
    assert torch.equal(grad(embedding.weight), counts[:, None].expand(V, E))


def test_an_id_beyond_the_vocabulary_is_an_error() -> None:
    for bad in (V, -1):
        with pytest.raises(IndexError):
            Embedding(V, E)(torch.tensor([[bad]]))


def test_activations_take_the_compute_dtype_and_gradients_the_weights() -> None:
    embedding = filled(Embedding(V, E)).float()
    embedding.compute_dtype = torch.bfloat16
    out = embedding(torch.tensor([[1, 2]]))
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and grad(embedding.weight).dtype == torch.float32


@pytest.mark.parametrize("last", [None, 1, 2])
def test_logits_equal_a_matrix_product(last: int | None) -> None:
    head, x = filled(Head(V, E)), torch.randn(2, 3, E, dtype=torch.float64)
    want = F.linear(x, head.weight)
    assert torch.equal(head(x, Sequences(2, 3), last=last), want if last is None else want[:, -last:])


def test_loss_equals_cross_entropy_of_the_logits() -> None:
    head, x = filled(Head(V, E)), torch.randn(2, 3, E, dtype=torch.float64)
    labels = torch.tensor([[0, -100, 6], [1, 2, -100]])
    want = F.cross_entropy(head(x, Sequences(2, 3)).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(head(x, Sequences(2, 3), labels), want, rtol=1e-13, atol=0)


def test_a_tied_weight_gets_both_gradients() -> None:
    embedding, head = filled(Embedding(V, E)), filled(Head(V, E))
    ids, labels = torch.tensor([[1, 2, 6]]), torch.tensor([[2, 6, 0]])

    def gradients(tied: bool) -> list[torch.Tensor]:
        with torch.no_grad():
            head.weight = embedding.weight if tied else torch.nn.Parameter(embedding.weight.detach().clone())
        embedding.weight.grad = None
        head(embedding(ids), Sequences(1, 3), labels).backward()
        return [grad(embedding.weight), grad(head.weight)]

    apart = gradients(tied=False)
    torch.testing.assert_close(gradients(tied=True)[0], apart[0] + apart[1], rtol=1e-12, atol=1e-12)


def test_a_head_with_a_bias_adds_it_and_trains_it() -> None:
    head, x = filled(Head(V, E, bias=True)), torch.randn(2, 3, E, dtype=torch.float64)
    assert head.bias is not None
    logits, labels = F.linear(x, head.weight, head.bias), torch.tensor([[0, -100, 6], [1, 2, -100]])
    assert torch.equal(head(x, Sequences(2, 3)), logits)
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = head(x, Sequences(2, 3), labels)
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(one, head.bias)[0] for one in (loss, want)), rtol=1e-12, atol=0)


def test_the_row_of_padding_is_read_but_not_trained() -> None:
    embedding = filled(Embedding(V, E, padding_id=2))
    ids = torch.tensor([[2, 1, 2]])
    out = embedding(ids)
    assert torch.equal(out[0, 0], embedding.weight[2])
    out.sum().backward()
    assert not grad(embedding.weight)[2].any() and grad(embedding.weight)[1].all()


@pytest.mark.parametrize("wrong", [-1, V])
def test_padding_that_is_no_token_is_refused(wrong: int) -> None:
    """Defect W11 of the reference: -1 means the last row to torch."""
    with pytest.raises(ConfigError, match=f"padding id {wrong} is none of {V} tokens"):
        Embedding(V, E, padding_id=wrong)
