"""What loading and converting a checkpoint costs in memory, and how long a 7B checkpoint takes to open.

    python benchmarks/load_checkpoint.py              2.6 GB in a temporary folder; about two minutes
    python benchmarks/load_checkpoint.py --layers 2   small
    python benchmarks/load_checkpoint.py --linear_type int8   the same file into rounded matrices
    python benchmarks/load_checkpoint.py --json

A rank may take, above what it had before, its own shard, the largest tensor of its shard and 200 MB; converting may
take one layer and 200 MB. Planning means everything that happens before the first byte of a tensor is read. The
process exits with 1 when a figure is over its limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fms_parallel.checkpoint.files import write_weights
from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.cli import run
from fms_parallel.distributed.boxes import Box, local_tensor
from fms_parallel.distributed.launch import run_ranks

SLACK = 200e6
PLANNING_LIMIT = 1.0
LAYOUTS = (("", 1), ("tp=2", 2), ("fsdp=2", 2), ("fsdp=2,tp=2", 4))
"""(layout, ranks)."""
ROUNDED = (("", 1), ("tp=2", 2))
"""The same with a linear type: weights that take no gradient go with no fsdp."""
WIDE: dict[str, Any] = {"width": 2048, "heads": 16, "kv_heads": 16, "ffn_width": 5632}


@dataclass(frozen=True)
class Figure:
    """One measurement: what was taken and what may be, in the same unit."""

    what: str
    taken: float
    limit: float
    unit: str

    @property
    def kept(self) -> bool:
        """Whether it is within the limit."""
        return self.taken <= self.limit


class Made(LazyTensor):
    """A tensor that is made when it is read: the synthetic checkpoint is never in memory."""

    def _read(self, box: Box) -> Tensor:
        return torch.full(box.size, 0.01, dtype=self.dtype)


def make_checkpoint(folder: Path, source: str, fields: dict[str, Any]) -> int:
    """Write a LLaMA of these sizes in a source's format; returns its bytes."""
    from fms_parallel.models.build import find_model
    from fms_parallel.models.sources import write_as

    known, config = find_model("llama", "micro", None, fields)
    with torch.device("meta"):
        model = known.build(config)
    tensors = {name: Made(tuple(p.shape), torch.float32) for name, p in model.named_parameters()}
    write_as(known, config, tensors, source, folder, files=2 if source == "meta" else None, max_shard_bytes=500_000_000)
    return sum(tensor.nbytes for tensor in tensors.values())


# ---- memory of a rank -------------------------------------------------------------------------------------------


