from __future__ import annotations

import pytest
import torch

from fms_parallel.modules.added_embedding import AddedEmbedding
from fms_parallel.modules.sequences import Sequences


def table(**options: object) -> AddedEmbedding:
    module = AddedEmbedding(5, 4, **options).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["same in every row", "by row"])
def test_a_row_is_added_to_each_token(shape: tuple[int, ...]) -> None:
    module, x = table(), torch.randn(2, 3, 4, dtype=torch.float64)
    ids = torch.randint(5, shape)
    expected = torch.stack(
        [torch.stack([x[b, s] + module.weight[ids.expand(2, 3)[b, s]] for s in range(3)]) for b in (0, 1)]
    )
    torch.testing.assert_close(module(x, ids, Sequences(2, 3)), expected)


def test_every_row_but_that_of_padding_is_trained() -> None:
    module, ids = table(padding_id=1), torch.tensor([0, 1, 1, 4])
    module(torch.zeros(2, 4, 4, dtype=torch.float64), ids, Sequences(2, 4)).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad[:, 0].tolist() == [2.0, 0.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("wrong", [5, -1])
def test_ids_beyond_the_table_are_refused(wrong: int) -> None:
    with pytest.raises(RuntimeError, match=r"a token type is not in the table of 5"):
        table(what="token type")(torch.zeros(1, 2, 4, dtype=torch.float64), torch.tensor([0, wrong]), Sequences(1, 2))
