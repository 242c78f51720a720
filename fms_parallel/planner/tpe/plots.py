"""Plots of sweeps: time against devices with its parts, configurations side by side, maps over numbers of a system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fms_parallel.errors import ConfigError

TIMES = {
    "t_comp": "computing",
    "t_mem": "waiting for memory",
    "t_tp_comm": "tensor parallel",
    "t_dp_comm": "data parallel",
    "t_pp_comm": "pipeline sends",
    "t_bubble": "pipeline idle",
}
MEMORIES = {
    "wts_mem": "weights",
    "wts_grad_mem": "gradients",
    "wts_optimizer_states_mem": "optimizer",
    "acts_mem": "activations",
}


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
    """Time against devices per system and domain; below, where each system's time and memory go in its first domain."""
    pyplot, answered = _pyplot(), _answered(rows)
    names = list(dict.fromkeys(row["system"] for row in answered))
    figure = pyplot.figure(figsize=(4 + 4 * len(names), 12), layout="constrained")
    grid = figure.add_gridspec(3, len(names))
    _lines(figure.add_subplot(grid[0, :]), answered)
    for column, name in enumerate(names):
        domain = next(row["nvlink_size"] for row in answered if row["system"] == name)
        own = [row for row in answered if (row["system"], row["nvlink_size"]) == (name, domain)]
        labels = [f"{row['gpus']}\n{_degrees(row)}" for row in own]
        time, memory = (figure.add_subplot(grid[line, column]) for line in (1, 2))
        _stacked(time, own, TIMES, labels, "seconds of a step", legend=column == 0)
        _stacked(memory, own, MEMORIES, labels, "GB", legend=column == 0)
        for axes in (time, memory):
            axes.set_xlabel(f"{name}, domain {domain}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _lines(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for name in dict.fromkeys((row["system"], row["nvlink_size"]) for row in rows):
        own = [row for row in rows if (row["system"], row["nvlink_size"]) == name]
        axes.loglog([r["gpus"] for r in own], [r["t"] for r in own], marker="o", label=f"{name[0]}, domain {name[1]}")
    sizes = sorted({row["gpus"] for row in rows})
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xticks([], minor=True)
    shortest, longest = (find(row["t"] for row in rows) for find in (min, max))
    axes.set(ylim=(shortest / 1.3, longest * 1.3))
    marks = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
    axes.set_yticks([mark for mark in marks if shortest / 1.3 <= mark <= longest * 1.3])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="devices", ylabel="seconds of a step")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def over_configurations(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """The configurations of one search side by side, best first: where time and memory go."""
    pyplot = _pyplot()
    figure, (time, memory) = pyplot.subplots(2, 1, figsize=(max(6, 1 + 0.9 * len(rows)), 8), layout="constrained")
    labels = [f"{rank}\n{_degrees(row)}" for rank, row in enumerate(rows, 1)]
    _stacked(time, rows, TIMES, labels, "seconds of a step", legend=True)
    _stacked(memory, rows, MEMORIES, labels, "GB", legend=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _degrees(row: dict[str, Any]) -> str:
    """dp, tp, pp and micro-batch of a configuration, one below the other."""
    tp = f"{row['tp1']}x{row['tp2']}" if "tp1" in row else row["tp"]
    return "\n".join((f"dp {row['dp']}", f"tp {tp}", f"pp {row['pp']}", f"mbs {row['mbs']}"))


def _stacked(
    axes: Any, rows: Sequence[dict[str, Any]], parts: dict[str, str], labels: list[str], unit: str, legend: bool
) -> None:
    bottom = [0.0] * len(rows)
    for name, word in parts.items():
        values = [row[name] for row in rows]
        axes.bar(range(len(rows)), values, bottom=bottom, label=word)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.set_xticks(range(len(rows)), labels, fontsize="small")
    axes.set(ylabel=unit)
    if legend:  # above the bars, which may be as high as the axes
        axes.legend(fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)


def over_memory(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Maps of step time over bandwidth and capacity, one per matrix rate, in the same colours; empty: nothing fits."""
    pyplot, answered = _pyplot(), _answered(rows)
    times = [row["t"] for row in answered]
    rates = sorted({row["matrix_flops_fp16"] for row in rows})
    xs, ys = (sorted({row[name] for row in rows}) for name in ("hbm_bandwidth", "hbm_capacity"))
    wide, high = 1.3 * len(xs) + 0.8, 0.9 * len(ys) + 1.2
    figure, panels = pyplot.subplots(
        1, len(rates), figsize=(wide * len(rates) + 1.2, max(high, 3)), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, rate in zip(panels[0], rates, strict=True):
        found = {(r["hbm_bandwidth"], r["hbm_capacity"]): r for r in answered if r["matrix_flops_fp16"] == rate}
        values = [[found[x, y]["t"] if (x, y) in found else float("nan") for x in xs] for y in ys]
        image = axes.imshow(
            values, origin="lower", aspect="auto", cmap="viridis_r", vmin=min(times), vmax=max(times), alpha=0.6
        )
        for (x, y), row in found.items():
            text = f"{row['t']:.3g} s\n{_degrees(row)}"
            axes.text(xs.index(x), ys.index(y), text, ha="center", va="center", fontsize="x-small")
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        axes.set(xlabel="memory bandwidth, GB/s", title=f"{rate:g} TFLOP/s")
    panels[0, 0].set(ylabel="memory capacity, GB")
    figure.colorbar(image, ax=list(panels[0]), label="seconds of a step")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
