"""A script written for OptimusPrime, with only its import changed, finds what one process finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fms_parallel.auto.families import tiny_batch, tiny_model
from fms_parallel.auto.optimus import Optimus_p
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import FmsError

pytest.importorskip("transformers")

SWAPS = {"swap_opt_in_fwdbwd": True, "swap_model_in_optstep": True}


def ids(step: int) -> Tensor:
    return tiny_batch("gpt2", rows=4, seed=step)["input_ids"]


def alone(name: str, steps: int) -> list[float]:
    """The same training in plain torch."""
    model = tiny_model(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(ids(step), labels=ids(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def script(name: str, mode: str, sizes: dict[str, Any], steps: int, shifted: bool) -> list[float]:
    """As its examples are written: data where the pipeline begins, labels moved to the last stage."""
    optimus_p = Optimus_p(tiny_model(name), 2, use_gpu=False, **sizes)
    optimus_p.train()
    optimus_p.optimizer = torch.optim.Adam(optimus_p.parameters(), lr=1e-2)
    losses = []
    index, count = optimus_p.engine.data_shard
    for step in range(steps):
        data = labels = None
        if optimus_p.is_first_stage():
            data = ids(step).chunk(count)[index]
            labels = data.clone()
            if shifted:
                labels = torch.cat([data[:, 1:], torch.full((len(data), 1), -100)], 1)
        labels = optimus_p.move_labels2last_stage(labels)
        optimus_p.optimizer.zero_grad()
        optimus_p.run(data, labels, mode=mode)
        if optimus_p.is_last_stage():
            assert len(optimus_p.get_loss()) == optimus_p.num_mb
            assert count > 1 or sum(optimus_p.get_loss()) / optimus_p.num_mb == pytest.approx(optimus_p.loss, rel=1e-6)
        optimus_p.clip_grad_norm_(0.5)
        optimus_p.optimizer.step()
        losses.append(optimus_p.loss)
    return losses


SCRIPTS: list[tuple[str, str, dict[str, Any], bool]] = [
    ("gpt2", "1f1b", {}, False),
    ("gpt2", "gpipe", {"pp_size": 2}, True),
    ("gpt2", "gpipe", {"pp_size": 1, "dp_size": 2}, False),
    ("llama", "gpipe", {"pp_size": 1, "tp_size": 2}, False),
    ("gpt2", "1f1b", {"activation_ckpt": True, **SWAPS}, False),
    ("gpt2", "1f1b", {"swap_opt_in_fwdbwd": True}, False),
]


def scripts() -> list[list[float]]:
    return [script(name, mode, sizes, 4, shifted) for name, mode, sizes, shifted in SCRIPTS]


def test_a_script_equals_one_process() -> None:
    wanted = {name: alone(name, 4) for name in ("gpt2", "llama")}
    for answer in run_ranks(scripts, 2):
        for found, case in zip(answer, SCRIPTS, strict=True):
            assert found == pytest.approx(wanted[case[0]], rel=2e-4), case


def test_one_process_needs_no_launcher() -> None:
    assert script("gpt2", "gpipe", {}, 2, False) == pytest.approx(alone("gpt2", 2), rel=1e-5)


def saved_and_loaded(folder: str) -> tuple[list[float], list[float], tuple[int, int]]:
    def steps(optimus_p: Any, numbers: range) -> list[float]:
        found = []
        for step in numbers:
            optimus_p.run(ids(step), ids(step), mode="1f1b")
            optimus_p.optimizer.step()
            found.append(optimus_p.loss)
        return found

    first, second = (Optimus_p(tiny_model("gpt2"), 2, use_gpu=False) for _ in range(2))
    for one in (first, second):
        one.optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    steps(first, range(2))
    first.save_ckpt(2, epoch=1, folder=folder)
    first.save_hf_ckpt(f"{folder}/hf")
    place = second.load_ckpt(folder=folder)
    return steps(first, range(2, 4)), steps(second, range(2, 4)), place


def test_a_checkpoint_goes_on_and_weights_are_transformers(tmp_path: Path) -> None:
    import transformers

    for straight, went_on, place in run_ranks(saved_and_loaded, 2, str(tmp_path)):
        assert straight == went_on and place == (2, 1)
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")


def wrongly(case: str) -> None:
    sizes: dict[str, Any] = {"swap alone": {"swap_model_in_optstep": True}, "sizes": {"dp_size": 3}}.get(case, {})
    optimus_p = Optimus_p(tiny_model("gpt2"), 2, use_gpu=False, **sizes, swap_opt_in_fwdbwd=case in ("sgd", "none"))
    if case == "sgd":
        optimus_p.optimizer = torch.optim.SGD(optimus_p.parameters(), lr=1e-2)
    optimus_p.run(ids(0), ids(5) if case == "labels" else ids(0), mode="zb" if case == "mode" else "gpipe")


WRONG = {
    "swap alone": "swap_model_in_optstep goes with swap_opt_in_fwdbwd",
    "sizes": "2 ranks do not divide by dp_size * tp_size = 3",
    "sgd": "SGD cannot be swapped",
    "none": "set optimus_p.optimizer before run",
    "labels": "labels are neither the ids nor the next ids",
    "mode": "unknown mode 'zb'",
}


def mistakes() -> dict[str, str]:
    found = {}
    for case in WRONG:
        try:
            wrongly(case)
        except FmsError as error:
            found[case] = str(error)
    return found


def test_a_mistake_is_said() -> None:
    for found in run_ranks(mistakes, 2):
        for case, words in WRONG.items():
            assert words in found[case]
