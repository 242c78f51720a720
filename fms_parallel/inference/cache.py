"""`KVCache`: the keys and values of all earlier tokens, allocated once.

    one layer   [B, K, capacity, D]   | written so far ........ T | free ............. |
    append      writes S positions behind T and hands out the first T + S, as a view

K is whatever the layer brings: K/tp heads under tensor parallelism, the one copied head where there are fewer kv heads
than ranks. It knows shapes; it knows nothing of masks, positions or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fms_parallel.errors import ConfigError


class KVCache:
    """Keys and values of one batch of sequences (a `modules.sequences.KVStore`).

    A layer's memory is taken at its first `append`, when its kv heads, width, dtype and device are seen.

    Args:
        capacity: tokens per sequence that fit.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: dict[int, _Layer] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes that this rank holds, all layers together."""
        tensors = [tensor for layer in self._layers.values() for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[B, K, S, D]` behind what `layer` already holds; return all of it, `[B, K, T, D]`, without a copy.

        Raises:
            ConfigError: more tokens than the capacity, or another shape than the layer's first.
        """
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = _Layer(keys, values, self.capacity)
        return held.append(keys, values)

    def one_more(self, layer: int, like: Tensor) -> list[tuple[Tensor, Tensor, int]] | None:
        """Room for one more token of every row, which the caller writes: keys and values like `like [B, K, D]`.

        Returns:
            of each row its memory, `[K, capacity, D]` each, and how many tokens it holds with the new one; None where
            `append` must say what is the matter, or make the memory first.
        """
        held = self._layers.get(layer)
        if held is None or held.length == self.capacity or not held.fits(like):
            return None
        held.length += 1
        return [(keys, values, held.length) for keys, values in held.rows]


class _Layer:
    """One layer's memory and how much of it is written."""

    def __init__(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        self.keys, self.values = (x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (keys, values))
        self.rows = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self._heads = torch.Size((*self.keys.shape[:2], self.keys.shape[3]))
        self.length = 0

    def fits(self, like: Tensor) -> bool:
        """Whether it holds rows like `[B, K, D]`."""
        return like.shape == self._heads and like.dtype == self.keys.dtype

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end, capacity = self.length + keys.shape[2], self.keys.shape[2]
        if end > capacity:
            raise ConfigError(f"token {end} does not fit a KVCache of {capacity} tokens: make it with capacity={end}.")
        for new, held in ((keys, self.keys), (values, self.values)):
            if (new.shape[:2], new.shape[3]) != (held.shape[:2], held.shape[3]):
                raise ConfigError(
                    f"a KVCache serves one batch: it holds {_sizes(held)} and was given {_sizes(new)}; take a new one."
                )
            held.narrow(2, self.length, end - self.length).copy_(new)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


def _sizes(x: Tensor) -> str:
    return f"{x.shape[0]} rows of {x.shape[1]} kv heads of width {x.shape[3]}"
