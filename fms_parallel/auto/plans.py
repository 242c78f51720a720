"""Which modules of any model are cut over tp, and how: the caller's word, else transformers' own plan, else inferred.

All three come to one form, regular expression over module names -> word of `strategy/plan.py`. It knows names and
words; what a word does to a module is in `strategy/styles.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from fms_parallel.auto.tensor_plan import infer_tensor_plan
from fms_parallel.auto.tensor_styles import Word, use_words
from fms_parallel.errors import LayoutError
from fms_parallel.strategy.plan import generate_layer_plan
from fms_parallel.strategy.ties import tied_names

WORDS = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "colwise_gather_output": "colwise_gather",
    "colwise_rep": "colwise_gather",
    "embedding_rowwise": "rowwise_embedding",
    "replicated_with_grad_allreduce": "partial",
}
"""transformers' words -> ours."""


def tensor_patterns(
    model: nn.Module,
    tp: int,
    tensor_plan: Mapping[str, Any] | None,
    inputs: Mapping[str, Any],
    stages: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Regular expression -> word for `styles_for`.

    Args:
        inputs: what the model's forward is given. stages: block -> its pipeline stage.
    Raises:
        LayoutError: no plan is given, known or inferred; heads that tp does not divide.
    """
    if tensor_plan is not None:
        return dict(tensor_plan)
    check_heads(model, tp)
    known = dict(getattr(model, "tp_plan", None) or {})
    unknown = sorted({word for word in known.values() if word not in WORDS})
    if known and not unknown:
        return _with_ties(model, {_expression(name): WORDS[word] for name, word in known.items()})
    return infer_tensor_plan(model, inputs, tp, stages)


def _expression(name: str) -> str:
    """`model.layers.*.mlp.up_proj` -> a regular expression."""
    return r"\d+".join(map(re.escape, name.split("*")))


def _with_ties(model: nn.Module, patterns: dict[str, str]) -> dict[str, str]:
    """An embedding whose weight a gathered head uses is cut along its vocabulary as the head is, or neither is."""
    for names in tied_names(model):
        modules = [name.rpartition(".")[0] for name in names]
        words = {module: _word_of(module, patterns) for module in modules}
        if len({word is None for word in words.values()}) > 1:
            for module, word in words.items():
                if word is None and isinstance(model.get_submodule(module), nn.Embedding):
                    patterns[re.escape(module)] = "rowwise_embedding"
                elif word is None and isinstance(model.get_submodule(module), nn.Linear):
                    patterns[re.escape(module)] = "colwise_gather"
    return patterns


def _word_of(module: str, patterns: Mapping[str, str]) -> str | None:
    return next((word for pattern, word in patterns.items() if re.fullmatch(pattern, module)), None)


def check_heads(model: nn.Module, tp: int) -> None:
    """Raises LayoutError when tp does not divide a number of heads in the model's config."""
    config = getattr(model, "config", None)
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if isinstance(heads, int) and heads % tp:
            fits = [degree for degree in range(1, heads + 1) if heads % degree == 0]
            raise LayoutError(
                f"tp={tp} does not divide {field}={heads} of {type(model).__name__}: each rank holds whole heads. "
                f"Use tp in {fits}."
            )


def styles_for(model: nn.Module, patterns: Mapping[str, Any], tp: int) -> dict[str, Any]:
    """The styles of a stage's modules; patterns of modules that other stages hold match nothing here, quietly.

    Attributes that a plan divides by tp are divided on the modules of `model`.
    """
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    found = {p: [name for name in names if re.compile(p).fullmatch(name)] for p in patterns}
    here = {p: patterns[p] for p, matched in found.items() if matched}
    words = {name: word for p, word in here.items() if isinstance(word, Word) for name in found[p]}
    plan = generate_layer_plan(model, {p: word for p, word in here.items() if not isinstance(word, Word)})
    return use_words(model, plan, words, tp)
