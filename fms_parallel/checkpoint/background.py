"""Checkpoints that are written while training goes on.

    main thread     step 100 | copy to host | step 101 | step 102 | ...
    writer thread                           | write, sync, digest, rename |

What is saved is a copy of the moment of `save`; from there on everything is as in `training_state.py`, in a thread that
talks to the other ranks' threads over a group of its own. It knows threads and copies; it knows no files.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel import compat
from fms_parallel.checkpoint.training_state import Unwritten, gather_up, write_out
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.log import get_logger

logger = get_logger(__name__)

PATIENCE = 30.0
"""Seconds that a run which failed waits for the checkpoint it was writing. After that it is left torn, and ignored."""


class BackgroundSaver:
    """Saves training state in a thread, one checkpoint at a time.

        with BackgroundSaver() as saver:
            saver.save(folder, step=100, model=model, optimizer=optimizer, numbers={})    # returns after a copy
            ...                                                                           # train on
        # here the last one is whole

    Making and closing one are collective over all ranks, as `save` and `wait` are. It keeps host memory for one copy
    of this rank's weights and optimizer state. A body that raises leaves after at most `PATIENCE` seconds (on
    Ctrl-C at once); a checkpoint that is not whole by then keeps its `.partial` name and is never read.
    """

    def __init__(self) -> None:
        many = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if many else None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._saved: Path | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        folder: Path,
        *,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        numbers: Mapping[str, Any],
        keep: int | None = None,
    ) -> None:
        """Copy the state and write it behind the caller's back, as `save_training_state` would. Collective.

        Waits for the checkpoint before it first, so two are never written at once.

        Raises:
            CheckpointError: on every rank: the one before failed, or model, optimizer or numbers cannot be saved.
        """
        self.wait()
        unwritten = gather_up(folder, step=step, model=model, optimizer=optimizer, numbers=numbers, keep=keep)
        copied = replace(unwritten, tensors=self._copied(unwritten.tensors))
        self._saved = None
        self._thread = threading.Thread(target=self._write, args=(copied,), name=f"save step {step}", daemon=True)
        self._thread.start()

    def wait(self) -> Path | None:
        """The checkpoint that was saved last, once it is whole; None when there was none.

        Raises:
            CheckpointError: on every rank, once: it could not be written. The earlier ones are as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self._saved

    def close(self) -> None:
        """Wait for the last checkpoint and give back memory and group; errors as in `wait`."""
        try:
            self.wait()
        finally:
            self._copies.clear()
            if self._group is not None:
                dist.barrier()  # nobody's thread still reads what another one sent
                dist.destroy_process_group(self._group)
                self._group = None

    def abandon(self, patience: float) -> None:
        """Leave after a failure elsewhere: wait so many seconds, and complain instead of raising."""
        if self._thread is None:
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            logger.warning("%s: not written after %.0f s, it is left torn.", self._thread.name, patience)
        elif self._failure is not None:
            logger.warning("%s: %s", self._thread.name, self._failure)

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon(PATIENCE if isinstance(error, Exception) else 0.0)

    def _write(self, unwritten: Unwritten) -> None:
        """What the thread does."""
        try:
            self._saved = write_out(unwritten, self._group)
        except BaseException as error:  # raised where somebody hears it
            self._failure = error

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Host copies of this rank's pieces, cut as they are, in the memory of the copies before them."""
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            local, old = local_tensor(tensor), self._copies.get(key)
            if old is None or (old.shape, old.dtype) != (local.shape, local.dtype):
                old = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            found[key] = old.copy_(local, non_blocking=local.is_cuda)
        if any(tensor.is_cuda for tensor in map(local_tensor, tensors.values())):
            torch.cuda.synchronize()
        self._copies = found
        return {key: compat.dtensor_like(tensor, found[key]) for key, tensor in tensors.items()}
