"""Plain modules that are no transformers models: good ones, and those that cannot be cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Returns its tensor and hands a second one through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * scale, scale


class Net(nn.Module):
    """A sum over places of a few blocks; the first block's output is read again behind the last one."""

    def __init__(self, width: int = 8, blocks: int = 4, skip: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("table", torch.linspace(0.5, 1.5, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)
        self.skip = skip

    def forward(self, input_ids: Tensor) -> Tensor:
        x, scale = self.embed(input_ids) * self.gain, self.table.expand(len(input_ids), 1, -1)
        seen = []
        for block in self.blocks:
            x, scale = block(x, scale)
            seen.append(x)
        return self.head((x + seen[0] if self.skip else x).mean(1))


class Flat(nn.Module):
    """No repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Deciding(Net):
    """Looks at values between its blocks."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x, scale = self.embed(input_ids), self.table
        for block in self.blocks:
            if x.sum() > 0:
                x, scale = block(x, scale)
        return self.head(x.mean(1))


class Twice(Net):
    """Runs a block twice."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x, scale = self.embed(input_ids), self.table
        for block in (*self.blocks, self.blocks[0]):
            x, scale = block(x, scale)
        return self.head(x.mean(1))


def net_batch(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(11, (rows, 5), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(3, (rows,), generator=generator)}
