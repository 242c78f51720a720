"""The loop: rows of a batch against rows alone, cached steps against whole forwards, endings, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.inference.cache import KVCache
from fms_parallel.inference.loop import Columns, generate
from tests.inference.models import PROMPTS, Counting, tiny_llama

GREEDY: dict[str, Any] = {"max_new_tokens": 12}
SAMPLED: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3}

MODELS: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 4},
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "fused, qk_norm, scaled rope": {
        **{"fused": True, "qk_norm": True, "rope_scaling": "llama3"},
        "rope_options": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 32,
        },
    },
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_llama(**request.param)


def assert_logits_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To 1e-5 of the largest logit."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# ---- one batch, many ways ---------------------------------------------------------------------------------------


def test_row_in_a_batch_equals_row_alone(model: nn.Module, poison: None) -> None:
    alone = [generate(model, [prompt], **GREEDY)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, **GREEDY) == alone
    assert len({tuple(row) for row in alone}) == len(PROMPTS)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_cached_steps_equal_whole_forwards(model: nn.Module, options: dict[str, Any]) -> None:
    """A step that keeps only the mask's last row, or aligns it to the first key, differs here."""
    assert generate(model, PROMPTS, **options) == generate(model, PROMPTS, **options, use_cache=False)


def test_every_token_is_the_likeliest_of_a_plain_forward(model: nn.Module) -> None:
    for prompt, new in zip(PROMPTS, generate(model, PROMPTS, **GREEDY), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new]))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new


def test_padded_rows_give_the_logits_of_rows_alone(model: nn.Module, poison: None) -> None:
    width = max(map(len, PROMPTS))
    padding = torch.tensor([width - len(prompt) for prompt in PROMPTS])
    ids = torch.tensor([[36] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    columns = Columns(0, width, padding)
    with torch.no_grad():
        logits = model(ids, positions=columns.positions(), mask=columns.mask())
        assert logits.isfinite().all()  # also where a query is padding
        for prompt, row in zip(PROMPTS, logits, strict=True):
            assert_logits_close(row[-len(prompt) :], model(torch.tensor([prompt]))[0])


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [4, 3], [2, 1, 4], [1, 6]])
def test_prompt_in_chunks_gives_the_logits_of_one_forward(model: nn.Module, chunks: list[int]) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
    cache, start, pieces = KVCache(capacity=7), 0, []
    with torch.no_grad():
        for chunk in chunks:
            pieces.append(model(ids[:, start : start + chunk], first_position=start, cache=cache))
            start += chunk
        assert_logits_close(torch.cat(pieces, dim=1), model(ids))