def resident() -> float:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def peak() -> float:
    """The most bytes that this process had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def load_rank(
    folder: str, layout: str, source: str, fields: dict[str, Any], linear_type: str | None
) -> tuple[float, float, float]:
    """(bytes taken at the peak, bytes of the shard, bytes of its largest tensor) on this rank, as it stores them."""
    from fms_parallel.models import get_model

    options: dict[str, Any] = {"distributed_strategy": layout or None, "linear_type": linear_type}
    # What the first model of a process imports and allocates is not the checkpoint's.
    get_model("llama", "micro", **options)
    before = resident()
    model = get_model("llama", "micro", folder, source, **options, **fields)
    sizes = [float(local_tensor(parameter).nbytes) for parameter in model.parameters()]
    return peak() - before, sum(sizes), max(sizes)


def loading(folder: Path, source: str, fields: dict[str, Any], linear_type: str | None = None) -> list[Figure]:
    """The rank that took most above its own limit, of each layout."""
    figures = []
    for layout, ranks in LAYOUTS if linear_type is None else ROUNDED:
        measured = run_ranks(load_rank, ranks, str(folder), layout, source, fields, linear_type, timeout=900.0)
        taken, shard, largest = max(measured, key=lambda one: one[0] - one[1] - one[2])
        stored = f"{source} as {linear_type}" if linear_type else source
        what = f"load {stored}, {layout or 'one rank'}: shard {shard / 1e6:.0f} + tensor {largest / 1e6:.0f} + 200 MB"
        figures.append(Figure(what, taken / 1e6, (shard + largest + SLACK) / 1e6, "MB"))
    return figures


def convert_rank(source: str, target: str, to: str, fields: dict[str, Any]) -> float:
    """Bytes taken at the peak of a conversion."""
    from fms_parallel.models.build import find_model, get_model
    from fms_parallel.models.sources import open_native, whole_model, write_as

    get_model("llama", "micro")
    before = resident()
    known, config = find_model("llama", "micro", source, fields)
    tensors = whole_model(known, config, open_native(known, config, Path(source), None), source)
    write_as(known, config, tensors, to, Path(target), files=4 if to == "meta" else None)
    return peak() - before


def converting(folder: Path, target: Path, to: str, fields: dict[str, Any]) -> Figure:
    """One conversion against one layer, or the embedding where that is larger."""
    from fms_parallel.models import get_shape

    shape = get_shape("llama", "micro", **fields)
    layer = 4.0 * max(shape.block_parameters, shape.vocab * shape.width)
    taken = run_ranks(convert_rank, 1, str(folder), str(target), to, fields, timeout=900.0)[0]
    return Figure(f"convert to {to}: layer {layer / 1e6:.0f} + 200 MB", taken / 1e6, (layer + SLACK) / 1e6, "MB")


# ---- planning ---------------------------------------------------------------------------------------------------


class Hole(Made):
    """A tensor that takes no room on the disk."""

    def _read(self, box: Box) -> Tensor:
        return torch.empty(0)


def planning(folder: Path) -> Figure:
    """From the path of a 7B checkpoint in three files to the lazy tensors of every parameter."""
    from fms_parallel.models.build import find_model
    from fms_parallel.models.sources import check_described, open_native, whole_model

    known, config = find_model("llama", "7b", None, {})
    with torch.device("meta"):
        model = known.build(config)
    native = {name: Hole(tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}
    folder.mkdir()
    assert known.to_hf is not None
    (folder / "config.json").write_text(json.dumps(known.to_hf(config)))
    write_weights(folder, known.adapters["hf"](config).from_native(dict(native)), max_shard_bytes=5 << 30)
    for file in folder.glob("*.safetensors"):
        _stretch(file)
    start = time.perf_counter()
    known, config = find_model("hf_pretrained", None, folder, {})
    check_described(known, config, folder)
    tensors = whole_model(known, config, open_native(known, config, folder, None), str(folder))
    seconds = time.perf_counter() - start
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * config.parameters()
    files = len(list(folder.glob("*.safetensors")))
    return Figure(f"open 7B in {files} files, source found out", seconds, PLANNING_LIMIT, "s")


def _stretch(file: Path) -> None:
    """Make a file as long as its header says, without writing."""
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        handle.truncate(8 + length + max(ends))


# ---- command line -----------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10, help="of the synthetic model (default: %(default)s, 2.6 GB)")
    parser.add_argument("--linear_type", help="measure loading into this type (int8), and nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON object per figure")
    args = parser.parse_args(words)
    fields = {**WIDE, "layers": args.layers, "vocab_size": 32000}
    figures = []
    with tempfile.TemporaryDirectory(prefix="load_checkpoint_") as name:
        folder = Path(name)
        size = make_checkpoint(folder / "hf", "hf", fields)
        print(f"synthetic checkpoint: {size / 1e9:.2f} GB in fp32", flush=True)
        if args.linear_type is not None:
            figures += loading(folder / "hf", "hf", fields, args.linear_type)
        else:
            figures.append(planning(folder / "7b"))
            figures += loading(folder / "hf", "hf", fields)
            figures.append(converting(folder / "hf", folder / "meta", "meta", fields))
            figures += loading(folder / "meta", "meta", fields)
            figures.append(converting(folder / "meta", folder / "native", "native", fields))
    for figure in figures:
        line = f"{figure.what:<64} {figure.taken:>8.3g} of {figure.limit:.4g} {figure.unit}"
        print(json.dumps(asdict(figure)) if args.json else f"{line}  {'kept' if figure.kept else 'BROKEN'}", flush=True)
    return 0 if all(figure.kept for figure in figures) else 1


if __name__ == "__main__":
    run(main)
