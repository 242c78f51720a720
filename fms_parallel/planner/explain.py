"""Why one layout is faster than another: the difference of their steps, part by part. It knows estimates only."""

from __future__ import annotations

from dataclasses import dataclass

from fms_parallel.planner.api import Estimate

NAMES = {
    "compute": "computing",
    "recompute": "recomputing activations",
    "tp": "exchanging activations between tensor-parallel ranks",
    "cp": "exchanging keys and values between context-parallel ranks",
    "ep": "exchanging tokens between experts",
    "fsdp": "gathering parameters and reducing gradients that computation does not hide",
    "dp": "averaging gradients over replicas",
    "pp": "handing activations from stage to stage",
    "bubble": "waiting while the pipeline fills and drains",
    "optimizer": "the optimizer",
    "other": "fixed costs",
}


@dataclass(frozen=True)
class Difference:
    """One purpose: seconds of both layouts."""

    purpose: str
    first: float
    second: float

    @property
    def gained(self) -> float:
        """Seconds that the first layout saves here."""
        return self.second - self.first


def differences(first: Estimate, second: Estimate) -> list[Difference]:
    """Every purpose that either spends time on, largest difference first."""
    found = [Difference(name, first.breakdown[name], second.breakdown[name]) for name in first.breakdown]
    return sorted((d for d in found if d.first or d.second), key=lambda d: -abs(d.gained))


def sentence(first: Estimate, second: Estimate) -> str:
    """The answer in one or two sentences."""
    faster, slower = (first, second) if first.step_time_s <= second.step_time_s else (second, first)
    ratio = slower.step_time_s / faster.step_time_s
    gaps = differences(faster, slower)
    gains = [d for d in gaps if d.gained > 0][:2]
    losses = [d for d in gaps if d.gained < 0][:1]
    names = (str(faster.layout) or "one process", str(slower.layout) or "one process")
    if not gains:
        return f"{names[0]} and {names[1]} take equally long."
    text = f"{names[0]} is {ratio:.2f}x as fast as {names[1]}: it spends "
    text += " and ".join(f"{d.gained:.3f} s less on {NAMES[d.purpose]}" for d in gains)
    text += f", and {-losses[0].gained:.3f} s more on {NAMES[losses[0].purpose]}." if losses else "."
    for estimate, name in zip((faster, slower), names, strict=True):
        if estimate.margin < 0:
            text += f" {name} needs {estimate.memory_gb:.1f} GiB, more than a device has: it would not run."
    return text
