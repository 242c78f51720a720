"""`SharedSums`: sockets between ranks of one host, and memory that they share for sums too large for a socket.

    slot k % 2 of this rank's segment   <- its numbers, then a byte to each neighbour: they are there
    slot k % 2 of the others'           -> added where they lie, in rank order: the same bits as through sockets

Of what is small a socket takes less time than a slot and a byte would; activations of a prompt, which would go over
gloo, take one copy and one addition here instead of four copies. Two slots suffice: a rank has the others' byte of sum
k + 1 only when they are done with sum k. It knows tensors and one group of ranks.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fms_parallel.distributed.collectives import Axis
from fms_parallel.distributed.shared_memory import SharedMemory
from fms_parallel.inference.sockets import MOST_BYTES, Sockets

SEGMENT = 4 << 20
"""Bytes of each rank's segment: two slots."""

THERE = b"!"


class SharedSums(Sockets):
    """A line of ranks on one host that share memory.

    Args:
        axis: the ranks. memory: of all of them, used for this alone.
    """

    usual = 1 << 16

    def __init__(self, axis: Axis, memory: SharedMemory) -> None:
        super().__init__(axis, dict(memory.sockets))
        self.memory, self.most_bytes = memory, memory.own.numel() // 2
        self._sums = 0

    def all_reduce(self, x: Tensor, group: dist.ProcessGroup) -> None:
        """Sum a contiguous `x` over the ranks, in place, a slot at a time."""
        whole = self._fits(x) or not x.is_cpu
        for part in [x] if whole else x.view(-1).split(self.most_bytes // x.element_size()):
            super().all_reduce(part, group)

    def close(self) -> None:
        """Nothing comes any more; the model talks as before."""
        super().close()
        self.memory.close()

    def _traded(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, in rank order: others' as they lie in their memory, until the sum after the next one."""
        if x.nbytes <= MOST_BYTES:
            return super()._traded(x)
        first = self.most_bytes * (self._sums % 2)
        self._sums += 1

        def place(segment: Tensor) -> Tensor:
            return segment[first : first + x.nbytes].view(x.dtype).view(x.shape)

        place(self.memory.own).copy_(x)
        word = memoryview(bytearray(THERE))
        for peer in self.peers:
            self._send(peer, word)
        for peer in self.peers:
            self._receive(peer, word)
        theirs = self.memory.theirs
        return [x if rank == self.axis.rank else place(theirs[rank]) for rank in range(self.axis.size)]
