"""The library's logger. The library never prints: scripts decide what a person sees."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """The logger of one module of the library, a child of `fms_parallel`."""
    return logging.getLogger(name if name.startswith("fms_parallel") else f"fms_parallel.{name}")


def log_to_stderr(level: int = logging.INFO, rank: int = 0) -> None:
    """Show the library's messages on stderr, from rank 0 only (other ranks show warnings and worse).

    Called by scripts, never by the library.
    """
    logger = logging.getLogger("fms_parallel")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    # One line per 2-D redistribution, on every step: true, harmless, and it drowns everything else.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
