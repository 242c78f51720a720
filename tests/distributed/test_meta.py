"""Any number of Meta's files into any layout: each rank holds its boxes of the weights that were cut by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fms_parallel.checkpoint.torch_files import TorchFile
from fms_parallel.distributed.boxes import Box, local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from tests.checkpoint.llamas import build
from tests.checkpoint.metas import SIZES, as_meta, write_meta

FIELDS = {name: getattr(SIZES, name) for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "ffn_width")}


def load_and_compare(folder: str, layout: str) -> tuple[list[str], int, int]:
    """(parameters that differ, elements read, elements held) on this rank."""
    read: list[int] = []
    original = TorchFile.read

    def spy(file: TorchFile, key: str, box: Box) -> Tensor:
        read.append(box.numel)
        return original(file, key, box)

    TorchFile.read = spy  # type: ignore[method-assign, assignment]
    model = get_model("llama", "micro", folder, distributed_strategy=layout, **FIELDS)
    expected = build(SIZES, seed=3).state_dict()
    wrong, held = [], 0
    for name, parameter in model.state_dict().items():
        box = local_box(parameter)
        held += box.numel
        if not torch.equal(local_tensor(parameter), expected[name][box.slices]):
            wrong.append(name)
    return wrong, sum(read), held


@pytest.mark.parametrize("files", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["tp=2,sp", "fsdp=2", "fsdp=2,tp=2"])
def test_every_rank_holds_its_boxes_and_reads_little_more(tmp_path: Path, layout: str, files: int) -> None:
    write_meta(tmp_path, as_meta(dict(build(SIZES, seed=3).state_dict()), SIZES), files)
    ranks = ParallelLayout.parse(layout).world_size
    for wrong, read, held in run_ranks(load_and_compare, ranks, str(tmp_path), layout):
        assert not wrong
        # Beyond its boxes a rank reads the other files' copies of the norms.
        assert read <= held + 5 * SIZES.width * files
