"""Every architecture of `families.py` in every layout, compared with one process; the table of `docs/any_model.md`.

    python -m fms_parallel.auto.table                    # to the screen
    python -m fms_parallel.auto.table --write docs/any_model.md

The reference is transformers' own model in one process, in fp64, with the loss written out. Models have four blocks,
and two where the layout has no stages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.auto.engine import parallelize
from fms_parallel.auto.families import FAMILIES, tiny_batch, tiny_model, two_blocks
from fms_parallel.checkpoint.agree import from_every_rank
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import FmsError, LayoutError
from fms_parallel.layout import ParallelLayout

LAYOUTS = (
    "pp=2",
    "pp=2,schedule=gpipe",
    "pp=2,schedule=interleaved1f1b",
    "dp=2",
    "fsdp=2",
    "tp=2",
    "pp=2,fsdp=2",
    "pp=2,tp=2",
)
STEPS = 5
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


@dataclass(frozen=True)
class Result:
    """One architecture in one layout.

    Attributes:
        gradient: largest relative error of loss, gradient norm and all gradients after one step; `where` it is.
        losses: largest relative difference of the losses of all optimizer steps. refused: why it was not run.
    """

    gradient: float = 0.0
    where: str = ""
    losses: float = 0.0
    refused: str = ""

    @property
    def worst(self) -> float:
        """The larger of both."""
        return max(self.gradient, self.losses)


@dataclass(frozen=True)
class Reference:
    """What one process finds: first loss, gradients by name, gradient norm, losses of all steps."""

    loss: float
    gradients: dict[str, Tensor]
    norm: float
    losses: list[float]


@dataclass(frozen=True)
class Run:
    """What one process does to be compared with. `micro_batches` counts only where the loss is no sum over rows."""

    name: str
    micro_batches: int
    steps: int
    short: bool

    def model(self) -> nn.Module:
        """In fp64, the same every time."""
        return tiny_model(self.name, **(two_blocks(self.name) if self.short else {})).double()


def reference(run: Run) -> Reference:
    """One process."""
    model, batch = run.model().train(), _double(tiny_batch(run.name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    losses: list[float] = []
    first: Reference | None = None
    for _ in range(run.steps):
        optimizer.zero_grad()
        loss = _own_loss(model, batch, run.micro_batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        if first is None:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            first = Reference(loss.item(), gradients, norm.item(), losses)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert first is not None
    return first


def _own_loss(model: nn.Module, batch: dict[str, Tensor], micro_batches: int) -> Tensor:
    """The mean loss of the batch, written out in fp64; a mixture's auxiliary loss is the mean of its micro-batches'."""
    whole = _mean_loss(
        model(**batch).logits, batch["labels"], type(model).__name__.endswith(("CausalLM", "LMHeadModel"))
    )
    if not getattr(model.config, "output_router_logits", False):
        return whole
    rows = len(batch["labels"]) // micro_batches
    pieces = [{key: value[i * rows : (i + 1) * rows] for key, value in batch.items()} for i in range(micro_batches)]
    auxiliary = torch.stack([model(**piece).aux_loss for piece in pieces])
    return whole + model.router_aux_loss_coef * auxiliary.mean()  # type: ignore[operator]


def _mean_loss(logits: Tensor, labels: Tensor, next_one: bool) -> Tensor:
    """Minus the mean log probability of the labels, those of -100 aside. transformers' own rounds logits to fp32."""
    if next_one:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != -100
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counted).sum() / counted.sum()


def compare(names: Sequence[str], layouts: Sequence[str], steps: int = STEPS) -> dict[tuple[str, str], Result]:
    """On each rank: every architecture in every layout of this many ranks."""
    found: dict[tuple[str, str], Result] = {}
    for name in names:
        references: dict[Run, Reference] = {}
        for layout in layouts:
            try:
                found[name, layout] = _compare_one(name, layout, steps, references)
            except LayoutError as error:
                found[name, layout] = Result(refused=str(error))
    return found


