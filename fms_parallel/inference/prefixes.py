"""`Prefixes`: beginnings of rows, full block by full block: a tree whose nodes have numbers.

    ROOT --[1 2 3 4]--> 1 --[5 6 7 8]--> 2
                          \\--[5 6 9 9]--> 3        two rows that begin alike share node 1

A node is known by its tokens and the node before it, exactly, not by a hash that could collide. It lives as long as
some block has its content, or a node behind it lives. It knows tokens; it knows no blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = 0
"""What stands before a row's first block."""

_Key = tuple[int, tuple[int, ...]]


@dataclass
class _Node:
    """key: the node before, and the tokens. uses: blocks with its content, and nodes behind it."""

    key: _Key
    uses: int = 0


class Prefixes:
    """Args: block_size: tokens of one node."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._nodes: dict[int, _Node] = {}
        self._numbers: dict[_Key, int] = {}
        self._last = ROOT

    def __len__(self) -> int:
        return len(self._nodes)

    def path(self, tokens: Sequence[int]) -> list[int]:
        """The nodes that full blocks of these tokens have, up to the first that is not there."""
        found: list[int] = []
        number: int | None = ROOT
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            number = self._numbers.get((number or ROOT, tuple(tokens[start : start + self.block_size])))
            if number is None:
                break
            found.append(number)
        return found

    def behind(self, before: int, tokens: Sequence[int]) -> int:
        """The node with these tokens behind another; a new one must be held before anything is dropped."""
        key = (before, tuple(tokens))
        if key not in self._numbers:
            self._last += 1
            self._nodes[self._last], self._numbers[key] = _Node(key), self._last
            self.hold(before)
        return self._numbers[key]

    def hold(self, number: int) -> None:
        """One more block has its content."""
        if number in self._nodes:  # not the root; nor one that is gone, behind which nobody finds anything any more
            self._nodes[number].uses += 1

    def drop(self, number: int) -> None:
        """One block less has its content."""
        while number in self._nodes:
            node = self._nodes[number]
            node.uses -= 1
            if node.uses > 0:
                return
            del self._nodes[number], self._numbers[node.key]
            number = node.key[0]
