"""What one rank holds of a model between two steps, and in other forms during one: many layouts at once, in bytes.

It knows who shards what; what micro-batches leave behind, `memory` knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.columns import OFFLOADS, Columns
from fms_parallel.planner.experts import Experts
from fms_parallel.planner.software import Software
from fms_parallel.shape import ModelShape

Array = NDArray[Any]


@dataclass(frozen=True)
class States:
    """Parameters, gradients, optimizer state and gathered copies of one rank."""

    shape: ModelShape
    columns: Columns
    software: Software
    experts: Experts | None

    def rank(self, blocks: Array, embedding: Any, head: Any, held: Any = 1.0) -> tuple[Array, Array, Array, Array]:
        """Bytes of the four kinds for a rank with so many blocks and `held` micro-batches in flight."""
        c, s = self.columns, self.software
        tables = self.table() * (
            np.asarray(embedding, dtype=float) + np.asarray(head, dtype=float) * self.separate_head()
        )
        last_norm = np.asarray(head, dtype=float) * self.shape.norm_parameters
        whole = blocks * self.block() + tables + last_norm
        shards = self.shards()
        over_dp = np.where(c.zero >= 1, c.dp, 1)
        kept = np.where(c.offload == OFFLOADS.index("params"), 0.0, 1.0)
        state = np.where(c.offload >= OFFLOADS.index("optimizer_state"), 0.0, 1.0)
        gradients = np.where(
            self.waiting(), s.gradient_bytes, s.gradient_bytes / shards / np.where(c.zero >= 2, c.dp, 1)
        )
        return (
            whole * s.parameter_bytes / shards * kept,
            whole * gradients * kept,
            whole * s.optimizer_bytes / shards / over_dp * state,
            self.gathered(whole, blocks * self.block() * (np.asarray(held, dtype=float) - 1)),
        )

    def pooled(self, gradients: Array) -> tuple[Array, Array]:
        """Of gradients what has a pool of its own during the whole step, and what is where activations are.

        An allocator keeps a pool for each stream: what a reduction made is nobody else's memory afterwards.
        """
        shards, waiting = self.shards(), self.waiting()
        pooled = np.where((shards > 1) & self.software.stream_pools, gradients / np.where(waiting, shards, 1), 0.0)
        return pooled, np.where(waiting, gradients, gradients - pooled)

    def waiting(self) -> Array:
        """Where gradients of all but the last micro-batch wait whole for the reduction of the last one."""
        return np.asarray((self.shards() > 1) & (self.columns.count > 1))

    def shards(self) -> Array:
        """Ranks that share one copy of a parameter."""
        c, when = self.columns, self.software.shard_over_cp
        over = (when == "always") | ((when == "with fsdp") & (c.fsdp > 1))
        return np.asarray(c.fsdp * np.where(over, c.cp, 1))

    def gathered(self, whole: Array, more: Array) -> Array:
        """Copies in the working precision: with fsdp of two blocks (or those kept), without of all if states are wider.

        `more`: parameters of the blocks for each micro-batch in flight but one, of which software may keep copies.

        A pipeline gathers its stage once per step and keeps it, and gradients of all but the last micro-batch wait
        whole on their rank (both as torch's pipeline runtime does with FSDP2); buffers of two gathers stay reserved.
        """
        c, s = self.columns, self.software
        wider = np.asarray(s.parameter_bytes > s.working_bytes)
        copied = wider | (s.replicas_copy & ((c.dp > 1) | (c.cp > 1)))
        # Blocks that stay gathered are all there at the head; while others are gathered two by two, they are gone.
        two_blocks = self.block() * (np.maximum(c.kept, 2) * s.working_bytes + s.reduce_bytes)
        two_blocks = two_blocks + 2 * self.table() * s.working_bytes
        kept = whole * s.working_bytes
        staged = kept + 2 * self.block() * s.working_bytes * s.stream_pools
        flying = more * s.working_bytes * (wider & s.cast_again & (c.pp > 1))
        return np.where(
            self.shards() > 1, np.where(c.pp > 1, staged, np.minimum(two_blocks, kept)), kept * copied + flying
        )

    def block(self) -> Array:
        """Parameters of one block on one rank, gathered: matrices over tp, norms whole."""
        shape, tp = self.shape, self.columns.tp
        kv = (np.maximum(shape.kv_heads, tp) - shape.kv_heads) * shape.head_width * shape.width * 2
        ffn = shape.ffn_parameters if self.experts is None else self.experts.parameters(shape) / self.experts.ep
        return (shape.attention_parameters + kv) / tp + ffn / self.columns.tp_of_ffn + 2 * shape.norm_parameters

    def table(self) -> Array:
        """Parameters of the embedding on one rank; the head has as many."""
        positions = self.shape.max_positions * self.shape.width if self.shape.learned_positions else 0
        return self.shape.vocab * self.shape.width / self.columns.tp + positions / 2

    def separate_head(self) -> Array:
        """1 where the head is a second table: not tied, or tied across two ranks of a pipeline."""
        return np.where((self.columns.pp > 1) | (not self.shape.tied), 1.0, 0.0)