def _compare_one(name: str, text: str, steps: int, references: dict[Run, Reference]) -> Result:
    layout, batch = ParallelLayout.parse(text), tiny_batch(name)
    run = Run(name, 1, steps, short=layout.pp == 1)
    engine = parallelize(run.model(), layout, batch)
    if getattr(engine.skeleton.config, "output_router_logits", False):  # only then do pieces change the loss
        run = replace(run, micro_batches=engine.pieces * layout.data_parallel)
    if run not in references:
        references[run] = reference(run)
    want, rows = references[run], engine.rows_of(batch)
    optimizer = engine.adamw(lr=1e-2, eps=1e-3)
    losses: list[float] = []
    worst, where = 0.0, ""
    for step in range(steps):
        loss = engine.train_step(rows)
        losses.append(loss.item())
        if step == 0:
            worst, where = _worst_gradient(engine, want)
        norm = engine.clip_grad_norm_(1.0)
        if step == 0:
            scalars = {"the loss": (losses[0], want.loss), "the gradient norm": (norm.item(), want.norm)}
            for what, (is_now, should) in scalars.items():
                if abs(is_now - should) / abs(should) > worst:
                    worst, where = abs(is_now - should) / abs(should), what
        optimizer.step()
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, want.losses, strict=True))
    return Result(worst, where, apart)


def _worst_gradient(engine: Any, want: Reference) -> tuple[float, str]:
    worst, where = 0.0, ""
    held = {name for names in from_every_rank([name for name, _ in engine.named_parameters()]) for name in names}
    if lost := sorted(set(want.gradients) - held):
        return float("inf"), f"{lost[0]} (no rank holds it)"
    for name, parameter in engine.named_parameters():
        gradient = parameter.grad
        if (gradient is None or not gradient.any()) and name not in want.gradients:
            continue
        if gradient is None or name not in want.gradients:
            return float("inf"), f"{name} (a gradient on one side only)"
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        should = want.gradients[name]
        # Some gradients are zero but for rounding (the bias of keys): not measured against themselves.
        error = float((whole - should).abs().max() / should.abs().max().clamp(min=1e-3))
        if not error <= worst:
            worst, where = error, name
    return worst, where


def _double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


# ---- the table --------------------------------------------------------------------------------------------------


def run_table(names: Sequence[str] = tuple(FAMILIES), layouts: Sequence[str] = LAYOUTS) -> dict[Any, Result]:
    """The worst of all ranks for every architecture and layout."""
    found: dict[Any, Result] = {}
    for ranks in sorted({ParallelLayout.parse(layout).world_size for layout in layouts}):
        mine = [layout for layout in layouts if ParallelLayout.parse(layout).world_size == ranks]
        for answer in run_ranks(compare, ranks, list(names), mine, timeout=600.0):
            for key, result in answer.items():
                if key not in found or result.worst > found[key].worst:
                    found[key] = result
    return found


def as_markdown(found: dict[Any, Result]) -> str:
    """A row for each architecture, a column for each layout: the larger of both errors."""
    names, layouts = list(dict.fromkeys(n for n, _ in found)), list(dict.fromkeys(text for _, text in found))
    head = [
        "| architecture | " + " | ".join(f"`{layout}`" for layout in layouts) + " |",
        "|---" * (len(layouts) + 1) + "|",
    ]
    rows = [f"| {name} | " + " | ".join(_cell(found[name, layout]) for layout in layouts) + " |" for name in names]
    return "\n".join([*head, *rows])


def _cell(result: Result) -> str:
    return "refused" if result.refused else f"{result.worst:.0e}"


def write_into(page: Path, table: str) -> None:
    """Replace what stands between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except FmsError as error:
        sys.exit(f"error: {error}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fms_parallel.auto.table", description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default=",".join(FAMILIES), help="comma-separated (default: all)")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), help="(default: all of the table)")
    parser.add_argument("--write", metavar="PAGE", help="put the table between the marks of this page")
    return parser


def main() -> None:
    """Run it."""
    args = build_parser().parse_args()
    with _one_sentence():
        table = as_markdown(run_table(args.architectures.split(","), args.layouts))
        if args.write:
            write_into(Path(args.write), table)
        sys.stdout.write(f"{table}\n")


if __name__ == "__main__":
    main()
