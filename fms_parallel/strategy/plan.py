"""`generate_layer_plan`: a tensor plan for a model without twins, from regular expressions over its module names.

    patterns = {
        r"layers\\.\\d+\\.attn\\.(q|k|v)": "colwise",   r"layers\\.\\d+\\.attn\\.o": "rowwise",
        r"layers\\.\\d+\\.mlp\\.up": "colwise",         r"layers\\.\\d+\\.mlp\\.down": "rowwise",
        r"embed": "rowwise_embedding",               r"head": "colwise_gather",
        r".*norm.*": "sequence",
    }
    model = compose(model, layout, plan=generate_layer_plan(model, patterns, sp=layout.sp))

The model computes its head count from what a colwise layer gives (`view(..., -1, head_width)`). It knows names and
words; what a word does to a module is in `styles.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from fms_parallel.errors import LayoutError, unknown
from fms_parallel.log import get_logger
from fms_parallel.modules.tp import twin_of
from fms_parallel.strategy.styles import (
    Colwise,
    ColwiseGather,
    Copied,
    Door,
    PartialStyle,
    PlannedStyle,
    ReplicateStyle,
    Rowwise,
    RowwiseEmbedding,
    Sequence,
)

WORDS: dict[str, type[PlannedStyle]] = {
    "colwise": Colwise,
    "rowwise": Rowwise,
    "colwise_gather": ColwiseGather,
    "rowwise_embedding": RowwiseEmbedding,
    "sequence": Sequence,
    "replicate": ReplicateStyle,
    "partial": PartialStyle,
    "copied": Copied,
}
"""Word -> style.

| word | module | how |
|---|---|---|
| colwise | Linear | cut along its output; begins a region |
| rowwise | Linear | cut along its input, reads what colwise gave; ends a region |
| colwise_gather | Linear | cut along its output, which is then put together: a head |
| rowwise_embedding | Embedding | cut along its vocabulary |
| sequence | any that treats tokens one by one | on this rank's tokens with sp, as replicate without |
| replicate | any | the same on every rank; what no pattern matches gets this |
| partial | any, inside a region | whole parameters, used on this rank's heads: a norm of queries |
| copied | Linear | whole on every rank, begins a region: the one kv head of multi-query attention |
"""

_NEEDS_PARAMETERS = (ColwiseParallel, RowwiseParallel)
_logger = get_logger(__name__)


def generate_layer_plan(
    model: nn.Module, patterns: Mapping[str, str | ParallelStyle], *, sp: bool = False
) -> dict[str, ParallelStyle]:
    """Styles for the modules of `model`, for `compose(..., plan=)` or `TensorParallelStrategy(plan=)`.

    Every module with parameters that no pattern matches (and no twin covers) is replicated, so that each parameter
    becomes a DTensor with a right gradient. A pattern that matches nothing is logged as a warning.

    Args:
        patterns: regular expression -> word of `WORDS`, or any `ParallelStyle` of torch. An expression must match the
            whole dotted name of a module.
        sp: keep the residual `[B, S, E]` cut along its tokens between regions; must agree with the layout.
    Returns:
        module name -> style.
    Raises:
        LayoutError: an unknown word, a bad expression, two patterns for one module, a word that the module cannot
            follow, a module inside a twin.
    """
    for pattern, word in patterns.items():
        if not isinstance(word, ParallelStyle) and word not in WORDS:
            raise LayoutError(f"pattern {pattern!r}: {unknown('word of a tensor plan', str(word), WORDS)}")
    modules = {name: module for name, module in model.named_modules() if name}
    matched = _match(list(modules), patterns)
    _warn_of_dropout(modules)
    door = Door()
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        recurse = not any(_is_below(other, name) for other in matched)
        if name in matched:
            if _has_twin(model, name):
                raise LayoutError(
                    f"pattern {matched[name]!r} matches {name}, which a twin cuts already: make it narrower."
                )
            plan[name] = _style(name, module, patterns[matched[name]], sp, door, recurse)
        elif not _has_twin(model, name) and (_owns_parameters(module) or (sp and not name)):
            plan[name] = ReplicateStyle(name, sp, door, recurse)
    return plan


def _owns_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _is_below(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")


def _match(names: list[str], patterns: Mapping[str, str | ParallelStyle]) -> dict[str, str]:
    """Module name -> the pattern that matches it."""
    found: dict[str, str] = {}
    for pattern in patterns:
        hits = [name for name in names if _compile(pattern).fullmatch(name)]
        for name in hits:
            if name in found:
                raise LayoutError(f"{name} matches two patterns, {found[name]!r} and {pattern!r}: make one narrower.")
            found[name] = pattern
        if not hits:
            nearest = difflib.get_close_matches(pattern.replace("\\", ""), names, n=1, cutoff=0.0)
            _logger.warning("pattern %r matches no module; the nearest name is %r.", pattern, *nearest or [""])
    return found


def _warn_of_dropout(modules: Mapping[str, nn.Module]) -> None:
    """torch's dropout draws from each rank's own generator; ours (`modules/dropout.py`) does not."""
    names = [name for name, m in modules.items() if isinstance(m, nn.Dropout) and m.p > 0 and m.training]
    if names:
        _logger.warning(
            "%d torch dropouts (%s, ...) draw other elements in every layout; use fms_parallel's Dropout, or p=0.",
            len(names),
            names[0],
        )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LayoutError(f"pattern {pattern!r} is no regular expression: {error}.") from error


def _has_twin(model: nn.Module, name: str) -> bool:
    """Whether the module or one around it has a twin that places its parameters."""
    parts = name.split(".") if name else []
    return any(twin_of(model.get_submodule(".".join(parts[:n]))) is not None for n in range(len(parts) + 1))


def _style(
    name: str, module: nn.Module, word: str | ParallelStyle, sp: bool, door: Door, recurse: bool
) -> ParallelStyle:
    """The style of one matched module, checked against what the module is."""
    kind = type(module).__name__
    cuts = isinstance(word, _NEEDS_PARAMETERS) or (isinstance(word, str) and word != "sequence")
    if cuts and not any(True for _ in module.parameters()):
        what = repr(word) if isinstance(word, str) else type(word).__name__
        raise LayoutError(f"{name} ({kind}) has no parameters that {what} could cut: match the layer itself.")
    if isinstance(word, ParallelStyle):
        return word
    style = ReplicateStyle if word == "sequence" and not sp else WORDS[word]
    if not isinstance(module, style.accepts):
        wanted = " or ".join(f"nn.{accepted.__name__}" for accepted in style.accepts)
        raise LayoutError(
            f"{name}: {word!r} cuts {wanted}, this is {kind}. Match the layer itself, or write it as {wanted}."
        )
    return style(name, sp, door, recurse)
