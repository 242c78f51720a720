"""The state of a training run: model, optimizer and plain numbers, saved by all ranks, loadable in any other layout.

    runs/a/step-00000100/            a checkpoint: manifest.json was written last, then the folder got this name
                         manifest.json   .metadata   __0_0.distcp   __1_0.distcp
    runs/a/step-00000150.partial/    one that is being written, or whose writer was killed; nobody reads it

Tensors are written by torch.distributed.checkpoint, which has no checksums, overwrites in place and raises
BaseExceptions: this page adds what is missing. One run at a time writes to a folder, which every rank must see.
Reading a checkpoint unpickles its `.metadata`: read only those that you trust.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fms_parallel.checkpoint.agree import from_every_rank, on_every_rank, rank_and_world
from fms_parallel.checkpoint.files import sync_folder
from fms_parallel.checkpoint.manifest import FileMark, Manifest
from fms_parallel.checkpoint.named import (
    STATE,
    WEIGHT,
    Stored,
    Targets,
    aim_state,
    aim_weights,
    named_state,
    named_weights,
    put_state,
)
from fms_parallel.checkpoint.quantised import refuse_to_save
from fms_parallel.checkpoint.words import listed, refuse_misfits
from fms_parallel.errors import CheckpointError
from fms_parallel.log import get_logger
from fms_parallel.strategy.base import parallel_of

logger = get_logger(__name__)

PARTIAL = ".partial"
DISK_REFUSED = "inline_container.cc"
"""Where torch finds that fewer bytes are on the disk than were written; it does not say why."""
_NAME = re.compile(r"step-(\d{8,})")


# ---- saving -----------------------------------------------------------------------------------------------------


def save_training_state(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Write `folder/step-00000100`. Collective over all ranks; each writes its own shards.

    Args:
        folder: of the run's checkpoints, the same for every rank. step: optimizer steps done.
        numbers: plain JSON values to find again, the same on every rank; `step` need not be among them.
        keep: of this and earlier whole checkpoints, how many stay; None: all. Later ones are never removed.
    Returns:
        the new checkpoint's folder. A checkpoint of the same step is replaced.
    Raises:
        CheckpointError: on every rank, when any rank failed or ranks disagree; no new checkpoint is there then, and
            the earlier ones are as they were. (A rank that failed otherwise keeps its own exception.)
    """
    return write_out(gather_up(folder, step=step, model=model, optimizer=optimizer, numbers=numbers, keep=keep))


@dataclass(frozen=True)
class Unwritten:
    """What a checkpoint will hold, before a byte of it is on the disk.

    Attributes:
        final: the folder that it will be. text: the caller's numbers as JSON. layout, optimizer: for the manifest.
        stateless: this rank's parameters that the optimizer has no state of. tensors: this rank's, by key.
    """

    final: Path
    step: int
    text: str
    layout: str
    optimizer: str
    stateless: list[str]
    tensors: dict[str, Tensor]
    keep: int | None


def gather_up(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: Mapping[str, Any],
    keep: int | None = None,
) -> Unwritten:
    """The first half of `save_training_state`: everything that looks at model and optimizer, whose tensors these are.

    Collective over all ranks; arguments and errors are those of `save_training_state`.
    """
    with on_every_rank(f"saving step {step} in {folder}"):
        refuse_to_save(model)
        text = _checked_numbers(step, numbers, keep)
        state, stateless = named_state(model, optimizer)
        tensors = {**named_weights(model), **state}
    _agree("step and numbers", (step, text))
    final, layout = Path(folder) / f"step-{step:08d}", str(parallel_of(model).layout)
    return Unwritten(final, step, text, layout, type(optimizer).__name__, stateless, tensors, keep)


def write_out(unwritten: Unwritten, group: dist.ProcessGroup | None = None) -> Path:
    """The second half: the files. Collective over `group`, which holds all ranks; None is the default one."""
    final, rank = unwritten.final, rank_and_world()[0]
    partial = final.with_name(f"{final.name}{PARTIAL}")
    try:
        _write_tensors(partial, unwritten.tensors, group)
        manifest = Manifest(
            step=unwritten.step,
            numbers=json.loads(unwritten.text),
            layout=unwritten.layout,
            optimizer=unwritten.optimizer,
            stateless=tuple(sorted({name for names in from_every_rank(unwritten.stateless, group) for name in names})),
            files=_marks(partial, group),
        )
        with on_every_rank(f"finishing {final}", group):
            if rank == 0:
                _finish(partial, final, manifest)
    except Exception:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0:
        _prune(final.parent, final, unwritten.step, unwritten.keep)
    return final


