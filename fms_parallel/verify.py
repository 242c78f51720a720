"""Prove a layout on your own model: loss, every gradient and one optimizer step against one process.

    torchrun --nproc_per_node=4 -m fms_parallel.verify --factory fms_parallel.models:get_model \\
        --architecture llama --variant micro --distributed fsdp=2,tp=2,sp --dtype fp64

The factory is named as `module:callable`, so the library imports no model; flags that are not known here are passed to
it (`--variant micro` becomes `variant="micro"`). Every rank calls it twice: with `distributed_strategy=` the layout,
and with the layout of one process; both must start from the same weights, as those of `get_model` do. Each rank then
compares the boxes that it holds with the same boxes of the whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fms_parallel.cli import assignments, run
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}
"""Largest relative error: of the loss, and of each tensor as max |a - b| / max |b|."""

EPSILON = 1e-4
"""Of AdamW here. Its first update is g / (|g| + eps): the usual 1e-8 would turn the rounding of a gradient near zero
into a whole step, in one process as well.
"""

NUMBERS = ("dtype", "batch_size", "seq_len", "vocab_size", "grad_accum_steps", "steps", "seed")
"""Flags that are arguments of `verify`."""


@dataclass(frozen=True)
class Report:
    """What was compared, and the worst of it.

    Attributes:
        loss, reference_loss: mean per token. loss_error, gradient_error, update_error: relative, the worst tensor's.
        worst_gradient, worst_update: which tensor that was. tensors: compared.
    """

    layout: str
    dtype: str
    loss: float
    reference_loss: float
    loss_error: float
    gradient_error: float
    worst_gradient: str
    update_error: float
    worst_update: str
    norm_error: float
    tensors: int

    @property
    def worst(self) -> float:
        """The largest of all errors; NaN when one is."""
        errors = (self.loss_error, self.gradient_error, self.update_error, self.norm_error)
        return max(errors) if all(error == error for error in errors) else float("nan")


def verify(
    factory: Callable[..., nn.Module],
    layout: ParallelLayout,
    *,
    dtype: str = "fp32",
    batch_size: int = 8,
    seq_len: int = 32,
    vocab_size: int | None = None,
    grad_accum_steps: int = 1,
    steps: int = 1,
    seed: int = 0,
    **arguments: Any,
) -> Report:
    """Compare `layout` with one process. Collective: every rank of the layout calls it alike.

    Args:
        factory: called with `distributed_strategy=` and `arguments`; returns a model that `model_loss` can train.
        batch_size: global rows, with some labels left out. vocab_size: of the random tokens; None asks the config.
        grad_accum_steps: micro-batches that each rank of the layout works on its rows in.
        steps: optimizer steps, each on other rows; loss, gradients and norm of the last one are compared.
    Raises:
        ConfigError: no step, rows that do not divide, a dtype without a tolerance, a model without a vocabulary size.
    """
    if dtype not in TOLERANCE:
        raise ConfigError(f"dtype {dtype!r}: exactness is defined for {', '.join(TOLERANCE)}.")
    if steps < 1:
        raise ConfigError(f"steps={steps}: there is nothing to compare before the first step.")
    layout = replace(layout, precision=dtype)
    reference = factory(distributed_strategy=ParallelLayout(precision=dtype), **arguments)
    model = factory(distributed_strategy=layout, **arguments)
    vocab_size = vocab_size or getattr(getattr(reference, "config", None), "vocab_size", None)
    if vocab_size is None:
        raise ConfigError("the model has no config.vocab_size: give --vocab_size.")
    rows = [_rows(batch_size, seq_len, vocab_size, seed + step) for step in range(steps)]
    expected, got = _steps(reference, rows, seed, 1), _steps(model, rows, seed, grad_accum_steps)
    gradient, worst_gradient = _worst(expected.gradients, got.gradients)
    update, worst_update = _worst(expected.weights, got.weights)
    return Report(
        layout=str(layout),
        dtype=dtype,
        loss=got.loss,
        reference_loss=expected.loss,
        loss_error=abs(got.loss - expected.loss) / abs(expected.loss),
        gradient_error=gradient,
        worst_gradient=worst_gradient,
        update_error=update,
        worst_update=worst_update,
        norm_error=abs(got.norm - expected.norm) / expected.norm,
        tensors=len(expected.gradients),
    )


@dataclass(frozen=True)
class Step:
    """One step's outcome: mean loss, gradient norm, and by name what this rank holds of gradients and new weights."""

    loss: float
    norm: float
    gradients: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


