"""What the ranks of a job run on, measured: devices, memory, matrix products, memory traffic, the links between them.

    profile = HardwareProfiler("cpu").profile()        # every rank calls it; the same value on all of them
    profile.cluster()                                  # what the planner plans for

Everything is timed while the other ranks do the same, because what they share is shared in training too. It knows
ranks, clocks and the planner's devices; it knows no models.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.checkpoint.agree import from_every_rank, rank_and_world
from fms_parallel.errors import ConfigError
from fms_parallel.planner.hardware import GIB, Cluster, Device, Link, load_devices
from fms_parallel.planner.machine import CPU, recognise
from fms_parallel.planner.measure import device_of, measure_rank

SMALL, LARGE = 8, 1 << 22
"""Bytes of the two messages that tell a link's latency from its bandwidth."""

EVERY_PAIR = 16
"""Ranks up to which every pair is timed; above, only distances that are powers of two."""

EDGE = {"cpu": 512, "cuda": 8192}
"""Of the square matrices whose product is timed."""

STREAM = {"cpu": 1 << 24, "cuda": 1 << 30}
"""Bytes of the tensor that is read and written."""


@dataclass(frozen=True)
class LinkProfile:
    """One direction between two ranks: seconds of a message of no size, and bytes per second, while all ranks send."""

    source: int
    target: int
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class HardwareProfile:
    """The machines of a job; one number per rank, in rank order.

    Attributes:
        device_type: `cpu` or `cuda`. names: of the devices. hosts: the machine that each rank is on.
        cores: of the machine. memory_bytes: that a rank may use in all. flops_per_s: of a square fp32 product.
        memory_bytes_per_s: read plus written. links: what was timed; empty for one rank.
        device: the slowest rank as the planner's description, links included.
    """

    device_type: str
    names: tuple[str, ...]
    hosts: tuple[str, ...]
    cores: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    flops_per_s: tuple[float, ...]
    memory_bytes_per_s: tuple[float, ...]
    links: tuple[LinkProfile, ...]
    device: Device

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def nodes(self) -> dict[str, tuple[int, ...]]:
        """Host -> its ranks, in the order of first appearance."""
        return {host: tuple(r for r, h in enumerate(self.hosts) if h == host) for host in dict.fromkeys(self.hosts)}

    @property
    def bytes_per_s(self) -> float:
        """The slowest link: what a change of layout has to count on. Infinite for one rank."""
        return min((link.bytes_per_s for link in self.links), default=float("inf"))

    def cluster(self, ranks: int | None = None) -> Cluster:
        """What the planner plans for; `ranks`: of them, when some are gone."""
        return Cluster(((self.device, ranks or self.ranks),))

    def as_json(self) -> dict[str, Any]:
        """Plain values; `of_json` reads them."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> HardwareProfile:
        """The profile that `as_json` wrote, also after a journey through a file."""
        device = dict(values["device"])
        for name in ("intra", "inter"):
            device[name] = Link(**{**device[name], "efficiency": tuple(device[name]["efficiency"])})
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, (list, tuple))}
        links = tuple(LinkProfile(**link) for link in values["links"])
        return cls(**{**values, **lists, "links": links, "device": Device(**device)})


class HardwareProfiler:
    """Measures the job's ranks.

    Args:
        device_type: `cpu` or `cuda`. repeats: of each measurement; more are steadier (five take three seconds of CPU
            on one rank alone, five to six on each of several).
    """

    def __init__(self, device_type: str = CPU, repeats: int = 5) -> None:
        if repeats < 1:
            raise ConfigError(f"repeats={repeats}: measure at least once.")
        self.device_type, self.repeats = device_type, repeats

    def profile(self) -> HardwareProfile:
        """Measure. Collective; the same value on every rank.

        Raises:
            ConfigError: a GPU that no device file describes.
        """
        rank, world = rank_and_world()
        device = torch.device(CPU) if self.device_type == CPU else torch.device("cuda", torch.cuda.current_device())
        host, cores = socket.gethostname(), len(os.sched_getaffinity(0))
        mine = (host, cores, self._name(device), self._memory(device), self._product(device), self._stream(device))
        told = from_every_rank(mine)
        hosts, all_cores, names, memory, flops, traffic = (tuple(column) for column in zip(*told, strict=True))
        shared = tuple(
            size // hosts.count(place) if self.device_type == CPU else size
            for size, place in zip(memory, hosts, strict=True)
        )
        links = tuple(link for found in from_every_rank(self._links(device, rank, world)) for link in found)
        planned = self._described(names[0], min(shared), hosts, links, min(all_cores))
        return HardwareProfile(self.device_type, names, hosts, all_cores, shared, flops, traffic, links, planned)

    # ---- one rank -----------------------------------------------------------------------------------------------

    def _name(self, device: torch.device) -> str:
        return CPU if device.type == CPU else torch.cuda.get_device_name(device)

    def _memory(self, device: torch.device) -> int:
        if device.type == CPU:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(torch.cuda.get_device_properties(device).total_memory)

    def _product(self, device: torch.device) -> float:
        edge = EDGE[device.type]
        a = torch.ones(edge, edge, device=device)
        return 2 * edge**3 / self._timed(lambda: a @ a, device)

    def _stream(self, device: torch.device) -> float:
        a = torch.zeros(STREAM[device.type] // 4, device=device)
        return 2 * STREAM[device.type] / self._timed(lambda: a.add_(1.0), device)

    def _timed(self, work: Callable[[], Any], device: torch.device) -> float:
        """Seconds, all ranks at once: the least, because what else runs there only ever makes it longer."""
        found = []
        for _ in range(self.repeats + 1):  # the first one warms up
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - began)
        return min(found[1:])

    # ---- between ranks ------------------------------------------------------------------------------------------

    def _links(self, device: torch.device, rank: int, world: int) -> list[LinkProfile]:
        """The links that lead away from this rank."""
        found = []
        for distance in distances(world):
            target, source = (rank + distance) % world, (rank - distance) % world
            small, large = (self._timed(_shift(size, target, source, device), device) for size in (SMALL, LARGE))
            found.append(LinkProfile(rank, target, small, LARGE / (large - small if large > 2 * small else large)))
        return found

    def _described(
        self, name: str, memory: int, hosts: Sequence[str], links: Sequence[LinkProfile], cores: int
    ) -> Device:
        """The planner's device: a GPU's from the device files with measured links, this CPU's measured altogether."""
        per_node = max(hosts.count(host) for host in hosts)
        if self.device_type == CPU:
            threads = torch.get_num_threads()
            try:
                with torch.random.fork_rng():
                    seconds = from_every_rank(measure_rank(self.repeats))
            finally:
                torch.set_num_threads(threads)
            found = replace(device_of(CPU, seconds, memory / GIB, cores), per_node=per_node)
            return replace(found, intra=_plain(found.intra), inter=_plain(found.inter))
        known = replace(recognise(name, memory / GIB, load_devices()), per_node=per_node)
        inside = _fitted([link for link in links if hosts[link.source] == hosts[link.target]], known.intra)
        return replace(
            known,
            intra=inside,
            inter=_fitted([link for link in links if hosts[link.source] != hosts[link.target]], known.inter),
        )


