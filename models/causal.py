"""What causal language models share: how a forward goes, and its parts, which a pipeline stage runs one by one.

It knows no architecture: what a block is told about its tokens (`sequences`), and what it first reads (`enter`), each
model says itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fms_parallel.errors import ConfigError
from fms_parallel.modules.blocks import Blocks
from fms_parallel.modules.context import Context, last_position, positions_of
from fms_parallel.modules.sequences import DropoutKey, KVStore, Sequences


class CausalModel(nn.Module):
    """`enter`, the blocks in `layers`, `norm`, `head`; `config` says at least `width` and `max_positions`."""

    config: Any
    layers: Blocks
    norm: nn.Module
    head: nn.Module

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        first_position: int = 0,
        mask: Tensor | None = None,
        cache: KVStore | None = None,
        dropout: DropoutKey | None = None,
        last: int | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Logits, or the summed loss.

        Args:
            input_ids: `[B, S]`. labels: `[B, S]`, the token wanted *at* each position (already shifted), -100 for none.
            positions: `[B, S]` when rows differ; otherwise they are first_position .. first_position + S.
            mask: bool `[B, 1, S, T]`, True where a query may attend; None is causal. cache: earlier keys and values.
            dropout: names this forward's random bits; needed in training when the config drops anything.
            last: only the logits of the last so many positions.
            context: what of longer sequences the S tokens are, when the ranks of cp share them.
        Returns:
            logits `[B, S or last, V]`, or with labels the cross-entropy summed over tokens, in fp32.
        Raises:
            ConfigError: more positions than `max_positions`. RuntimeError: one of `positions` is not in its table.
        """
        batch, length = input_ids.shape
        if positions is None:
            positions = positions_of(length, first_position, context, input_ids.device)
        more = {"mask": mask, "cache": cache, "dropout": dropout, "context": context}
        seq = self.sequences(batch, length, positions, first_position, **more)
        x = self.enter(input_ids, seq)
        x = self.layers(x, seq)
        return self.leave(x, seq, labels, last)

    # The parts of a forward, which a pipeline stage runs one by one.

    @property
    def activation_width(self) -> int:
        """E."""
        return int(self.config.width)

    def sequences(self, batch: int, length: int, positions: Tensor, first_position: int = 0, **more: Any) -> Sequences:
        """What every block is told; arguments as of `forward`."""
        raise NotImplementedError(f"{type(self).__name__} must say what its blocks are told about their tokens")

    def end_of(self, length: int, first_position: int, context: Context | None) -> int:
        """The last position of whole sequences, plus one. Raises ConfigError when the model has not so many."""
        end = last_position(length, first_position, context)
        if end > self.config.max_positions:
            raise ConfigError(f"position {end} is beyond max_positions={self.config.max_positions} of this model.")
        return end

    def enter(self, input_ids: Tensor, seq: Sequences) -> Tensor:
        """Ids `[B, S]` -> what the first block reads."""
        raise NotImplementedError(f"{type(self).__name__} must say what its first block reads")

    def leave(self, x: Tensor, seq: Sequences, labels: Tensor | None = None, last: int | None = None) -> Tensor:
        """What the last block made -> logits or loss."""
        found: Tensor = self.head(self.norm(x), seq, labels, last)
        return found
