"""Parallelised models: rows and lengths, losses of one's own, precision, files, checkpoints, adapters, and refusals.

That all architectures equal one process in all layouts is in `test_auto_table.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.auto import UserLoss, parallelize
from fms_parallel.auto.families import FAMILIES, tiny_batch, tiny_config, tiny_model
from fms_parallel.auto.lora import add_lora, is_adapter, load_lora, merge_lora, save_lora
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import FmsError, RankFailed
from tests.auto.plain import Flat, Net, net_batch
from tests.poison import poisoned_memory

pytest.importorskip("transformers")

# ---- rows, losses, memory ---------------------------------------------------------------------------------------


def rows_that_do_not_divide() -> list[tuple[float, float]]:
    """5 rows in 2 micro-batches, then 3 of another length, in stages; (loss, what one process finds) of each."""
    found = []
    engine = parallelize(tiny_model("gpt2").double(), "pp=2", tiny_batch("gpt2"), microbatches=2)
    for rows, length in ((5, 12), (3, 9), (5, 12)):
        batch = tiny_batch("gpt2", rows=rows, length=length)
        alone = parallelize_alone(batch)
        found.append((float(engine.train_step(batch)), alone))
        found.append((float(engine.eval_step(batch)), alone))
    return found


def parallelize_alone(batch: dict[str, Tensor]) -> float:
    model = tiny_model("gpt2").double()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_rows_and_lengths_that_differ_from_the_example() -> None:
    for answer in run_ranks(rows_that_do_not_divide, 2):
        for found, wanted in answer:
            assert found == pytest.approx(wanted, rel=1e-12)


def squares(out: Tensor, batch: Any) -> Tensor:
    return (out - batch["labels"].unsqueeze(1)).square().sum()


def own_loss(layout: str) -> tuple[float, dict[str, str]]:
    torch.manual_seed(4)
    model, batch = Net().double(), net_batch(8)
    whole = squares(model(batch["input_ids"]), batch) / 8
    whole.backward()
    count = 2 if "fsdp" in layout else 1
    example = {name: value[: 8 // count] for name, value in batch.items()}
    engine = parallelize(model, layout, example, loss=squares, microbatches=2)
    loss = engine.train_step(engine.rows_of(batch))
    wrong = {}
    for name, parameter in engine.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        if not torch.allclose(gradient, model.get_parameter(name).grad, rtol=1e-12, atol=1e-14):
            wrong[name] = str(gradient)
    return float(loss) - float(whole.detach()), wrong


def own_losses() -> tuple[list[tuple[float, dict[str, str]]], str, Tensor]:
    """In two layouts; what is said of 3 rows in 2 pieces; and what the model gives for 3 rows."""
    engine = parallelize(Net(), "pp=2", net_batch(4), task=UserLoss(squares), microbatches=2)
    said = sentence(lambda: engine.train_step(net_batch(3)))
    return [own_loss(layout) for layout in ("pp=2", "fsdp=2")], said, predicted()


def sentence(make: Callable[[], Any]) -> str:
    """What is said of a mistake that every rank makes."""
    try:
        make()
    except FmsError as error:
        return str(error)
    return "nothing"


def predicted() -> Tensor:
    torch.manual_seed(4)
    engine = parallelize(Net().double(), "pp=2", net_batch(4), loss=squares, microbatches=2)
    return engine.predict({"input_ids": net_batch(3)["input_ids"]}, lambda out: out * 2)


def test_a_plain_module_with_a_loss_of_ones_own() -> None:
    torch.manual_seed(4)
    wanted = Net().double()(net_batch(3)["input_ids"]) * 2
    for found, said, given in run_ranks(own_losses, 2):
        for difference, wrong in found:
            assert abs(difference) <= 1e-12 and not wrong
        assert "3 rows do not divide into equal micro-batches" in said
        torch.testing.assert_close(given, wanted.detach(), rtol=1e-12, atol=1e-12)


def recomputed_and_dropped() -> list[float]:
    """With dropout: the gradient that recomputation finds is that of the forward which ran."""
    norms = []
    for word in ("", ",recompute=full", ",recompute=selective", ",recompute=every=2"):
        config = {"resid_pdrop": 0.3, "attn_pdrop": 0.3}
        engine = parallelize(tiny_model("gpt2", **config), f"pp=2{word}", tiny_batch("gpt2"), microbatches=2)
        torch.manual_seed(9)
        engine.train_step(tiny_batch("gpt2"))
        norms.append(float(engine.grad_norm()))
    return norms


def test_recomputation_sees_the_same_dropout() -> None:
    for plain, *again in run_ranks(recomputed_and_dropped, 2):
        assert again == pytest.approx([plain] * 3, rel=1e-5)


def first_losses(layouts: list[str]) -> list[tuple[float, float]]:
    """(loss, loss after one update) in each layout."""
    found, batch = [], tiny_batch("llama")
    for layout in layouts:
        engine = parallelize(tiny_model("llama"), layout, batch)
        optimizer, rows = engine.adamw(lr=1e-2, eps=1e-3), engine.rows_of(batch)
        first = float(engine.train_step(rows))
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        found.append((first, float(engine.train_step(rows))))
    return found


def test_half_precision_and_offload_in_stages_and_shards() -> None:
    exact = ["pp=2", "pp=2,offload=optimizer_state", "pp=2,offload=optimizer_step", "fsdp=2,offload=params"]
    rounded = ["pp=2,precision=bf16", "fsdp=2,precision=bf16", "dp=2,precision=bf16", "tp=2,precision=bf16"]
    for found in run_ranks(first_losses, 2, [*exact, *rounded]):
        for losses in found[: len(exact)]:
            assert losses == pytest.approx(found[0], rel=1e-5)
        for losses in found[len(exact) :]:
            assert losses == pytest.approx(found[0], rel=1e-2) and losses[0] != found[0][0]


# ---- weights ----------------------------------------------------------------------------------------------------


def loaded_and_saved(source: str, layout: str, target: str) -> tuple[int, list[str]]:
    """(elements that this rank holds, names of parameters without memory)."""
    name = Path(source).name
    with poisoned_memory():
        engine = parallelize(source, layout, tiny_batch(name))
        engine.save_pretrained(target, max_shard_bytes=50_000)
    held = sum(local_tensor(p).numel() for p in engine.parameters())
    return held, [n for n, p in engine.named_parameters() if p.is_meta]


@pytest.mark.parametrize(
    ("name", "layout", "ranks"),
    [
        ("mixtral", "pp=2", 2),
        ("t5", "pp=2,schedule=interleaved1f1b", 2),
        ("qwen2", "pp=2,tp=2", 4),
        ("bert", "fsdp=2", 2),
        ("gpt2", "tp=2", 2),
    ],
)
def test_weights_come_from_and_go_to_files_of_transformers(name: str, layout: str, ranks: int, tmp_path: Path) -> None:
    import transformers

    model, source, target = tiny_model(name), tmp_path / name, tmp_path / "saved"
    model.save_pretrained(source, max_shard_size="40KB")  # type: ignore[operator]
    whole = sum(p.numel() for p in model.parameters())
    for held, lost in run_ranks(loaded_and_saved, ranks, str(source), layout, str(target)):
        assert not lost
        assert held < (0.8 if layout != "tp=2" else 0.6) * whole  # packed query, key and value cut too
    kind = getattr(transformers, FAMILIES[name].model)
    again, report = kind.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (key, value), (other, wanted) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, wanted), key


def drawn(layouts: list[str | None]) -> list[dict[str, Tensor]]:
    from fms_parallel.auto.save import full_state

    config, batch = tiny_config("qwen2"), tiny_batch("qwen2")
    return [full_state(parallelize(config, layout, batch, seed=3)) for layout in layouts]


def test_a_seed_draws_the_same_weights_in_every_layout() -> None:
    (alone,) = drawn([None])
    assert all(value.isfinite().all() for value in alone.values())
    assert len({float(value.std()) for name, value in alone.items() if "proj.weight" in name}) > 8
    for found in run_ranks(drawn, 2, ["pp=2", "fsdp=2"])[0]:
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def checkpointed(layout: str, folder: str, steps: list[int], resume: bool) -> list[float]:
    engine = parallelize(tiny_model("gpt2").double(), layout, tiny_batch("gpt2"))
    optimizer = engine.adamw(lr=1e-2)
    if resume:
        assert engine.load_checkpoint(Path(folder) / "step-00000002", optimizer)["step"] == 2
    losses = []
    for step in steps:
        losses.append(float(engine.train_step(engine.rows_of(tiny_batch("gpt2", seed=step)))))
        optimizer.step()
    if not resume:
        engine.save_checkpoint(folder, 2, optimizer)
    return losses


def test_a_checkpoint_goes_on_in_another_layout(tmp_path: Path) -> None:
    run_ranks(checkpointed, 2, "pp=2", str(tmp_path), [0, 1], False)
    went_on = run_ranks(checkpointed, 2, "fsdp=2", str(tmp_path), [2, 3], True)[0]
    straight = checkpointed("", str(tmp_path / "other"), [0, 1, 2, 3], False)
    assert went_on == pytest.approx(straight[2:], rel=1e-10)


# ---- adapters ---------------------------------------------------------------------------------------------------


def adapted(name: str, targets: Any) -> nn.Module:
    """With adapters that do something already."""
    model = tiny_model(name).double()
    add_lora(model, targets, rank=4)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_adapter(key):
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.1))
    return model


def adapters_in(layouts: list[str], name: str, targets: Any, folder: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    batch, alone = tiny_batch(name), adapted(name, targets)
    labels = batch["labels"][:, 1:]
    logits = alone(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted.backward()
    for layout in layouts:
        engine = parallelize(adapted(name, targets), layout, batch)
        worst = {"loss": abs(float(engine.train_step(engine.rows_of(batch))) - float(wanted))}
        for key, parameter in engine.named_parameters():
            should = alone.get_parameter(key).grad
            assert (should is not None) == is_adapter(key)
            if parameter.grad is not None and should is not None:
                whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                worst[key] = float((whole - should).abs().max() / should.abs().max())
        save_lora(engine, f"{folder}/{layout}")
        load_lora(engine, f"{folder}/{layout}")
        merge_lora(engine)
        engine.save_pretrained(f"{folder}/{layout}-merged")
        worst["merged"] = abs(float(engine.eval_step(engine.rows_of(batch))) - float(wanted))
        found[layout] = worst
    return found


@pytest.mark.parametrize(
    ("name", "targets", "layouts"),
    [
        ("llama", ["q_proj", "o_proj", "down_proj"], ["pp=2", "fsdp=2", "tp=2"]),
        ("gpt2", r".*\.h\.[13]\..*c_(attn|proj)", ["pp=2"]),
    ],
)
def test_adapters_equal_one_process_and_merge(name: str, targets: Any, layouts: list[str], tmp_path: Path) -> None:
    import transformers

    for answer in run_ranks(adapters_in, 2, layouts, name, targets, str(tmp_path)):
        for layout, worst in answer.items():
            assert {key: error for key, error in worst.items() if not error <= 1e-12} == {}, layout
    alone, kind = adapted(name, targets).eval(), getattr(transformers, FAMILIES[name].model)
    merged = kind.from_pretrained(tmp_path / f"{layouts[0]}-merged").double()
    ids = tiny_batch(name)["input_ids"]
    torch.testing.assert_close(merged(ids).logits, alone(ids).logits, rtol=1e-9, atol=1e-9)


# ---- refusals ---------------------------------------------------------------------------------------------------


REFUSED = {
    ("pp=2", "flat"): "Flat has no repeated blocks",
    (
        "pp=2,virtual_stages=4,schedule=interleaved1f1b,microbatches=8",
        "gpt2",
    ): "8 pipeline stages, but GPT2LMHeadModel",
    ("tp=2", "llama"): "tp=2 does not divide num_attention_heads=3",
    ("tp=2,sp", "llama"): "a model without twins has pp, dp, fsdp and tp",
    ("pp=2,stage_split=1,1", "gpt2"): "2 stages need 2 numbers >= 1 that add up to 4",
    ("pp=2,schedule=interleaved1f1b,microbatches=5", "gpt2"): "schedule=interleaved1f1b: ",
    ("fsdp=2,recompute=budget=0.5", "gpt2"): "recompute=budget=... needs compiled blocks",
}


def refused(layout: str, case: str) -> None:
    source: Any = {
        "flat": Flat,
        "gpt2": lambda: tiny_model("gpt2"),
        "llama": lambda: tiny_model("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=36),
    }[case]()
    batch = net_batch() if case == "flat" else tiny_batch(case)
    parallelize(source, layout, batch, task="classification" if case == "flat" else None)


def all_refused() -> list[tuple[str, str]]:
    """(what is said, what is said of the first layout that is offered instead)."""
    found = []
    for layout, case in REFUSED:
        said = sentence(lambda key=(layout, case): refused(*key))  # type: ignore[misc]
        offered = re.findall(r"'([^']*)'", said.partition("Near it, ")[2])
        found.append((said, sentence(lambda key=(offered[0], case): refused(*key)) if offered else "no offer"))  # type: ignore[misc]
    return found


def test_what_a_model_cannot_do_is_said_with_a_layout_that_works() -> None:
    for answers in run_ranks(all_refused, 2):
        for (said, of_offered), words in zip(answers, REFUSED.values(), strict=True):
            assert words in said and of_offered == "nothing", (said, of_offered)


def split_in_two() -> None:
    engine = parallelize(tiny_model("whisper"), "pp=2,schedule=zbv,microbatches=4", tiny_batch("whisper"))
    engine.train_step(tiny_batch("whisper"))


def test_a_backward_pass_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(RankFailed, match="schedule=zbv: torch cannot split this model's backward pass in two"):
        run_ranks(split_in_two, 2)


def failing() -> str:
    engine = parallelize(tiny_model("gpt2"), "pp=2", tiny_batch("gpt2"), microbatches=2)
    batch = tiny_batch("gpt2")
    batch["input_ids"][3, 0] = 5000
    engine.train_step(batch)
    return "nothing"


def test_a_failing_stage_is_named() -> None:
    with pytest.raises(RankFailed, match=r"pipeline stage 0 \(transformer\.h\.0 to .*\), micro-batch 1: IndexError"):
        run_ranks(failing, 2)