def _checked_numbers(step: int, numbers: Mapping[str, Any], keep: int | None) -> str:
    """The numbers as JSON text."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step={step!r}: must be a whole number >= 0.")
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep={keep}: must be >= 1, or None to keep every checkpoint.")
    if numbers.get("step", step) != step:
        raise CheckpointError(f"numbers has step={numbers['step']}, but step={step} is being saved.")
    if not all(isinstance(name, str) for name in numbers):
        raise CheckpointError("numbers: names must be text.")
    try:
        return json.dumps(dict(numbers))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"numbers must be plain JSON values: {error}.") from error


def _agree(what: str, value: object) -> None:
    """Raise on every rank when `value` is not the same on all. Collective."""
    values = from_every_rank(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise CheckpointError(
                f"{what} must be the same on every rank: rank 0 has {values[0]}, rank {rank} {other}."
            )


def _write_tensors(partial: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Every rank's shards into a new folder."""
    with on_every_rank(f"preparing {partial}", group):
        if rank_and_world()[0] == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with on_every_rank(f"writing {partial}", group), _torch_checkpoint(f"writing {partial}"):
        dcp.save(
            tensors,  # type: ignore[arg-type]
            storage_writer=dcp.FileSystemWriter(partial),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )


def _marks(partial: Path, group: dist.ProcessGroup | None) -> dict[str, FileMark]:
    """Lengths and digests of all files. Each rank reads those that it wrote, rank 0 also the one for all."""
    rank, _ = rank_and_world()
    found: dict[str, FileMark] = {}
    with on_every_rank(f"checking {partial}", group):
        own = sorted(partial.glob(f"__{rank}_*.distcp"))
        found = {path.name: FileMark.of(path) for path in ([partial / ".metadata", *own] if rank == 0 else own)}
    marks = {name: mark for part in from_every_rank(found, group) for name, mark in part.items()}
    with on_every_rank(f"checking {partial}", group):
        unseen = sorted(marks.keys() - {path.name for path in partial.iterdir()})
        if unseen:
            raise CheckpointError(
                f"rank {rank} does not see what other ranks wrote to {partial} ({listed('files', unseen)}): every rank "
                "must see the same folder. Use a shared file system."
            )
    return marks


def _finish(partial: Path, final: Path, manifest: Manifest) -> None:
    """From here on it is a checkpoint."""
    manifest.write(partial)
    if final.exists():
        replaced = final.with_name(f"{final.name}.replaced{PARTIAL}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)


def _prune(folder: Path, newest: Path, step: int, keep: int | None) -> None:
    """Remove what killed writers left, and earlier checkpoints beyond `keep`. Trouble is only logged."""
    leftovers = [path for path in folder.glob(f"step-*{PARTIAL}") if path.is_dir()]
    earlier = [path for number, path in _checkpoints(folder) if number < step]
    old = [] if keep is None else [path for path in earlier if _flaw(path) is None][keep - 1 :]
    for path in [*leftovers, *old]:
        try:
            if path in old:  # takes its name first: a removal that is cut short leaves no torn checkpoint
                path = path.rename(path.with_name(path.name + PARTIAL))
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s was saved, but %s could not be removed: %s", newest, path, error)


# ---- finding ----------------------------------------------------------------------------------------------------


def latest_training_state(folder: Path) -> Path | None:
    """The checkpoint of the highest step whose manifest is there and whose files have the right lengths.

    Torn ones are skipped with a warning. Not collective.
    """
    for _, path in _checkpoints(Path(folder)):
        flaw = _flaw(path)
        if flaw is None:
            return path
        logger.warning("skipping a checkpoint that is not whole: %s", flaw)
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all that have a checkpoint's name, latest first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted(((int(name[1]), path) for name, path in found if name), reverse=True)


def _flaw(path: Path) -> CheckpointError | None:
    """Why this is not a whole checkpoint, by its manifest and the lengths of its files."""
    try:
        Manifest.read(path).check_lengths(path)
    except CheckpointError as error:
        return error
    return None


# ---- loading ----------------------------------------------------------------------------------------------------


def load_training_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, verify: bool = True
) -> dict[str, Any]:
    """Fill model and optimizer, in any layout. Collective over all ranks; each reads what its shards need.

    The optimizer's parameter groups keep their own numbers (learning rate, weight decay, ...).

    Args:
        verify: compare SHA-256 of every file, spread over the ranks; lengths are always compared.
    Returns:
        the saved numbers, and `step`.
    Raises:
        CheckpointError: on every rank: not whole, changed, another optimizer, or names, shapes and dtypes that are not
            the model's (all of them in one message); model and optimizer are untouched then. When reading itself
            fails they are partly filled: start again.
    """
    path = Path(path)
    manifest = _opened(path, verify)
    targets, extra = Targets(), []
    with on_every_rank(f"reading {path}"):
        kind = type(optimizer).__name__
        if kind != manifest.optimizer:
            raise CheckpointError(
                f"{path} holds the state of {manifest.optimizer}, but the optimizer is {kind}: make one of that kind, "
                "or load the weights alone with load_model_state."
            )
        stored = _stored(path)
        aim_weights(targets, model, stored, exact_dtype=True)
        aim_state(targets, model, optimizer, stored, manifest.stateless)
        extra = [key for key in stored if key not in targets.known]
    _read_tensors(path, targets, extra)
    put_state(optimizer, targets.state)
    return {**manifest.numbers, "step": manifest.step}