def test_mask_of_a_padded_batch_written_out() -> None:
    columns = Columns(1, 4, torch.tensor([0, 2]))
    assert columns.positions().tolist() == [[1, 2, 3], [0, 0, 1]]
    assert columns.mask().int().tolist() == [
        [[[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
        [[[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]],
    ]


def test_prompts_may_be_lists_tensors_or_one_tensor() -> None:
    model, rows = tiny_llama(), [[1, 2, 3], [4, 5, 6]]
    wanted = generate(model, rows, **GREEDY)
    assert generate(model, [torch.tensor(row) for row in rows], **GREEDY) == wanted
    assert generate(model, torch.tensor(rows), **GREEDY) == wanted


# ---- sampling -----------------------------------------------------------------------------------------------------


def test_sampled_row_depends_on_seed_and_index_only() -> None:
    model = tiny_llama()
    first = generate(model, PROMPTS, **SAMPLED)
    assert generate(model, PROMPTS, **SAMPLED) == first
    assert generate(model, [[30, 31, 32, 33, 34, 35, 36], PROMPTS[1]], **SAMPLED)[1] == first[1]
    assert generate(model, PROMPTS, **SAMPLED | {"seed": 4}) != first
    same = generate(model, [PROMPTS[0]] * 3, **SAMPLED)
    assert len({tuple(row) for row in same}) == 3


def test_top_k_of_one_is_greedy() -> None:
    model = tiny_llama()
    found = generate(model, PROMPTS, max_new_tokens=12, temperature=1.0, top_k=1, seed=9)
    assert found == generate(model, PROMPTS, **GREEDY)


# ---- endings ------------------------------------------------------------------------------------------------------


def test_each_row_ends_at_its_own_eos_and_keeps_it() -> None:
    model = Counting()
    assert generate(model, [[3], [1, 6], [20]], max_new_tokens=5, eos_id=8) == [
        [4, 5, 6, 7, 8],
        [7, 8],
        [21, 22, 23, 24, 25],
    ]
    assert model.forwards == 5


@pytest.mark.parametrize("eos_id", [[8, 5], (5,), {5, 40}])
def test_any_of_several_eos_ids_ends_a_row(eos_id: Any) -> None:
    assert generate(Counting(), [[3]], max_new_tokens=9, eos_id=eos_id) == [[4, 5]]


def test_loop_ends_when_every_row_has_ended() -> None:
    model = Counting()
    assert generate(model, [[3], [5]], max_new_tokens=100, eos_id=7) == [[4, 5, 6, 7], [6, 7]]
    assert model.forwards == 4


def test_row_that_ended_leaves_the_others_as_they_are() -> None:
    model = tiny_llama()
    free = generate(model, PROMPTS, **GREEDY)
    eos = free[0][2]
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert generate(model, PROMPTS, **GREEDY, eos_id=eos) == ended
    assert len(ended[0]) < len(free[0])


class NaNAfterEight(Counting):
    """Counts, but after token 8 has no next one; like an embedding it has no row for a token below 0."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        assert input_ids.min() >= 0
        broken = input_ids[:, -1:, None] == 8
        return super().forward(input_ids, **others).masked_fill(broken, float("nan"))


def test_row_that_ended_may_have_any_logits() -> None:
    found = generate(NaNAfterEight(), [[6], [20]], max_new_tokens=5, eos_id=8)
    assert found == [[7, 8], [21, 22, 23, 24, 25]]
    with pytest.raises(FmsError, match=r"row 0 .* new token 2"):
        generate(NaNAfterEight(), [[6], [20]], max_new_tokens=5)


def test_eos_in_a_prompt_ends_nothing() -> None:
    assert generate(Counting(), [[8, 3]], max_new_tokens=2, eos_id=8) == [[4, 5]]


def test_stop_sequence_ends_a_row_and_is_kept() -> None:
    stop = [[6, 7], [31]]
    assert generate(Counting(), [[3], [20], [29]], max_new_tokens=6, stop=stop) == [
        [4, 5, 6, 7],
        [21, 22, 23, 24, 25, 26],
        [30, 31],
    ]


def test_stop_sequence_that_begins_in_the_prompt_does_not_count() -> None:
    assert generate(Counting(), [[6]], max_new_tokens=3, stop=[[6, 7]]) == [[7, 8, 9]]


# ---- what it leaves behind, and errors ----------------------------------------------------------------------------


def test_modules_are_left_in_the_mode_they_were_in() -> None:
    model = tiny_llama(dropout=0.5)
    model.train()
    frozen = next(model.children()).eval()
    greedy = generate(model, PROMPTS, **GREEDY)
    assert model.training
    assert not frozen.training
    assert [m.training for m in model.modules() if m is not frozen] == [True] * (len(list(model.modules())) - 1)
    assert generate(model.eval(), PROMPTS, **GREEDY) == greedy  # nothing was dropped
    assert not model.training


def test_model_trains_after_generating_as_before() -> None:
    model, ids = tiny_llama(), torch.tensor([[1, 2, 3, 4]])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, ids).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before = gradients()
    generate(model, PROMPTS, **GREEDY)
    assert all(torch.equal(*pair) for pair in zip(before, gradients(), strict=True))
    assert before


def test_logits_that_are_not_finite_stop_the_run_by_name() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(float("nan"))
    with pytest.raises(FmsError, match=r"logits of row 0 are NaN or infinite at new token 0"):
        generate(model, PROMPTS, **GREEDY)


BAD_REQUESTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no prompts": ([], {}, "no prompts: "),
    "empty prompt": ([[1], []], {}, "prompt 1 of 2 is empty: "),
    "empty tensor": (torch.zeros(2, 0, dtype=torch.int64), {}, "prompt 0 of 2 is empty: "),
    "one flat prompt": ([1, 2], {}, "prompt 0 is 1, not a list of token ids"),
    "flat tensor": (torch.tensor([1, 2]), {}, "prompts as one tensor must be [B, S], got (2,)"),
    "no whole number": ([[1, 2.5]], {}, "prompt 0 has 2.5: token ids are whole numbers"),
    "token too large": ([[1], [2, 50]], {}, "prompt 1 has token 50, but this model's tokens are 0..49."),
    "negative token": ([[-1]], {}, "prompt 0 has token -1,"),
    "eos too large": ([[1]], {"eos_id": 99}, "eos_id has token 99,"),
    "stop too large": ([[1]], {"stop": [[1], [99]]}, "stop sequence 1 has token 99,"),
    "empty stop": ([[1]], {"stop": [[]]}, "stop sequence 0 is empty"),
    "flat stop": ([[1]], {"stop": [1, 2]}, "stop sequence 0 is 1, not a list of token ids"),
    "no new tokens": ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: must be >= 1"),
    "too long": (
        [[1], [1] * 15],
        {"max_new_tokens": 6},
        "prompt 1 has 15 tokens; with max_new_tokens=6 that makes 21, beyond max_positions=20 of this model: "
        "shorten the prompt or ask for at most 5 new tokens.",
    ),
    "temperature": ([[1]], {"temperature": -1.0}, "temperature=-1.0: "),
    "top_k": ([[1]], {"temperature": 1.0, "top_k": 51}, "top_k=51 of a vocabulary of 50 "),
}


@pytest.mark.parametrize(("prompts", "options", "sentence"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_impossible_request_is_named_before_any_forward(prompts: Any, options: dict[str, Any], sentence: str) -> None:
    model = Counting(vocab=50, max_positions=20)
    with pytest.raises(ConfigError) as error:
        generate(model, prompts, **{"max_new_tokens": 2} | options)
    assert str(error.value).startswith(sentence)
    assert model.forwards == 0


def test_request_that_just_fits_is_served() -> None:
    model = tiny_llama(max_positions=16)
    assert len(generate(model, [[1] * 4, [2]], max_new_tokens=12)[0]) == 12


def test_model_without_a_cache_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"Linear cannot generate: its forward takes no positions, first_position, m"):
        generate(nn.Linear(2, 2), [[1]], max_new_tokens=1)
