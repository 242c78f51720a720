"""What a run writes down: one JSON object per step, TensorBoard when it is installed, and the loss curve as a picture.

It knows numbers and files; one rank writes. A resumed run cuts off what was written after its checkpoint, so that each
step stands there once.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fms_parallel.errors import CheckpointError, ConfigError
from fms_parallel.log import get_logger

logger = get_logger(__name__)

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends to `folder/metrics.jsonl` and to TensorBoard event files in `folder/tensorboard`.

    Args:
        folder: made when it does not exist. from_step: steps after this one are forgotten.
    """

    def __init__(self, folder: Path, from_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        _forget_after(self.path, from_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board = _tensorboard(folder / "tensorboard", from_step)

    def write(self, values: Mapping[str, Any]) -> None:
        """One step's numbers, on disk when this returns."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _forget_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def _tensorboard(folder: Path, from_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no TensorBoard files: pip install 'fms_parallel[log]' to have them")
        return None
    return SummaryWriter(str(folder), purge_step=from_step + 1)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every step of a metrics.jsonl. A last line that a killed run left half-written is dropped.

    Raises:
        CheckpointError: another line is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(f"{path}:{number}: not JSON ({error}).") from None
    return found


def plot_losses(metrics: str | Path, picture: str | Path) -> Path:
    """Draw training and validation loss, learning rate and gradient norm over steps as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'fms_parallel[plot]'.") from None
    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=1.2, label="training loss")
    held = [row for row in rows if "validation_loss" in row]
    if held:
        top.plot([r["step"] for r in held], [r["validation_loss"] for r in held], "o-", ms=4, label="validation loss")
    top.set_ylabel("loss per token (nats)")
    top.legend(frameon=False)
    bottom.plot(
        [row["step"] for row in rows], [row["lr"] for row in rows], lw=1.2, color="tab:green", label="learning rate"
    )
    norms = bottom.twinx()
    norms.plot([r["step"] for r in rows], [r["grad_norm"] for r in rows], lw=0.8, alpha=0.6, color="tab:gray")
    norms.set_ylabel("gradient norm", color="tab:gray")
    norms.set_ylim(bottom=0)
    bottom.set_ylabel("learning rate", color="tab:green")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    for axes in (top, bottom, norms):
        axes.spines["top"].set_visible(False)
    figure.savefig(picture, dpi=120)
    return Path(picture)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
