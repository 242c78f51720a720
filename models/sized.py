"""What every model config answers about sizes, from its one `ModelShape`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from fms_parallel.shape import ModelShape


class Sized(ABC):
    """Base of the configs: a config says its `shape()`, the rest follows."""

    @abstractmethod
    def shape(self) -> ModelShape:
        """Sizes for the planner, the layout's validation and the metrics."""

    def parameters(self) -> int:
        """Unique parameters."""
        return self.shape().parameters()

    def flops_per_token(self, sequence: int) -> int:
        """Forward and backward, see `ModelShape.flops_per_token`."""
        return self.shape().flops_per_token(sequence)

    def activation_bytes(self, batch: int, sequence: int, **cut: Any) -> int:
        """Kept for the backward pass, see `ModelShape.activation_bytes`."""
        return self.shape().activation_bytes(batch, sequence, **cut)
