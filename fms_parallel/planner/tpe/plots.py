"""Plots of sweeps: time against devices with its parts, memory parts, and maps over two numbers of a system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fms_parallel.errors import ConfigError

TIMES = ("t_comp", "t_mem", "t_tp_comm", "t_dp_comm", "t_pp_comm", "t_bubble")
MEMORIES = ("wts_mem", "wts_grad_mem", "wts_optimizer_states_mem", "acts_mem")


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'fms_parallel[plot]'.") from None
    return pyplot


def _answered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [row for row in rows if row["t"] is not None]
    if not found:
        raise ConfigError("no point of the sweep fits in memory: take more devices, or more capacity.")
    return found


def over_devices(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Time against devices per system and domain; below, where the first system's time and memory go."""
    pyplot, answered = _pyplot(), _answered(rows)
    figure, (top, time, memory) = pyplot.subplots(3, 1, figsize=(9, 12))
    for name in sorted({(row["system"], row["nvlink_size"]) for row in answered}):
        own = [row for row in answered if (row["system"], row["nvlink_size"]) == name]
        top.loglog([r["gpus"] for r in own], [r["t"] for r in own], marker="o", label=f"{name[0]}, domain {name[1]}")
    top.set(xlabel="devices", ylabel="seconds of a step")
    top.legend(fontsize="small")
    first = [
        r for r in answered if (r["system"], r["nvlink_size"]) == (answered[0]["system"], answered[0]["nvlink_size"])
    ]
    labels = [f"{r['gpus']}\ndp {r['dp']} tp {r['tp']} pp {r['pp']}" for r in first]
    _stacked(time, first, TIMES, labels, "seconds")
    _stacked(memory, first, MEMORIES, labels, "GB")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _stacked(axes: Any, rows: Sequence[dict[str, Any]], names: Sequence[str], labels: list[str], unit: str) -> None:
    bottom = [0.0] * len(rows)
    for name in names:
        values = [row[name] for row in rows]
        axes.bar(labels, values, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.set(ylabel=unit)
    axes.legend(fontsize="small")


def over_two(rows: Sequence[dict[str, Any]], path: str | Path, x: str, y: str) -> None:
    """A map of step time over two numbers of the system, one panel per matrix rate; white: nothing fits."""
    pyplot = _pyplot()
    _answered(rows)
    rates = sorted({row["matrix_flops_fp16"] for row in rows})
    figure, panels = pyplot.subplots(1, len(rates), figsize=(5 * len(rates) + 1, 4.5), squeeze=False)
    for axes, rate in zip(panels[0], rates, strict=True):
        own = [row for row in rows if row["matrix_flops_fp16"] == rate]
        xs, ys = sorted({row[x] for row in own}), sorted({row[y] for row in own})
        time = {(row[x], row[y]): row["t"] for row in own}
        values = [[time.get((a, b)) or float("nan") for a in xs] for b in ys]
        image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis_r")
        axes.set(xticks=range(len(xs)), yticks=range(len(ys)), xticklabels=xs, yticklabels=ys, xlabel=x, ylabel=y)
        axes.set_title(f"{rate} TFLOP/s")
        figure.colorbar(image, ax=axes, label="seconds of a step")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
