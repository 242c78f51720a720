"""A script written for OptimusPrime, with only its import changed, finds what one process finds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

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


TEXTS = [("the quick brown fox jumps over the lazy dog " * 3)[i : i + 7 + i % 5] for i in range(22)]


def tokenizer(texts: list[str]) -> Any:
    """Letters, padded to the longest."""
    rows = [torch.tensor([ord(letter) % 90 + 3 for letter in text]) for text in texts]
    return SimpleNamespace(input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))


def published(max_norm: float, **options: Any) -> list[float]:
    """A training script as OptimusPrime publishes them, with another import and on the CPU."""
    from fms_parallel.auto.optimus import IR_Anal, Optimus_p

    model, batch_size, num_mb = tiny_model("gpt2"), 4, 2
    optimus_p = Optimus_p(
        model,
        num_mb,
        use_gpu=False,
        activation_ckpt=False,
        preserve_output=True,
        force_free_mem=True,
        display_mem=False,
        ir_analyze=IR_Anal.PARALLEL,
        partitioner="simple",
        **options,
    )
    optimus_p.train()
    optimus_p.optimizer = torch.optim.Adam(optimus_p.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimus_p.optimizer, 1, gamma=0.95)
    dataloader = optimus_p.prepare_dataloader(TEXTS, batch_size)
    losses = []
    for batch in dataloader:
        data, labels = None, None
        if optimus_p.is_first_stage():
            tokens = tokenizer(batch)
            data, labels = tokens.input_ids, tokens.input_ids
        labels = optimus_p.move_labels2last_stage(labels)
        optimus_p.optimizer.zero_grad()
        optimus_p.run(data, labels, mode="1f1b")
        loss = optimus_p.get_loss() if optimus_p.is_last_stage() else None
        torch.nn.utils.clip_grad_norm_(optimus_p.parameters(), max_norm)
        optimus_p.optimizer.step()
        scheduler.step()
        if loss is not None:
            output = optimus_p.get_output()
            assert output is not None and output.shape[:2] == labels.shape
            losses.append(sum(loss) / optimus_p.num_mb)
    return losses


def plain(max_norm: float, replicas: int) -> list[list[float]]:
    """The same in one process that reads what all replicas read; each replica's own loss of every step."""
    loaders = [
        DataLoader(TEXTS, 4, sampler=DistributedSampler(TEXTS, replicas, index))  # type: ignore[arg-type, var-annotated]
        for index in range(replicas)
    ]
    model = tiny_model("gpt2")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.95)
    losses = []
    for batches in zip(*loaders, strict=True):
        optimizer.zero_grad()
        pieces = [tokenizer(batch).input_ids for batch in batches]
        found = [model(piece, labels=piece).loss for piece in pieces]
        counts = [piece[:, 1:].numel() for piece in pieces]
        sum(loss * count / sum(counts) for loss, count in zip(found, counts, strict=True)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        scheduler.step()
        losses.append([loss.item() for loss in found])
    return losses


PUBLISHED: list[tuple[float, dict[str, Any]]] = [
    (1e9, {}),  # torch's clipping sees one stage, as in OptimusPrime
    (1e9, {"swap_opt_in_fwdbwd": True, "swap_model_in_optstep": True}),
    (0.5, {"dp_size": 2}),
]


def every_published() -> list[list[float]]:
    return [published(norm, **options) for norm, options in PUBLISHED]


def test_the_published_script_with_another_import_equals_plain_torch() -> None:
    answers = run_ranks(every_published, 2)
    for case, (norm, options) in enumerate(PUBLISHED):
        replicas = options.get("dp_size", 1)
        wanted = plain(norm, replicas)
        for replica in range(replicas):
            found = answers[replica if replicas > 1 else 1][case]
            assert len(found) == -(-22 // (4 * replicas))
            assert found == pytest.approx([losses[replica] for losses in wanted], rel=2e-4), options
        assert replicas > 1 or answers[0][case] == []  # no loss where the pipeline begins


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
    sizes: dict[str, Any] = {
        "swap alone": {"swap_model_in_optstep": True},
        "sizes": {"dp_size": 3},
        "disk": {"swap_use_disk": True},
        "option": {"force_mem": True},
        "partitioner": {"partitioner": "ilp"},
    }.get(case, {})
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
    "disk": "swap_use_disk: the swaps go to host memory",
    "option": "unknown option of Optimus_p 'force_mem'. Did you mean 'force_free_mem'",
    "partitioner": "unknown partitioner 'ilp'",
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
