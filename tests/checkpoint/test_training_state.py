"""The state of a run in one process. Oracles: bits, the losses of going on, and every way a folder can be torn.

Other layouts and failing ranks: tests/distributed/test_checkpoint.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from fms_parallel.checkpoint import training_state
from fms_parallel.checkpoint.manifest import MANIFEST, FileMark, Manifest
from fms_parallel.checkpoint.training_state import (
    latest_training_state,
    load_model_state,
    load_training_state,
    save_training_state,
)
from fms_parallel.errors import CheckpointError
from tests.checkpoint.llamas import TIED, TINY, build

SHARD = "__0_0.distcp"
Run = tuple[nn.Module, torch.optim.Optimizer]


def start(seed: int = 0, **changes: Any) -> Run:
    model = build(replace(TIED, **changes), seed=seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(run: Run, step: int) -> float:
    """The loss before the step."""
    model, optimizer = run
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    loss: Tensor = model(ids, labels=ids.roll(-1, 1))
    loss.backward()
    optimizer.step()
    return loss.item()


def save(folder: Path, run: Run, step: int = 1, **options: Any) -> Path:
    return save_training_state(folder, step=step, model=run[0], optimizer=run[1], **{"numbers": {}, **options})


def tensors(run: Run) -> dict[str, Tensor]:
    model, optimizer = run
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"{names[p]}/{kind}": t for p, kinds in optimizer.state.items() for kind, t in kinds.items()}
    return {**dict(model.named_parameters()), **state}


def assert_same(one: Run, other: Run) -> None:
    expected, found = tensors(one), tensors(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def run() -> Run:
    """A run that has done a step."""
    run = start()
    train(run, 0)
    return run


# ---- there and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.usefixtures("poison")
def test_model_optimizer_and_numbers_come_back_bit_for_bit(tmp_path: Path, run: Run, verify: bool) -> None:
    numbers = {"tokens": 10**15, "best": 0.1, "data": {"epoch": 2, "order": [1, None, True]}, "name": "µ"}
    path = save(tmp_path / "runs" / "a", run, 7, numbers=numbers)
    assert path == tmp_path / "runs" / "a" / "step-00000007"
    other = start(seed=1)
    train(other, 5)  # what is there already is replaced
    assert load_training_state(path, *other, verify=verify) == {**numbers, "step": 7}
    assert_same(run, other)
    assert [train(other, step) for step in range(3)] == [train(run, step) for step in range(3)]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.Adafactor(p, lr=0.01),
        lambda p: torch.optim.NAdam(p, lr=0.01),
    ],
    ids=["sgd", "momentum", "amsgrad", "fused", "adafactor", "nadam"],
)
@pytest.mark.usefixtures("poison")
def test_state_of_other_optimizers_comes_back(tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    runs = [(model, make(model.parameters())) for model in (build(TIED), build(TIED, seed=1))]
    train(runs[0], 0)
    load_training_state(save(tmp_path, runs[0]), *runs[1])
    assert_same(*runs)
    assert train(runs[0], 1) == train(runs[1], 1)
    assert_same(*runs)


def test_state_goes_by_name_whatever_the_order_and_groups(tmp_path: Path, run: Run) -> None:
    """The groups' own numbers are those of the new optimizer."""
    path = save(tmp_path, run)
    model = build(TIED, seed=1)
    backwards = list(model.parameters())[::-1]
    groups: list[dict[str, Any]] = [{"params": backwards[:3], "lr": 0.5}, {"params": backwards[3:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.25)
    load_training_state(path, model, optimizer)
    assert_same(run, (model, optimizer))
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.5, 3), (0.25, 17)]


def test_before_the_first_step_there_is_no_state_and_that_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, start(), 0)
    other = start(seed=1)
    assert load_training_state(path, *other) == {"step": 0}
    assert not other[1].state
    assert_same(start(), other)


def test_parameter_that_has_no_state_yet_has_none_after_loading(tmp_path: Path) -> None:
    runs = [start(), start(seed=1)]
    for model, _ in runs:
        model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    runs = [(model, torch.optim.AdamW(model.parameters())) for model, _ in runs]
    train(runs[0], 0)
    load_training_state(save(tmp_path, runs[0]), *runs[1])
    assert_same(*runs)


def test_buffers_come_back(tmp_path: Path) -> None:
    models = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    models[0](torch.randn(4, 3))
    runs = [(model, torch.optim.AdamW(model.parameters())) for model in models]
    load_training_state(save(tmp_path, runs[0]), *runs[1])
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], tensor), name


