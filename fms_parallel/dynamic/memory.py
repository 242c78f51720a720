"""How much memory a rank may still take: measured where the device or the system tells it."""

from __future__ import annotations

from pathlib import Path

import torch

from fms_parallel.distributed.start import Launch

MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int:
    """Bytes that this rank can take: of its GPU, or its share of what the node's memory has left.

    Where the system does not say, there is no limit.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not MEMINFO.exists():
        return 2**62
    line = next(line for line in MEMINFO.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 // Launch.read().local_world_size
