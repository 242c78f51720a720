"""`Blocks`: the repeated blocks of a model, one after the other."""

from __future__ import annotations

from torch import Tensor, nn

from fms_parallel.modules.sequences import Sequences


class Blocks(nn.ModuleList):
    """Blocks that are called as `block(x, sequences)`, and together the same way."""

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """What the first block reads -> what the last one makes."""
        for block in self:
            x = block(x, seq)
        return x