def test_weights_alone_take_the_models_dtype(tmp_path: Path, run: Run) -> None:
    path = save(tmp_path, run)
    model = build(TIED, seed=1).to(torch.bfloat16)
    load_model_state(path, model)
    for (name, found), expected in zip(model.named_parameters(), run[0].parameters(), strict=True):
        assert torch.equal(found, expected.to(torch.bfloat16)), name


def test_manifest_says_what_it_is_of(tmp_path: Path, run: Run) -> None:
    path = save(tmp_path, run, 3, numbers={"tokens": 5})
    content = json.loads((path / MANIFEST).read_text())
    assert (content["step"], content["numbers"], content["optimizer"]) == (3, {"tokens": 5}, "AdamW")
    assert (content["layout"], content["torch"], content["stateless"]) == ("", torch.__version__, [])
    on_disk = {file.name: FileMark.of(file) for file in path.iterdir() if file.name != MANIFEST}
    assert Manifest.read(path).files == on_disk and on_disk.keys() == {".metadata", SHARD}


# ---- torn folders -----------------------------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


TEARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard cut": (lambda p: cut(p / SHARD), r"__0_0\.distcp has \d+ bytes and was written with \d+"),
    "shard missing": (lambda p: (p / SHARD).unlink(), r"__0_0\.distcp is missing"),
    "metadata missing": (lambda p: (p / ".metadata").unlink(), r"\.metadata is missing"),
    "manifest missing": (lambda p: (p / MANIFEST).unlink(), r"has no manifest\.json: it is not a training checkpoint"),
    "manifest cut": (lambda p: cut(p / MANIFEST), r"manifest\.json cannot be read"),
    "manifest changed": (lambda p: change(p / MANIFEST, step=9), r"manifest\.json was changed after"),
    "manifest of a later library": (lambda p: change(p / MANIFEST, format=9), "is of format 9, this library reads"),
    "manifest of something else": (lambda p: (p / MANIFEST).write_text("[1]"), r"manifest\.json cannot be read"),
}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", TEARS)
def test_torn_checkpoint_is_refused_and_never_the_latest(
    tmp_path: Path, run: Run, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tear, message = TEARS[name]
    whole, torn = save(tmp_path, run, 1), save(tmp_path, run, 2)
    tear(torn)
    other = start(seed=1)
    for load in (lambda: load_training_state(torn, *other), lambda: load_model_state(torn, other[0])):
        with pytest.raises(CheckpointError, match=message):
            load()
    assert_same(other, start(seed=1))
    assert latest_training_state(tmp_path) == whole
    assert "skipping a checkpoint that is not whole" in caplog.text and str(torn) in caplog.text


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("name", [SHARD, ".metadata"])
def test_changed_bit_is_found(tmp_path: Path, run: Run, name: str, place: float) -> None:
    path = save(tmp_path, run)
    flip(path / name, place)
    other = start(seed=1)
    with pytest.raises(CheckpointError, match=rf"{name} was changed after it was written: SHA-256 differs"):
        load_training_state(path, *other)
    assert_same(other, start(seed=1))


def test_torchs_own_error_becomes_ours(tmp_path: Path, run: Run) -> None:
    """With lengths alone a spoilt file gets as far as torch, which raises a BaseException."""
    path = save(tmp_path, run)
    for name in (SHARD, ".metadata"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(bytes(len(content)))
        with pytest.raises(CheckpointError):
            load_training_state(path, *start(), verify=False)
        (path / name).write_bytes(content)


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert latest_training_state(tmp_path / "none") is None
    (tmp_path / "step-00000001").touch()  # a file
    (tmp_path / "step-x").mkdir()
    assert latest_training_state(tmp_path) is None


# ---- saving that does not end -----------------------------------------------------------------------------------


def kill(*args: Any) -> None:
    raise KeyboardInterrupt


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


PLACES: list[tuple[object, str]] = [
    (dcp.FileSystemWriter, "write_data"),
    (dcp.FileSystemWriter, "finish"),
    (FileMark, "of"),
    (Manifest, "write"),
    (training_state, "_finish"),
]
"""Where a save can end too early, in its order. Only ours (the last three) can be killed: torch catches everything."""


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[name for _, name in PLACES])
def test_failed_save_leaves_what_was_there(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    whole = save(tmp_path, run, 1)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path, run, 2, keep=1)
    assert list(tmp_path.iterdir()) == [whole]
    load_training_state(whole, *start(seed=1))
    assert latest_training_state(tmp_path) == whole


@pytest.mark.parametrize(("owner", "name"), PLACES[2:], ids=[name for _, name in PLACES[2:]])
def test_killed_save_is_never_taken_for_a_checkpoint_and_the_next_one_cleans_up(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    whole = save(tmp_path, run, 1)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, kill)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, run, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002.partial"]
    assert latest_training_state(tmp_path) == whole
    assert save(tmp_path, run, 3) == latest_training_state(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path, run: Run) -> None:
    save(tmp_path, run, 1, numbers={"try": 1})
    train(run, 1)
    path = save(tmp_path, run, 1, numbers={"try": 2})
    other = start(seed=1)
    assert load_training_state(path, *other) == {"try": 2, "step": 1}
    assert_same(run, other)
    assert list(tmp_path.iterdir()) == [path]


# ---- which ones stay --------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_latest_is_the_highest_step(tmp_path: Path, run: Run) -> None:
    for step in (100_000_000, 9, 10):
        save(tmp_path, run, step)
    assert latest_training_state(tmp_path) == tmp_path / "step-100000000"


def test_keep_counts_whole_checkpoints_up_to_this_step(tmp_path: Path, run: Run) -> None:
    for step in range(1, 5):
        save(tmp_path, run, step)
    assert steps(tmp_path) == [1, 2, 3, 4]
    (tmp_path / "step-00000003" / SHARD).unlink()  # torn: neither counted nor removed
    save(tmp_path, run, 5, keep=3)
    assert steps(tmp_path) == [2, 3, 4, 5]
    save(tmp_path, run, 3, keep=1)  # gone back: later ones are not this one's to remove
    assert steps(tmp_path) == [3, 4, 5]


def test_trouble_with_removing_is_logged_and_the_new_one_stands(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, run, 1)
    with monkeypatch.context() as patched:
        patched.setattr(
            training_state.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else full_disk()
        )
        path = save(tmp_path, run, 2, keep=1)
    assert "step-00000002 was saved, but" in caplog.text and "No space left on device" in caplog.text
    assert latest_training_state(tmp_path) == path
    save(tmp_path, run, 3, keep=2)
    assert steps(tmp_path) == [2, 3]


# ---- what does not fit ------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_in_one_message(tmp_path: Path, run: Run) -> None:
    path = save(tmp_path, run)
    model = build(replace(TINY, layers=1, ffn_width=40))
    model.register_parameter("probe", nn.Parameter(torch.ones(1)))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError) as caught:
        load_training_state(path, model, optimizer)
    message = str(caught.value)
    assert message.startswith(
        f"{path} does not fit the model: missing (4): probe, head.weight, optimizer state of probe"
    )
    assert "extra (" in message and "layers.1.attention.query.weight" in message
    assert "layers.0.feed_forward.up.weight ([38, 24], the model has [40, 24])" in message
    assert not optimizer.state


