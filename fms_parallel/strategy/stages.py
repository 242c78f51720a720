"""Cutting a model into pipeline stages: what each holds, and the module that runs it.

    model    embedding | block 0 .. block 7 | norm head
    stage 0  embedding   block 0 1 2 3
    stage 1              block 4 5 6 7        norm head

A rank keeps its stages' modules under their own names and forgets the others: a parameter has one name in every layout.
A tied head's stage keeps the embedding module too, as the owner of the weight's name; it looks nothing up there. This
page knows modules on the meta device; it knows no schedules and talks to no rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fms_parallel.errors import LayoutError, TrainingError
from fms_parallel.fit import check_tied
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.blocks import Blocks
from fms_parallel.modules.context import Context, positions_of
from fms_parallel.modules.sequences import DropoutKey
from fms_parallel.strategy.base import repeated_blocks
from fms_parallel.strategy.ties import tied_names


class Stageable(Protocol):
    """What a model offers so that its forward can be cut: what stands before the blocks, and what stands after them.

    Its repeated blocks are called as `block(x, sequences)`. Modules before the `nn.ModuleList` of blocks belong to
    `enter`, those behind it to `leave`, in the order in which the model declares them.
    """

    activation_width: int
    """E: of what blocks hand on."""

    def sequences(self, batch: int, length: int, positions: Tensor, first_position: int = 0, **more: Any) -> Any:
        """What every block is told about B sequences of S tokens; `more`: `dropout`, `context`, and `facts`.

        A model whose later blocks must know what only its ids say (which tokens are padding) has a method
        `facts(input_ids, context, **more) -> dict[str, Tensor]` besides: further arguments, `[B, ..]` each, found out
        on every stage and cut into micro-batches as the rows are; `more`: see `more_of` in strategy/context.py.
        """
        ...

    def enter(self, input_ids: Tensor, seq: Any) -> Tensor:
        """Ids `[B, S]` -> what the first block reads."""
        ...

    def leave(self, x: Tensor, seq: Any, labels: Tensor | None = None) -> Tensor:
        """What the last block made -> with labels the summed loss."""
        ...


Judge = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> a sum over the labels, a scalar."""


