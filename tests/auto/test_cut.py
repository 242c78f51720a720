"""Stages of a cut model, run one after the other in one process, against the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.auto.blocks import canonical_names, find_blocks
from fms_parallel.auto.cut import Cut, Run, make_cut, stage_model
from fms_parallel.auto.families import FAMILIES, tiny_batch, tiny_model
from fms_parallel.auto.optimus import example_of
from fms_parallel.auto.record import record
from fms_parallel.auto.source import build_skeleton, skeleton_of
from fms_parallel.auto.stage import AutoStage, constant_inputs
from fms_parallel.auto.tasks import Task, get_task
from fms_parallel.errors import LayoutError, TrainingError
from tests.auto.plain import Net, net_batch


def cut_of(model: nn.Module, task: Task, batch: dict[str, Tensor], stages: int, split: Any = "cost") -> tuple[Cut, Any]:
    inputs = {**task.inputs(batch), **constant_inputs(model)}
    recording = record(model, inputs, find_blocks(model), wanted=task.wanted)
    return make_cut(model, recording, stages, split), recording


def stages_of(model: nn.Module, task: Task, cut: Cut, recording: Any) -> list[AutoStage]:
    """All stages, each with parameters of its own."""
    skeleton, values = skeleton_of(model), dict(model.named_parameters(remove_duplicate=False))
    stages = []
    for number in range(cut.stages):
        run = Run(cut, number)
        part = stage_model(skeleton, cut, run)
        tied: dict[int, nn.Parameter] = {}
        for name, meta in list(part.named_parameters(remove_duplicate=False)):
            owner, _, attribute = name.rpartition(".")
            real = nn.Parameter(values[name].detach().clone(), requires_grad=meta.requires_grad)
            part.get_submodule(owner)._parameters[attribute] = tied.setdefault(id(values[name]), real)
        stages.append(AutoStage(part, task, cut.blocks, run, lambda inputs: recording))
    return stages


def compare(model: nn.Module, task: Task, batch: dict[str, Tensor], count: int, tolerance: float) -> Cut:
    cut, recording = cut_of(model, task, batch, count)
    whole = AutoStage(model, task, (), None, lambda inputs: recording)
    whole.aux_scale = 2.0
    wanted = whole(**batch)
    wanted.backward()
    stages, handed = stages_of(model, task, cut, recording), ()
    for stage in stages:
        stage.aux_scale = 2.0
        out = stage(*handed, **batch)
        handed = out if isinstance(out, tuple) else (out,)
    (loss,) = handed
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=0)
    first, found = canonical_names(model), {}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            if parameter.grad is not None:
                found[first[name]] = found.get(first[name], 0) + parameter.grad
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in found), name
        if parameter.grad is not None:
            error = (found[name] - parameter.grad).abs().max() / parameter.grad.abs().max().clamp(min=1e-3)
            assert error <= tolerance, (name, float(error))
    return cut


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_equal_the_whole_model(name: str, count: int) -> None:
    pytest.importorskip("transformers")
    model = tiny_model(name).double()
    task = get_task(model, None)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(name, rows=2).items()}
    compare(model, task, task.prepare(batch, model.config), count, 1e-12 if FAMILIES[name].exact else 1e-6)


def test_a_tensor_that_skips_blocks_is_carried_through() -> None:
    cut = compare(Net().double(), Task("classification"), net_batch(), 4, 1e-12)
    assert [len(arriving) for arriving in cut.arriving] == [0, 1, 2, 2]


def test_a_stage_holds_its_own_parameters_only() -> None:
    model, task = Net(), Task("classification")
    cut, recording = cut_of(model, task, net_batch(), 2)
    first, last = stages_of(model, task, cut, recording)
    assert {name.split(".")[0] for name, _ in first.model.named_parameters()} == {"embed", "gain", "blocks"}
    assert {name.split(".")[0] for name, _ in last.model.named_parameters()} == {"blocks", "head"}
    assert sum(p.numel() for stage in (first, last) for p in stage.parameters()) == sum(
        p.numel() for p in model.parameters()
    )


def test_a_failing_module_is_named_with_its_stage_and_micro_batch() -> None:
    model, task = Net(), Task("classification")
    cut, recording = cut_of(model, task, net_batch(), 2)
    stage = stages_of(model, task, cut, recording)[0]
    stage(**net_batch())
    with pytest.raises(TrainingError, match=r"pipeline stage 0 \(blocks\.0 to blocks\.1\), micro-batch 1: IndexError"):
        stage(input_ids=torch.full((4, 5), 99), labels=net_batch()["labels"])


@pytest.mark.parametrize(
    ("split", "sizes"),
    [("even", (2, 2, 1)), ((1, 1, 3), (1, 1, 3)), (("blocks.1", "blocks.4"), (1, 3, 1)), ("cost", (2, 2, 1))],
)
def test_splits(split: Any, sizes: tuple[int, ...]) -> None:
    model = Net(blocks=5)
    assert cut_of(model, Task("classification"), net_batch(), 3, split)[0].sizes == sizes


def test_a_costly_head_gives_the_last_stage_fewer_blocks() -> None:
    model = Net(blocks=4)
    model.head = nn.Linear(8, 300)
    assert cut_of(model, Task("classification"), net_batch(), 2)[0].sizes == (3, 1)


@pytest.mark.parametrize(
    ("stages", "split", "words"),
    [
        (5, "cost", r"5 pipeline stages, but Net has 4 repeated blocks .* Use at most 4 stages"),
        (2, (4, 0), r"2 stages need 2 numbers >= 1 that add up to 4"),
        (2, ("blocks.9",), r"'blocks\.9' is no block\. Blocks are blocks\.0 \.\.\. blocks\.3"),
        (2, "fair", r"unknown split 'fair'"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(stages: int, split: Any, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        cut_of(Net(), Task("classification"), net_batch(), stages, split)


REAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2", {}, "GPT2LMHeadModel"),
    "gpt2-medium": ("GPT2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, "GPT2LMHeadModel"),
    "gpt2-large": ("GPT2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, "GPT2LMHeadModel"),
    "gpt2-xl": ("GPT2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, "GPT2LMHeadModel"),
    "gpt-neo-2.7b": (
        "GPTNeo",
        {
            **{"hidden_size": 2560, "num_layers": 32, "num_heads": 20},
            **{"attention_types": [[["global", "local"], 16]], "max_position_embeddings": 2048},
        },
        "GPTNeoForCausalLM",
    ),
    "gpt-j-6b": ("GPTJ", {}, "GPTJForCausalLM"),
    "bert-base-cased": ("Bert", {"vocab_size": 28996}, "BertForMaskedLM"),
    "electra-base-generator": (
        "Electra",
        {"embedding_size": 768, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
        "ElectraForMaskedLM",
    ),
    "opt-6.7b": (
        "OPT",
        {
            **{"hidden_size": 4096, "num_hidden_layers": 32, "ffn_dim": 16384, "num_attention_heads": 32},
            **{"word_embed_proj_dim": 4096},
        },
        "OPTForCausalLM",
    ),
    "opt-13b": (
        "OPT",
        {
            **{"hidden_size": 5120, "num_hidden_layers": 40, "ffn_dim": 20480, "num_attention_heads": 40},
            **{"word_embed_proj_dim": 5120},
        },
        "OPTForCausalLM",
    ),
    "llama-2-13b": (
        "Llama",
        {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
        "LlamaForCausalLM",
    ),
    "llama-3-8b": (
        "Llama",
        {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
        "LlamaForCausalLM",
    ),
    "llama-3.2-1b": (
        "Llama",
        {
            **{"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
            **{"intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
        },
        "LlamaForCausalLM",
    ),
    "llama-3.3-70b": (
        "Llama",
        {
            **{"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
            **{"intermediate_size": 28672, "vocab_size": 128256},
        },
        "LlamaForCausalLM",
    ),
    "whisper-small": (
        "Whisper",
        {
            **{"d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 12},
            **{"decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072},
        },
        "WhisperForConditionalGeneration",
    ),
    "vit-base-patch16-224-in21k": ("ViT", {"num_labels": 1000}, "ViTForImageClassification"),
}
"""Name -> config class, its fields, model class: every model that OptimusPrime's page lists, in its real size."""

TIED = ("gpt2", "opt", "bert", "electra", "gpt-neo", "llama-3.2")
"""Head and embedding are one, and on different stages (all of Whisper's decoder costs less than its encoder)."""


@pytest.mark.parametrize("name", REAL)
def test_models_of_real_size_are_cut_without_memory(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, fields, model_class = REAL[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    config.architectures = [model_class]
    model, values, _ = build_skeleton(config)
    assert not values and all(parameter.is_meta for parameter in model.parameters())
    task = get_task(model, None)
    cut, _ = cut_of(model, task, task.prepare(example_of(model, 1), config), 4)
    run = Run(cut, 1)
    second = stage_model(model, cut, run)
    own = cut.blocks[slice(*cut.range_of(1))]
    blocks = sum(p.numel() for block in own for p in model.get_submodule(block).parameters())
    beside = {n: p for n, p in second.named_parameters() if not n.startswith(tuple(f"{block}." for block in own))}
    assert sum(p.numel() for p in second.parameters()) == blocks + sum(p.numel() for p in beside.values())
    assert all(parameter.is_meta for parameter in second.parameters())
    assert not beside  # neither an embedding nor a head
    assert bool(cut.shared) == name.startswith(TIED)  # tied weights stay tied
