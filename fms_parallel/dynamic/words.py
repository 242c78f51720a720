"""Layouts over the steps of a run, as a person types them: `10:tp=2,sp,20:fsdp=2`. It knows words; no torch."""

from __future__ import annotations

import re

from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout

_ENTRY = re.compile(r"(\d+):(.*)")


def parse_schedule(text: str) -> dict[int, str]:
    """Step -> layout from that step on: `"10:tp=2,sp,20:fsdp=2"` -> `{10: "tp=2,sp", 20: "fsdp=2"}`.

    Raises:
        LayoutError: no step before a layout, a step twice, or a layout that cannot be.
    """
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
            raise LayoutError(f"{text!r}: write STEP:LAYOUT, as in 10:tp=2,sp,20:fsdp=2.")
        found[step].append(word)
    layouts = {step: ",".join(words) for step, words in found.items()}
    for layout in layouts.values():
        ParallelLayout.parse(layout)
    return layouts