def test_dtype_of_a_run_is_not_changed_silently(tmp_path: Path, run: Run) -> None:
    model = build(TIED).to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"norm.weight \(torch.float32, the model has torch.bfloat16\)"):
        load_training_state(save(tmp_path, run), model, torch.optim.AdamW(model.parameters()))


def test_parameter_that_the_new_optimizer_does_not_train_is_named(tmp_path: Path, run: Run) -> None:
    model = build(TIED)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if name != "norm.weight"])
    with pytest.raises(CheckpointError, match=r"extra \(3\): optimizer/\w+/norm.weight"):
        load_training_state(save(tmp_path, run), model, optimizer)


def test_optimizer_of_another_kind_or_another_model_is_refused(tmp_path: Path, run: Run) -> None:
    path, model = save(tmp_path, run), build(TIED)
    with pytest.raises(CheckpointError, match="holds the state of AdamW, but the optimizer is SGD"):
        load_training_state(path, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(CheckpointError, match="20 of 20 parameters of the optimizer are not the model's"):
        load_training_state(path, model, run[1])


def test_optimizer_state_that_is_no_tensor_is_refused(tmp_path: Path, run: Run) -> None:
    run[1].state[run[0].norm.weight]["note"] = "hello"  # type: ignore[index, union-attr]
    with pytest.raises(CheckpointError, match=r"optimizer state 'note' of norm.weight is a str: only tensors"):
        save(tmp_path, run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": -1}, "step=-1: must be a whole number >= 0"),
        ({"step": 1.0}, "step=1.0: must be a whole number"),
        ({"keep": 0}, "keep=0: must be >= 1"),
        ({"numbers": {"loss": torch.ones(1)}}, "numbers must be plain JSON values"),
        ({"numbers": {1: 2}}, "numbers: names must be text"),
        ({"numbers": {"step": 2}}, "numbers has step=2, but step=1 is being saved"),
    ],
)
def test_impossible_request_is_refused_before_anything_is_written(
    tmp_path: Path, run: Run, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "new", run, **{"step": 1, **options})
    assert not (tmp_path / "new").exists()
