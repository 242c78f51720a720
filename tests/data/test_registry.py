"""Datasets by name: every style ends in rows, every unknown word is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.data import get_corpus, get_dataset, list_datasets, register_dataset, registry
from fms_parallel.data.rows import RandomRows, RowDataset
from fms_parallel.errors import DataError
from fms_parallel.tokenizers import CharTokenizer, Tokenizer

TOKENIZER = CharTokenizer()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some words\n" * 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words\n" * 20}))
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Do.", "output": "Done."}]))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("text", "a.txt", {}),
        ("jsonl", "a.jsonl", {"field": "text"}),
        ("instruction", "a.json", {"preamble": ""}),
        ("stdlib", None, {"max_bytes": 1000}),
        ("random", None, {"rows": 3, "seed": 1}),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_every_style_gives_rows(
    files: Path, name: str, file: str | None, options: dict[str, Any], cached: bool
) -> None:
    path = None if file is None else files / file
    cache = files / "cache" if cached else None
    dataset = get_dataset(name, TOKENIZER, path, seq_len=64, cache_dir=cache, **options)
    assert dataset.seq_len == 64 and len(dataset) >= 1
    input_ids, labels = dataset.row(len(dataset) - 1)
    assert input_ids.shape == labels.shape == (64,)
    assert input_ids.dtype == labels.dtype == torch.int64
    assert bool((labels >= 0).any()) and int(input_ids.max()) < TOKENIZER.vocab_size


def test_text_and_jsonl_of_the_same_words_give_the_same_rows(files: Path) -> None:
    text = get_dataset("text", TOKENIZER, files / "a.txt", seq_len=32)
    lines = get_dataset("jsonl", TOKENIZER, files / "a.jsonl", seq_len=32)
    assert len(text) == len(lines)
    assert all(torch.equal(text.row(index)[1], lines.row(index)[1]) for index in range(len(text)))


def test_random_ids_are_of_the_asked_vocabulary() -> None:
    wide = get_dataset("random", TOKENIZER, seq_len=500, vocab_size=50_000)
    assert wide.row(0)[0].max() >= 256 > get_dataset("random", TOKENIZER, seq_len=500).row(0)[0].max()


def test_parquet_tokens_and_parquet_text_give_the_same_rows(files: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["one text\n", "another text\n"] * 9
    table = pa.table({"text": texts, "ids": [TOKENIZER.encode(text, bos=True, eos=True) for text in texts]})
    parquet.write_table(table, files / "a.parquet")
    text, ids = (
        get_dataset("parquet", TOKENIZER, files, seq_len=16, cache_dir=files / "cache", column=column)
        for column in ("text", "ids")
    )
    assert len(text) == len(ids) > 1
    assert all(torch.equal(text.row(index)[1], ids.row(index)[1]) for index in range(len(text)))


def test_tokens_are_no_text_to_train_a_tokenizer_on(files: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"ids": [[1]]}), files / "a.parquet")
    with pytest.raises(DataError, match="tokens, not text"):
        list(get_corpus("parquet", files, column="ids").texts())


def test_corpus_by_name_gives_the_text(files: Path) -> None:
    assert "".join(get_corpus("text", files / "a.txt").texts()) == "some words\n" * 20


# ---- names and options --------------------------------------------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))


def _zeros(tokenizer: Tokenizer, path: Any, *, seq_len: int, cache_dir: Any, rows: int = 2) -> RowDataset:
    return RandomRows(seq_len, 1, rows)


@pytest.mark.usefixtures("own_registry")
def test_registered_style_is_listed_built_and_checked() -> None:
    register_dataset("zeros", _zeros)
    register_dataset("zeros", _zeros)
    assert "zeros" in list_datasets()
    dataset = get_dataset("zeros", TOKENIZER, seq_len=4, rows=7)
    assert len(dataset) == 7 and dataset.row(0)[0].tolist() == [0, 0, 0, 0]
    with pytest.raises(DataError, match=r"'row'\. Did you mean 'rows'"):
        get_dataset("zeros", TOKENIZER, seq_len=4, row=7)


@pytest.mark.usefixtures("own_registry")
def test_name_that_is_taken_is_refused() -> None:
    with pytest.raises(DataError, match="'text' is already registered"):
        register_dataset("text", _zeros)


def test_names_are_listed_sorted() -> None:
    assert list_datasets() == ["arrow", "instruction", "jsonl", "parquet", "random", "stdlib", "text"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_dataset("txt", TOKENIZER, seq_len=8), "unknown dataset style 'txt'. Did you mean 'text'"),
        (lambda: get_dataset("stdlib", TOKENIZER, seq_len=0), "seq_len=0"),
        (lambda: get_dataset("stdlib", TOKENIZER, seq_len=8, maxbytes=1), "'maxbytes'. Did you mean 'max_bytes'"),
        (lambda: get_dataset("random", TOKENIZER, "x", seq_len=8), "takes no path"),
        (lambda: get_dataset("random", TOKENIZER, seq_len=8, vocab=1), "option of dataset style 'random' 'vocab'"),
        (lambda: get_dataset("instruction", TOKENIZER, "x", seq_len=8, field="t"), "Known: preamble"),
        (lambda: get_dataset("text", TOKENIZER, seq_len=8), "needs a path"),
        (lambda: get_corpus("random"), "unknown dataset style that holds documents"),
        (lambda: get_corpus("stdlib", field="x"), "unknown option.*'field'"),
    ],
)
def test_unknown_word_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_too_little_text_for_a_row_names_file_and_numbers(files: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt holds 222 tokens.*seq_len=222 needs 223"):
        get_dataset("text", TOKENIZER, files / "a.txt", seq_len=222)