def load_model_state(path: Path, model: nn.Module, *, verify: bool = True) -> None:
    """Only the weights, in any layout, cast to the model's dtype. Collective; errors as in `load_training_state`."""
    path = Path(path)
    _opened(path, verify)
    targets, extra = Targets(), []
    with on_every_rank(f"reading {path}"):
        stored = {key: entry for key, entry in _stored(path).items() if not key.startswith(f"{STATE}/")}
        aim_weights(targets, model, stored, exact_dtype=False)
        extra = [key for key in stored if key not in targets.known]
    _read_tensors(path, targets, extra)


def _opened(path: Path, verify: bool) -> Manifest:
    """The manifest, after what it says of the files was found to be true."""
    rank, world = rank_and_world()
    with on_every_rank(f"reading {path}"):
        manifest = Manifest.read(path)
        manifest.check_lengths(path)
        if verify:
            manifest.check_contents(path, sorted(manifest.files)[rank::world])
    _agree(f"the checkpoint at {path}", (manifest.step, manifest.files[".metadata"].sha256))
    return manifest


def _stored(path: Path) -> dict[str, Stored]:
    """Shape and dtype of every tensor in the checkpoint."""
    try:
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # unpickling what is no pickle raises anything
        raise CheckpointError(f"{path}/.metadata cannot be read: {error!r}.") from error
    return {
        key: Stored(tuple(entry.size), entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _read_tensors(path: Path, targets: Targets, extra: list[str]) -> None:
    """Refuse what does not fit, then fill the targets. `extra`: keys that this rank has no place for."""
    # With pipeline stages a key is at home on some ranks only: extra is what nobody has a place for.
    nobodys = set(extra).intersection(*from_every_rank(extra))
    names = [key.removeprefix(f"{WEIGHT}/") for key in extra if key in nobodys]
    with on_every_rank(f"reading {path}"):
        wrong = {"missing": targets.missing, "extra": names, "of the wrong shape or type": targets.unfit}
        refuse_misfits(str(path), wrong)
    with on_every_rank(f"reading {path}"), _torch_checkpoint(f"reading {path}"), torch.no_grad():
        dcp.load(
            targets.tensors,  # type: ignore[arg-type]
            storage_reader=dcp.FileSystemReader(path),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not dist.is_initialized(),
        )


@contextmanager
def _torch_checkpoint(work: str) -> Iterator[None]:
    """torch's CheckpointException is a BaseException that no `except Exception` sees: make it one of ours."""
    try:
        with warnings.catch_warnings():
            # True of one process, and meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:
        reasons = [f"rank {rank}: {reason or type(reason).__name__}" for rank, (reason, _) in error.failures.items()]
        full = " The disk may be full." if any(DISK_REFUSED in reason for reason in reasons) else ""
        raise CheckpointError(f"{work} failed on {'; '.join(reasons)}.{full}") from error
