"""Our models behind transformers' words, against transformers' own with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError
from fms_parallel.models import get_model
from fms_parallel.models.hf import to_hf_api

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # No pad_token_id: transformers trains that row of the embedding no more, we do.
}
IDS = torch.tensor([[0, 0, 5, 6, 7], [3, 9, 4, 8, 11]])
REAL = (IDS != 0).long()

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 5, "temperature": 0.8},
    "without cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("theirs")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(path)
    return path


def theirs(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def ours(folder: Path, layout: str | None = None) -> Any:
    return to_hf_api(get_model("hf_pretrained", model_path=folder, distributed_strategy=layout)).eval()


def generated(model: Any, way: str) -> torch.Tensor:
    torch.manual_seed(7)
    tokens: torch.Tensor = model.generate(IDS, attention_mask=REAL, max_new_tokens=12, pad_token_id=0, **WAYS[way])
    return tokens


@pytest.mark.parametrize("way", WAYS)
def test_generate_of_left_padded_rows_matches_transformers(folder: Path, way: str) -> None:
    assert torch.equal(generated(ours(folder), way), generated(theirs(folder), way))


def test_loss_and_gradients_match_transformers(folder: Path) -> None:
    labels = IDS.masked_fill(IDS == 0, -100)
    labels[0, 2] = -100  # the token before it is padding: what that predicts means nothing
    expected, found = (m(input_ids=IDS, attention_mask=REAL, labels=labels) for m in (theirs(folder), ours(folder)))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.logits[REAL == 1], expected.logits[REAL == 1], rtol=1e-4, atol=1e-5)
    a, b = theirs(folder), ours(folder)
    a(input_ids=IDS, attention_mask=REAL, labels=labels).loss.backward()
    b(input_ids=IDS, attention_mask=REAL, labels=labels).loss.backward()
    torch.testing.assert_close(b.model.head.weight.grad, a.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.model.embedding.weight.grad, a.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)


def test_saved_folder_is_transformers_own(folder: Path, tmp_path: Path) -> None:
    ours(folder).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == "LlamaForCausalLM"
    assert torch.equal(again(IDS).logits, theirs(folder)(IDS).logits)
    back = type(ours(folder)).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(back(IDS).logits, again(IDS).logits, rtol=1e-4, atol=1e-5)


def test_text_generation_pipeline(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 61)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    texts = []
    for model in (ours(folder), theirs(folder)):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        texts.append(pipe("w5 w6 w7", max_new_tokens=6, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1] and texts[0].startswith("w5 w6 w7")


def test_trainer_trains(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    rows = [{"input_ids": IDS[1], "labels": IDS[1]}] * 8
    losses = []
    for model in (ours(folder), theirs(folder)):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model.train(), args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def generated_over_ranks(folder: Path, layout: str, way: str) -> list[list[int]]:
    return generated(ours(folder, layout), way).tolist()


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_tp2_generates_the_tokens_of_one_process(folder: Path, way: str) -> None:
    expected = generated(theirs(folder), way).tolist()
    assert run_ranks(generated_over_ranks, 2, folder, "tp=2", way) == [expected, expected]


def test_what_would_be_ignored_is_refused(folder: Path) -> None:
    model = ours(folder)
    with pytest.raises(ConfigError, match="output_attentions"):
        model(IDS, output_attentions=True)
    with pytest.raises(ConfigError, match="inputs_embeds"):
        model(IDS, inputs_embeds=torch.zeros(2, 5, 32))
    with pytest.raises(ConfigError, match="3 dimensions"):
        model(IDS, attention_mask=torch.ones(2, 5, 5))
