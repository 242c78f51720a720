"""`Channel`: small messages between the ranks of a model, which nobody waits for until somebody wants to read them.

    first rank      requests, cancellations  -->  all others      before each step
    last stage      token ids                -->  all others      while the others work on the next rows

They are wanted on the host, so they go over gloo whatever the model computes on; and because nobody waits where they
are sent, a stage goes on while another has not yet come to reading. It knows ranks and tensors; it knows no requests.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel import compat
from fms_parallel.errors import RankFailed
from fms_parallel.inference.ranks import SameOnAllRanks

if TYPE_CHECKING:
    from fms_parallel.inference.sockets import Sockets

COMMANDS, ANSWERS = 1, 2
"""Lanes: what two ranks send each other stays in order within a lane."""

BROKEN = "a rank of this engine failed before: start the job anew."


class Channel:
    """Messages of one rank to all others.

    Args:
        mesh: of the model; making a channel is collective over all ranks of the job.
        ahead: messages of a lane that may be under way; one more waits for the oldest to be read.
    """

    def __init__(self, mesh: DeviceMesh, ahead: int) -> None:
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        self.timeout = compat.group_timeout()
        self.group: Any = dist.new_group(self.ranks, backend="gloo", timeout=self.timeout)
        self.me, self.ahead, self.broken = dist.get_rank(self.group), ahead, False
        self._sent: dict[int, deque[list[tuple[dist.Work, Tensor]]]] = {lane: deque() for lane in (COMMANDS, ANSWERS)}

    def tell(self, x: Tensor, lane: int) -> None:
        """Start sending `x` (on the host; nobody may write to it) to all other ranks."""
        peers = [peer for peer in range(len(self.ranks)) if peer != self.me]
        if self.broken:
            raise RankFailed(BROKEN)
        try:
            works = [(dist.isend(x, group=self.group, group_dst=peer, tag=lane), x) for peer in peers]
        except RuntimeError as error:
            raise self._failed(f"rank {self.ranks[self.me]} could not send", error) from error
        self._sent[lane].append([(work, x) for work, x in works if work is not None])
        if len(self._sent[lane]) > self.ahead:
            self._finish(lane)

    def hear(self, out: Tensor, source: int, lane: int) -> Tensor:
        """Wait for the next message of rank `source` of the mesh, into `out` (on the host)."""
        if self.broken:
            raise RankFailed(BROKEN)
        try:
            work = dist.irecv(out, group=self.group, group_src=source, tag=lane)
            assert work is not None
            work.wait()
        except RuntimeError as error:
            raise self._failed(f"rank {self.ranks[source]} said nothing", error) from error
        return out

    def close(self) -> None:
        """Wait until everything sent is read (unless a rank failed), and let the connections go."""
        if self.group is None:
            return
        for lane in self._sent:
            while self._sent[lane] and not self.broken:
                self._finish(lane)
        dist.destroy_process_group(self.group)
        self.group = None

    def _finish(self, lane: int) -> None:
        try:
            for work, _ in self._sent[lane].popleft():
                work.wait()
        except RuntimeError as error:
            raise self._failed("a rank did not read what it was sent", error) from error

    def _failed(self, what: str, error: Exception) -> RankFailed:
        self.broken = True
        seconds = self.timeout.total_seconds()
        return RankFailed(f"{what} within {seconds:g} s: it has died or hangs ({error}). See its own output.")


class StagedRanks(SameOnAllRanks):
    """The ranks of a model cut into stages: what the first says is sent, and not waited for.

    Args:
        groups: steps under way at a time.
    Attributes:
        peers: those of the same stage.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device, groups: int) -> None:
        super().__init__(mesh, device)
        self.groups, self.channel = groups, Channel(mesh, 2 * groups + 2)
        self.peers = SameOnAllRanks(mesh, device, without=("pp",))

    def share(self, sent: bytes) -> bytes:
        """What the first rank sends, on all of them."""
        if self.is_first:
            self.channel.tell(torch.tensor([len(sent)]), COMMANDS)
            if sent:
                self.channel.tell(torch.frombuffer(bytearray(sent), dtype=torch.uint8), COMMANDS)
            return sent
        size = int(self.channel.hear(torch.zeros(1, dtype=torch.int64), 0, COMMANDS))
        if size == 0:
            return b""
        return self.channel.hear(torch.zeros(size, dtype=torch.uint8), 0, COMMANDS).numpy().tobytes()

    @property
    def broken(self) -> bool:
        """A rank failed: no more messages."""
        return self.channel.broken

    @broken.setter
    def broken(self, value: bool) -> None:
        self.channel.broken = value

    def close(self) -> None:
        """Everything said is read; no more will be."""
        super().close()
        self.peers.sockets = None
        self.channel.close()

    def use(self, sockets: Sockets | None) -> None:
        """Talk through these within the stage."""
        self.sockets = self.peers.sockets = sockets