def _rows(batch_size: int, seq_len: int, vocab: int, seed: int) -> Any:
    """Random rows; every seventh label is left out, so that the token count matters."""
    import torch

    from fms_parallel.data.feed import Batch
    from fms_parallel.data.rows import IGNORE

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (batch_size, seq_len + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels.view(-1)[:: 7 + seed % 3] = IGNORE
    return Batch(tokens[:, :-1], labels)


def _steps(model: nn.Module, rows: Sequence[Any], seed: int, pieces: int) -> Step:
    """AdamW steps over this rank's part of each of `rows`, worked on in so many pieces; the last one's outcome."""
    from fms_parallel.distributed.mesh import data_shard
    from fms_parallel.modules.dropout import Dropout
    from fms_parallel.strategy.base import parallel_of
    from fms_parallel.training.optimizer import make_optimizer
    from fms_parallel.training.options import TrainOptions
    from fms_parallel.training.step import dropout_keys, train_step

    shard = data_shard(parallel_of(model).mesh)
    drops = any(isinstance(module, Dropout) and module.p > 0 for module in model.modules())
    model.train()
    optimizer = make_optimizer(model, TrainOptions(lr=1e-3))
    for group in optimizer.param_groups:
        group["eps"] = EPSILON
    for number, whole in enumerate(rows):
        batches = _mine(whole, shard, pieces)
        keys = dropout_keys(batches, seed + number, shard[0]) if drops else None
        result = train_step(model, optimizer, batches, max_grad_norm=None, keys=keys, check_gradients=True)
    parameters = dict(model.named_parameters())
    return Step(
        result.loss, result.grad_norm, {n: p.grad for n, p in parameters.items() if p.grad is not None}, parameters
    )


def _mine(rows: Any, shard: tuple[int, int], pieces: int) -> list[Any]:
    """This rank's part of the rows, in pieces. Raises ConfigError: they do not divide."""
    from fms_parallel.data.feed import Batch

    index, count = shard
    if len(rows.input_ids) % (count * pieces):
        raise ConfigError(f"{len(rows.input_ids)} rows do not divide into {count} shards x {pieces} micro-batches.")
    per_rank = len(rows.input_ids) // count
    mine = slice(index * per_rank, (index + 1) * per_rank)
    return list(Batch(rows.input_ids[mine], rows.labels[mine]).split(pieces))


def _worst(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over all tensors and ranks, and the tensor's name.

    Scaled by each tensor's largest element, but never by less than a thousandth of the largest of all tensors: a
    gradient that is zero in exact arithmetic (a key's bias) is nothing but rounding in both.
    """
    import torch
    import torch.distributed as dist

    from fms_parallel.checkpoint.agree import from_every_rank
    from fms_parallel.distributed.boxes import local_box, local_tensor

    # A pipeline stage holds some of them: together the ranks must hold all, and no others.
    held = set().union(*from_every_rank(set(got)))
    if expected.keys() != held:
        raise ConfigError(f"the two models have other tensors: {sorted(expected.keys() ^ held)[:5]}.")
    floor = 1e-3 * max(float(whole.detach().abs().max()) for whole in expected.values())
    errors = []
    for name, whole in expected.items():
        if name not in got:
            errors.append(0.0)
            continue
        mine, whole = local_tensor(got[name]).detach(), whole.detach()
        gap = (mine - whole[local_box(got[name]).slices]).abs()
        errors.append(float(gap.max()) / max(float(whole.abs().max()), floor) if gap.numel() else 0.0)
    gathered = torch.tensor(errors, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(gathered, op=dist.ReduceOp.MAX)
    index = int(gathered.argmax())  # NaN counts as the largest
    return float(gathered[index]), list(expected)[index]


# ---- command line -----------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Every flag; others go to the factory."""
    parser = argparse.ArgumentParser(
        prog="python -m fms_parallel.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any other `--name value` is passed to the factory.",
        allow_abbrev=False,
    )
    parser.add_argument("--factory", required=True, help="module:callable that makes the model")
    parser.add_argument("--distributed", required=True, help='the layout, such as "fsdp=2,tp=2,sp"')
    parser.add_argument("--dtype", default="fp32", choices=tuple(TOLERANCE), help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="global rows (default: %(default)s)")
    parser.add_argument("--seq_len", type=int, default=32, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--grad_accum_steps", type=int, default=1, help="micro-batches per rank (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, help="of the random tokens (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="of tokens and dropout (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, help=f"(default: {TOLERANCE})")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until a silent rank is given up")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """0 when every error is within the tolerance, 1 otherwise."""
    args, others = build_parser().parse_known_args(words)
    world = os.environ.get("WORLD_SIZE", "1")
    layout = ParallelLayout.parse(args.distributed).resolve(int(world), int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    arguments = factory_arguments(others)
    factory = load_factory(args.factory)

    from fms_parallel.distributed.start import process_group

    numbers = {name: getattr(args, name) for name in NUMBERS}
    with process_group("cpu", args.timeout) as launch:
        report = verify(factory, layout, **numbers, **arguments)
    tolerance = TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    exact = report.worst <= tolerance
    if launch.rank == 0:
        sys.stdout.write(_as_json(report, tolerance, exact) if args.json else _as_text(report, tolerance, exact))
    return 0 if exact else 1


def load_factory(name: str) -> Callable[..., nn.Module]:
    """The callable of `module:callable`.

    Raises:
        ConfigError: not of that form, no such module, or nothing callable of that name in it.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"--factory {name!r}: write module:callable, as in fms_parallel.models:get_model.")
    sys.path.insert(0, "")  # `python -m` has it, torchrun's workers do not always
    try:
        found = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--factory {name!r}: {error}.") from None
    if not callable(found):
        raise ConfigError(f"--factory {name!r}: {module} has nothing callable named {attribute!r}.")
    return found  # type: ignore[no-any-return]


def factory_arguments(words: Sequence[str]) -> dict[str, Any]:
    """`--variant micro --layers 2` -> `{"variant": "micro", "layers": 2}`."""
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ConfigError(f"cannot read {' '.join(words)!r}: flags for the factory come as --name value.")
    pairs = zip(words[::2], words[1::2], strict=True)
    return assignments([f"{name.removeprefix('--')}={value}" for name, value in pairs], "factory flags")


def _as_json(report: Report, tolerance: float, exact: bool) -> str:
    return json.dumps({**asdict(report), "worst": report.worst, "tolerance": tolerance, "exact": exact}) + "\n"


def _as_text(report: Report, tolerance: float, exact: bool) -> str:
    return (
        f"{report.layout} against one process, {report.tensors} parameters:\n"
        f"  loss      {report.loss:.9f}  relative error {report.loss_error:.1e}\n"
        f"  gradients {report.gradient_error:.1e}  worst: {report.worst_gradient}\n"
        f"  norm      {report.norm_error:.1e}\n"
        f"  weights   {report.update_error:.1e}  worst: {report.worst_update}\n"
        f"{'exact' if exact else 'NOT EXACT'}: worst {report.worst:.1e}, tolerance {tolerance:.0e}\n"
    )


if __name__ == "__main__":
    run(main)