class Stage(nn.Module):
    """The modules of one stage, and how to run them. The model object itself runs nothing and keeps the names.

    Attributes:
        micro_batch: the next one to run. length: S. context: what longer sequences its rows are parts of, or None.
        judge: maps logits and labels to the sum that is wanted in place of the loss, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        place: tuple[int, int],
        before: dict[str, nn.Module],
        blocks: list[nn.Module],
        after: dict[str, nn.Module],
    ) -> None:
        super().__init__()
        self.index, count = place
        self.is_first, self.is_last = self.index == 0, self.index == count - 1
        self.before, self.blocks, self.after = nn.ModuleDict(before), Blocks(blocks), nn.ModuleDict(after)
        self._model = (model,)  # in a tuple: not a child
        self.micro_batch = self.length = 0
        self.context: Context | None = None
        self.judge: Judge | None = None

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        first_token: Tensor | None = None,
        seed: Tensor | None = None,
        **facts: Tensor,
    ) -> Tensor:
        """One micro-batch.

        Args:
            x: ids `[b, S]` in the first stage, else what the stage before made. labels: `[b, S]`, or of rows `[b, ..]`.
            first_token, seed: `[b]`, the `DropoutKey` of each row, when something drops.
            facts: what the model finds out from the ids, `[b, ..]` each; see `Stageable`.
        Returns:
            what the next stage reads; in the last stage the summed loss.
        Raises:
            TrainingError: naming stage and micro-batch, when a module fails.
        """
        try:
            return self._run(x, labels, first_token, seed, facts)
        except Exception as error:
            place = f"pipeline stage {self.index}, micro-batch {self.micro_batch}"
            raise TrainingError(f"{place}: {type(error).__name__}: {error}") from error
        finally:
            self.micro_batch += 1

    def _run(
        self, x: Tensor, labels: Tensor, first_token: Tensor | None, seed: Tensor | None, facts: dict[str, Tensor]
    ) -> Tensor:
        model: Any = self._model[0]
        key = None if first_token is None or seed is None else DropoutKey(int(seed[0]), int(first_token[0]))
        positions = facts.pop("positions", None)
        if positions is None:
            positions = positions_of(self.length, 0, self.context, x.device)
        seq = model.sequences(len(labels), self.length, positions, dropout=key, context=self.context, **facts)
        if self.is_first:
            x = model.enter(x, seq)
        x = self.blocks(x, seq)
        if self.is_last and self.judge is not None:
            found = self.judge(model.leave(x, seq), labels)
            return found.to(torch.promote_types(x.dtype, torch.float32))
        return model.leave(x, seq, labels) if self.is_last else x  # type: ignore[no-any-return]

    def generate(self, x: Tensor, told: Any) -> Tensor:
        """One forward without labels.

        Args:
            x: ids `[1, N]` in the first stage, else what the stage before made.
            told: `input_ids`, `positions`, `first_position` and `wanted`, and the cache of keys and values itself.
        Returns:
            what the next stage reads; in the last stage the wanted logits.
        """
        model: Any = self._model[0]
        batch, length = told.input_ids.shape
        seq = model.sequences(batch, length, told.positions, told.first_position, mask=None, cache=told)
        if self.is_first:
            x = model.enter(x, seq)
        x = self.blocks(x, seq)
        return model.leave(x, seq, None, told.wanted) if self.is_last else x  # type: ignore[no-any-return]


def cut(model: nn.Module, layout: ParallelLayout, held: Sequence[int]) -> tuple[str, ...]:
    """Forget, in place, every module that belongs to no stage in `held`.

    Returns:
        names of the parameters that first and last stage share.
    Raises:
        LayoutError: the model has no repeated blocks, or cannot be run in parts.
    """
    refuse_unless_stageable(model)
    before, blocks, after = _parts(model)
    shared = tuple(names[0] for names in tied_names(model))
    is_last = layout.stages - 1 in held
    sizes = split_blocks(model, layout)
    ends = list(accumulate(sizes))
    kept = {name for stage in held for name in blocks[ends[stage] - sizes[stage] : ends[stage]]}
    kept |= {*before} if 0 in held else {name for name in before if is_last and _owns(model, name, shared)}
    kept |= {*after} if is_last else set()
    for name in (*before, *blocks, *after):
        if name not in kept:
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._modules[attribute] = None
    return shared


def make_stages(
    model: nn.Module, layout: ParallelLayout, held: Sequence[int], sizes: Sequence[int], shared: Sequence[str]
) -> list[Stage]:
    """The stages that this rank runs, over a model that `cut` has pruned.

    Args:
        sizes: blocks of every stage. shared: parameters of the first and the last stage.
    Raises:
        LayoutError: first and last stage are on one rank, share a weight, and it is to be sharded or replicated twice.
    """
    if shared:
        check_tied(layout, shared[0])
    before, _, after = _parts(model)
    blocks = dict(repeated_blocks(model))
    ends = list(accumulate(sizes))
    stages = []
    for stage in held:
        numbers = range(ends[stage] - sizes[stage], ends[stage])
        mine = [block for name, block in blocks.items() if int(name.rpartition(".")[2]) in numbers]
        is_last = stage == layout.stages - 1
        head = _present(model, after) if is_last else {}
        owners = [name for name in before if stage == 0 or (is_last and _owns(model, name, shared))]
        table = _present(model, owners)
        stages.append(Stage(model, (stage, layout.stages), table, mine, head))
    return stages


def refuse_unless_stageable(model: nn.Module) -> None:
    """Raises LayoutError for a model that has no blocks, or not the methods of `Stageable`."""
    missing = [name for name in ("activation_width", "sequences", "enter", "leave") if not hasattr(model, name)]
    if missing:
        raise LayoutError(
            f"pp: {type(model).__name__} cannot be cut into stages: it has no {', '.join(missing)} (see Stageable in "
            "strategy/stages.py)."
        )
    if not repeated_blocks(model):
        raise LayoutError(f"pp: {type(model).__name__} has no nn.ModuleList of blocks to cut.")


def split_blocks(model: nn.Module, layout: ParallelLayout) -> tuple[int, ...]:
    """Blocks of each stage: as the layout says, or so that the most loaded stage has least to multiply.

    A block costs its matrices, the last stage also the head's; an embedding looks up and multiplies nothing.
    """
    if layout.stage_split is not None:
        return layout.stage_split
    costs = [float(_matrix_elements(block)) for _, block in repeated_blocks(model)]
    _, _, after = _parts(model)
    tail = float(sum(_matrix_elements(model.get_submodule(name)) for name in after))
    return even_split(costs, layout.stages, tail)


def even_split(costs: Sequence[float], parts: int, tail: float = 0.0) -> tuple[int, ...]:
    """Sizes of `parts` runs of `costs`, none empty, whose largest sum is least; the last run also carries `tail`.

    Of equal ones, the split whose earlier runs are longer. Dynamic programming, O(parts * blocks^2).
    """
    sums = [0.0, *accumulate(costs)]
    count = len(costs)
    # best[k]: the blocks from k on, cut into the parts placed so far.
    best: dict[int, Split] = {k: (sums[count] - sums[k] + tail, (count - k,)) for k in range(count)}
    for _ in range(1, parts):
        best = {start: _with_one_part_before(start, best, sums) for start in range(max(best))}
    return best[0][1]


Split = tuple[float, tuple[int, ...]]
"""(largest sum, sizes of the parts)."""


def _with_one_part_before(start: int, best: dict[int, Split], sums: Sequence[float]) -> Split:
    """The best way to put one part that begins at `start` before what is placed."""
    ways = [
        (max(sums[end] - sums[start], worst), (end - start, *sizes))
        for end, (worst, sizes) in best.items()
        if end > start
    ]
    return min(ways, key=lambda way: (way[0], [-size for size in way[1]]))


def _matrix_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)


def _parts(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Names of the modules before the blocks, the blocks, and the modules after them; forgotten ones included."""
    names = list(model._modules)
    home = next(name for name in names if isinstance(model._modules[name], nn.ModuleList))
    place = names.index(home)
    blocks = [f"{home}.{index}" for index in model.get_submodule(home)._modules]
    return names[:place], blocks, names[place + 1 :]


def _present(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    return {name: module for name in names if (module := model._modules.get(name)) is not None}


def _owns(model: nn.Module, name: str, parameters: Sequence[str]) -> bool:
    return any(parameter.startswith(f"{name}.") for parameter in parameters)
