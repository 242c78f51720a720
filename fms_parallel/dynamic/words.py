"""What changes over the steps of a run, as a person types it. It knows words; no torch.

10:tp=2,sp,20:fsdp=2                         layouts
1000:seq_len=512,3000:batch_size=128         phases
"""

from __future__ import annotations

import re

from fms_parallel.errors import ConfigError, LayoutError, unknown
from fms_parallel.layout import ParallelLayout
from fms_parallel.phases import Phase

_ENTRY = re.compile(r"(\d+):(.*)")
_SIZES = ("seq_len", "batch_size")


def parse_schedule(text: str) -> dict[int, str]:
    """Step -> layout from that step on: `"10:tp=2,sp,20:fsdp=2"` -> `{10: "tp=2,sp", 20: "fsdp=2"}`.

    Raises:
        LayoutError: no step before a layout, a step twice, or a layout that cannot be.
    """
    layouts = {step: ",".join(words) for step, words in _by_step(text, "STEP:LAYOUT, as in 10:tp=2,sp,20:fsdp=2")}
    for layout in layouts.values():
        ParallelLayout.parse(layout)
    return layouts


def parse_phases(text: str) -> list[Phase]:
    """`"1000:seq_len=512,3000:seq_len=1024,batch_size=128"` -> what steps work on from 1000 and from 3000 on.

    Raises:
        ConfigError: no step before a size, a step or a size twice, an unknown size, or a number below 1.
    """
    phases = []
    for step, words in _by_step(text, "STEP:SIZE=N, as in 1000:seq_len=512,3000:batch_size=128"):
        sizes: dict[str, int] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in _SIZES:
                raise ConfigError(f"{text!r}: {unknown('size of a phase', name, _SIZES)}")
            if name in sizes:
                raise ConfigError(f"{text!r}: step {step} has {name} twice.")
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"{text!r}: {word} at step {step}: needs a whole number >= 1, as in {name}=64.")
            sizes[name] = int(value)
        phases.append(Phase(step, **sizes))
    return phases


def _by_step(text: str, form: str) -> list[tuple[int, list[str]]]:
    """Comma-separated words by the step that stands before the first of them. `form`: what should have been written."""
    found: dict[int, list[str]] = {}
    step: int | None = None
    for word in filter(None, (part.strip() for part in text.split(","))):
        entry = _ENTRY.fullmatch(word)
        if entry:
            step = int(entry[1])
            if step in found:
                raise LayoutError(f"{text!r}: step {step} is given twice.")
            found[step], word = [], entry[2]
        if step is None:
            raise LayoutError(f"{text!r}: write {form}.")
        found[step].append(word)
    return list(found.items())
