"""What it costs to cut a model that nobody wrote for it: seconds of set-up, and memory of a rank beside its stage.

    python benchmarks/any_model.py

Set-up is recording and cutting on the meta device, into four stages, of models of real size. Memory is what a rank's
process grows by in `parallelize` of a random LLaMA, given as a config, beside the bytes of its own parameters.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # started as a file: then benchmarks/ is on the path, and not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fms_parallel.distributed.launch import run_ranks

LLAMA_70B = {
    **{"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    **{"intermediate_size": 28672, "vocab_size": 128256},
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, 48 layers": ("LlamaConfig", "LlamaForCausalLM", {"num_hidden_layers": 48}),
    "gpt2-xl, 48 layers": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama 70B, 80 layers": ("LlamaConfig", "LlamaForCausalLM", LLAMA_70B),
}
SMALL = {
    "hidden_size": 512,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 8000,
}


def config_of(config: str, model: str, fields: dict[str, Any]) -> Any:
    """A transformers config that names its model."""
    import transformers

    made = getattr(transformers, config)(**fields)
    made.architectures = [model]
    return made


def set_up(name: str) -> tuple[float, float]:
    """(seconds to build on meta, seconds to record and cut)."""
    from fms_parallel.auto.blocks import find_blocks
    from fms_parallel.auto.cut import Run, make_cut, stage_model
    from fms_parallel.auto.record import record
    from fms_parallel.auto.source import build_skeleton

    config = config_of(*MODELS[name])
    start = time.perf_counter()
    model, _, _ = build_skeleton(config)
    built = time.perf_counter()
    ids = torch.zeros(1, 1024, dtype=torch.int64)
    found = record(model, {"input_ids": ids, "use_cache": False}, find_blocks(model), wanted=lambda out: out.logits)
    cut = make_cut(model, found, 4)
    stage_model(model, cut, Run(cut, 1))
    return built - start, time.perf_counter() - built


def resident_mib() -> float:
    """Memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def memory(layout: str) -> tuple[float, float, float]:
    """MiB of (this rank's parameters, the whole model's, growth of this process)."""
    from fms_parallel.auto import parallelize

    config, ids = config_of("LlamaConfig", "LlamaForCausalLM", SMALL), torch.zeros(4, 16, dtype=torch.int64)
    before = resident_mib()
    engine = parallelize(config, layout, {"input_ids": ids, "labels": ids})
    gc.collect()
    own = sum(p.numel() * p.element_size() for p in engine.parameters()) / 2**20
    whole = sum(p.numel() * p.element_size() for p in engine.skeleton.parameters()) / 2**20
    return own, whole, resident_mib() - before


def main() -> None:
    """Print both."""
    for name in MODELS:
        set_up(name)  # imports of the model's code do not count
        built, cut = set_up(name)
        print(f"{name:>22}: built on meta in {built:.2f} s, recorded and cut in {cut:.2f} s")
    for layout, ranks in (("pp=2", 2), ("pp=4", 4)):
        for rank, (own, whole, grown) in enumerate(run_ranks(memory, ranks, layout)):
            print(
                f"{layout} rank {rank}: own parameters {own:.0f} MiB of {whole:.0f}, process grew by {grown:.0f} MiB, "
                f"{grown - own:.0f} beside them"
            )


if __name__ == "__main__":
    main()