def distances(world: int) -> list[int]:
    """How far apart the ranks are that are timed together: every rank sends so many places on, all at once."""
    if world <= EVERY_PAIR:
        return list(range(1, world))
    return [1 << power for power in range(world.bit_length()) if 1 << power < world]


def _plain(link: Link) -> Link:
    """Without numpy's kinds of numbers."""
    return Link(float(link.gb_s), float(link.latency_us), float(link.tree_us), link.efficiency)


def _shift(size: int, target: int, source: int, device: torch.device) -> Callable[[], None]:
    out, into = (torch.zeros(size // 4, device=device) for _ in range(2))

    def work() -> None:
        pair: tuple[Tensor, Tensor] = (out, into)
        operations = [dist.P2POp(dist.isend, pair[0], target), dist.P2POp(dist.irecv, pair[1], source)]
        for each in dist.batch_isend_irecv(operations):
            each.wait()

    return work


def _fitted(links: Sequence[LinkProfile], known: Link) -> Link:
    """A link with measured latency and bandwidth; what was not measured is as the device file has it."""
    if not links:
        return known
    speed, latency = median(x.bytes_per_s for x in links), median(x.latency_s for x in links)
    return replace(known, gb_s=speed / 1e9 / known.efficiency[-1], latency_us=latency * 1e6)
