"""Small tables whose rows are added to activations (learned positions, token types), and their twin.

Nobody cuts such a table: every rank holds it. Under sequence parallelism a rank looks up the rows of its own tokens, so
the table's gradient is a partial sum over the axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate

from fms_parallel.compat import assert_on_device
from fms_parallel.modules.initial import Init, Normal
from fms_parallel.modules.sequences import Sequences
from fms_parallel.modules.tp import TPModule


class AddedEmbedding(nn.Module):
    """x + weight[ids].

    Args:
        rows: of the table `weight [rows, E]`. what: a row stands for, for messages.
        padding_id: a row that is read but not trained, see `Embedding`.
    """

    def __init__(
        self, rows: int, width: int, std: float = 0.02, *, what: str = "position", padding_id: int | None = None
    ) -> None:
        super().__init__()
        self.rows, self.std, self.what, self.padding_id = rows, std, what, padding_id
        self.weight = nn.Parameter(torch.empty(rows, width))

    def initial(self) -> dict[str, Init]:
        """How own parameters start."""
        return {"weight": Normal(self.std)}

    def forward(self, x: Tensor, ids: Tensor, seq: Sequences) -> Tensor:
        """Add a row to each token.

        Args:
            x: `[B, S, E]`. ids: `[S]` when all sequences have the same, or `[B, S]`; less than `rows`.
        Raises:
            RuntimeError: an id beyond the table.
        """
        self.check(ids)
        return x + F.embedding(ids, self.weight.to(x.dtype), self.padding_id)

    def check(self, ids: Tensor) -> None:
        """Refuse ids beyond the table."""
        assert_on_device(((ids >= 0) & (ids < self.rows)).all(), f"a {self.what} is not in the table of {self.rows}.")


class TPAddedEmbedding(TPModule, AddedEmbedding):
    """Every rank holds the table; with sp it reads the rows of its own tokens."""

    def placements(self) -> dict[str, Placement]:
        return {"weight": Replicate()}

    def forward(self, x: Tensor, ids: Tensor, seq: Sequences) -> Tensor:
        """`x [B, S, E]`, or `[T/tp, E]` with sp, in the same form back."""
        self.check(ids)
        return x + F.embedding(self._mine(ids, x, seq) if self.sp else ids, self.whole(self.weight, x), self.padding_id)

    def _mine(self, ids: Tensor, x: Tensor, seq: Sequences) -> Tensor:
        """The ids of this rank's run of tokens; what fills up the last run reads row 0, and is dropped later."""
        run = x.shape[0]
        flat = ids.expand(seq.batch, seq.length).flatten()
        return F.pad(flat, (0, run * self.axis.size - seq.tokens)).narrow(0, self.axis.rank * run, run)
