"""The engine in one process: micro-batches, tasks, losses, what models are given as, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms_parallel.auto import UserLoss, parallelize
from fms_parallel.auto.families import FAMILIES, tiny_batch, tiny_config, tiny_model
from fms_parallel.auto.source import build_skeleton, parameters_on_meta
from fms_parallel.auto.table import as_markdown, compare, write_into
from fms_parallel.auto.tasks import TASKS, get_task
from fms_parallel.errors import CheckpointError, ConfigError, LayoutError, TrainingError
from tests.auto.plain import Flat, Net, net_batch


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_micro_batches_change_nothing(microbatches: int) -> None:
    model, batch = Net().double(), net_batch(4)
    engine = parallelize(model, None, batch, task="classification", microbatches=microbatches)
    loss = engine.train_step(batch)
    wanted = F.cross_entropy(model(batch["input_ids"]), batch["labels"])
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-12)
    for name, parameter in engine.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, rtol=1e-10, atol=1e-14)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(engine.clip_grad_norm_(norm.item() / 2)) == pytest.approx(float(norm), rel=1e-12)
    assert float(engine.grad_norm()) == pytest.approx(float(norm) / 2, rel=1e-5)


def test_a_step_drops_the_gradients_of_the_one_before() -> None:
    engine = parallelize(Net(), None, net_batch(), task="classification")
    engine.train_step(net_batch())
    first = engine.grad_norm()
    engine.train_step(net_batch())
    assert torch.equal(first, engine.grad_norm())


def test_evaluation_leaves_gradients_and_mode_alone() -> None:
    model = Net()
    model.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
    engine = parallelize(model, None, net_batch(), task="classification")
    engine.train_step(net_batch())
    before = engine.grad_norm()
    assert float(engine.eval_step(net_batch())) == float(engine.eval_step(net_batch()))
    assert torch.equal(before, engine.grad_norm()) and engine.stages[0].training


@pytest.mark.parametrize("name", FAMILIES)
def test_tasks_are_known_by_the_class_and_equal_the_models_own_loss(name: str) -> None:
    pytest.importorskip("transformers")
    model, batch = tiny_model(name), tiny_batch(name)
    engine = parallelize(model, None, batch)
    loss = engine.eval_step(batch)
    assert float(loss) == pytest.approx(float(model.eval()(**batch).loss.detach()), rel=1e-5) or name == "mixtral"


def test_a_loss_and_a_count_of_ones_own() -> None:
    model, batch = Net().double(), net_batch()
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)

    def loss(out: Tensor, rows: Any) -> Tensor:
        return (F.cross_entropy(out, rows["labels"], reduction="none") * rows["weights"]).sum()

    task = UserLoss(loss, count=lambda rows: rows["weights"].sum(), model_inputs=("input_ids",))
    engine = parallelize(model, None, batch | {"weights": weights}, task=task, microbatches=2)
    each = F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")
    wanted = (each * weights).sum() / weights.sum()
    assert float(engine.train_step(batch | {"weights": weights})) == pytest.approx(float(wanted.detach()), rel=1e-12)


# ---- where models come from -------------------------------------------------------------------------------------


def test_a_function_builds_without_memory_and_with_real_buffers() -> None:
    with parameters_on_meta():
        model = Net()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.table, Net().table)


def test_drawn_weights_follow_the_seed_and_the_modules_own_rules() -> None:
    pytest.importorskip("transformers")
    config, batch = tiny_config("llama", initializer_range=0.5), tiny_batch("llama")
    one, same, other = (parallelize(config, None, batch, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    matrix, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
    assert not torch.equal(one[matrix], other[matrix])
    assert float(one[matrix].std()) == pytest.approx(0.5, rel=0.1) and bool((one[norm] == 1).all())


class Unknown(Net):
    """Has a parameter that nobody says how to start."""


def test_a_parameter_that_nobody_can_draw_is_named() -> None:
    with pytest.raises(ConfigError, match="nobody says how gain starts"):
        parallelize(Unknown, None, net_batch(), task="classification")


def test_rotary_tables_are_right_without_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, batch = tiny_model("llama").eval(), tiny_batch("llama")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    engine = parallelize(tmp_path, None, batch)
    assert float(engine.eval_step(batch)) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tiny_model("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    other = tiny_config("llama", intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight has shape .* another config"):
        parallelize(other, None, tiny_batch("llama"), weights=tmp_path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    engine = parallelize(Net(), None, net_batch(), task="classification")
    state = {name: value for name, value in engine.state_dict().items() if name != "head.bias"}
    with pytest.raises(CheckpointError, match=r"1 parameters are not among the weights \(head\.bias\)"):
        engine.load_state_dict(state)


def test_the_model_that_was_given_is_not_changed() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = parallelize(model, None, net_batch(), task="classification")
    optimizer = engine.adamw(lr=0.1)
    engine.train_step(net_batch())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(engine.state_dict()["head.weight"], before["head.weight"])


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"task": "poetry"}, ConfigError, "unknown task 'poetry'"),
        ({"task": None}, ConfigError, "Net does not say what it is trained on"),
        ({"model": 3}, ConfigError, "int: give an nn.Module"),
        ({"layout": "cp=1,recompute=budget=0.5"}, LayoutError, "needs compiled blocks"),
        ({"layout": "precision=bf16"}, LayoutError, "use 2 ranks"),
        ({"batch": {"input_ids": torch.ones(2, 5), "labels": torch.ones(3)}}, ConfigError, "one row count in front"),
        ({"batch": {"input_ids": net_batch()["input_ids"]}}, ConfigError, "the batch has no 'labels'"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"model": Net(), "layout": None, "batch": net_batch(), "task": "classification"} | changes
    with pytest.raises(error, match=words):
        parallelize(given["model"], given["layout"], given["batch"], task=given["task"])


def test_a_batch_in_which_nothing_counts_is_refused() -> None:
    engine = parallelize(Net(), None, net_batch(), task="classification")
    with pytest.raises(TrainingError, match="nothing that counts"):
        engine.train_step(net_batch() | {"labels": torch.full((4,), -100)})


def test_a_model_without_blocks_trains_without_stages() -> None:
    batch = {"x": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}
    engine = parallelize(Flat(), None, batch, task="classification", microbatches=2)
    assert float(engine.train_step(batch)) > 0


def test_seq2seq_shifts_labels_to_the_right() -> None:
    class Config:
        decoder_start_token_id, pad_token_id = 7, 0

    labels = torch.tensor([[4, 5, 6], [4, -100, -100]])
    made = TASKS["seq2seq"].prepare({"labels": labels}, Config())
    assert made["decoder_input_ids"].tolist() == [[7, 4, 5], [7, 4, 0]]
    with pytest.raises(ConfigError, match="no decoder_start_token_id"):
        TASKS["seq2seq"].prepare({"labels": labels}, None)


def test_a_config_needs_a_class_or_a_task() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(num_hidden_layers=2)
    with pytest.raises(ConfigError, match="give task="):
        build_skeleton(config)
    model, _, _ = build_skeleton(config, "causal_lm")
    assert type(model).__name__ == "LlamaForCausalLM" and get_task(model, None) is TASKS["causal_lm"]


# ---- the table --------------------------------------------------------------------------------------------------


def test_the_table_says_what_was_found(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = compare(["vit"], [""])
    assert found["vit", ""].worst <= 1e-12
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- generated: begin -->\nold\n<!-- generated: end -->\nbelow\n")
    write_into(page, as_markdown(found))
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "| vit |" in text and "old" not in text
