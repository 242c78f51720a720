"""Instruction rows against the row laid out by hand: shifted, prompt masked, padded, also when cut."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.data.instruction import InstructionRows, format_prompt, instruction_rows
from fms_parallel.data.rows import IGNORE
from fms_parallel.errors import DataError
from fms_parallel.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer()
RECORDS: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "hi é\n"},
    {"instruction": "No input", "output": "ok"},
    {"instruction": "Null input", "input": None, "output": "ok"},
]


def rows_of(tmp_path: Path, records: list[Any], seq_len: int = 256, **options: Any) -> InstructionRows:
    (tmp_path / "data.json").write_text(json.dumps(records))
    return instruction_rows(TOKENIZER, tmp_path / "data.json", seq_len=seq_len, **options)


def by_hand(record: dict[str, Any], seq_len: int) -> tuple[list[int], list[int]]:
    """Position by position: what is seen there, and what is wanted there."""
    prompt = TOKENIZER.encode(format_prompt(record["instruction"], record.get("input") or ""), bos=True)
    tokens = prompt + TOKENIZER.encode(record["output"], eos=True)
    input_ids, labels = [], []
    for position in range(seq_len):
        after = position + 1
        input_ids.append(tokens[position] if position < len(tokens) else TOKENIZER.pad_id)
        labels.append(tokens[after] if len(prompt) <= after < len(tokens) else IGNORE)
    if len(tokens) <= seq_len:
        assert input_ids[len(tokens) - 1] == TOKENIZER.eos_id
    return input_ids, labels


def test_rows_match_the_layout_by_hand(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, RECORDS)
    assert len(rows) == len(RECORDS)
    for index, record in enumerate(RECORDS):
        input_ids, labels = rows.row(index)
        assert (input_ids.tolist(), labels.tolist()) == by_hand(record, 256)
        assert input_ids.dtype == labels.dtype == torch.int64


def test_every_length_of_cut_keeps_labels_shifted_and_the_prompt_masked(tmp_path: Path) -> None:
    record = {"instruction": "Count.", "output": "1 2 3 4 5"}
    prompt = len(TOKENIZER.encode(format_prompt("Count."), bos=True))
    for seq_len in range(prompt, prompt + 12):  # from one answer token to more room than needed
        input_ids, labels = rows_of(tmp_path, [record], seq_len).row(0)
        assert (input_ids.tolist(), labels.tolist()) == by_hand(record, seq_len)
        assert (labels != IGNORE).sum() == min(seq_len - prompt + 1, len("1 2 3 4 5") + 1)


def test_answers_that_are_cut_off_entirely_are_dropped_with_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"instruction": "x" * 100, "output": "never seen"}
    with caplog.at_level(logging.WARNING, "fms_parallel"):
        rows = rows_of(tmp_path, [long, RECORDS[1], long], 80)
    assert len(rows) == 1 and rows.dropped == 2
    assert rows.row(0)[0].tolist() == by_hand(RECORDS[1], 80)[0]
    assert "dropped 2 of 3 examples" in caplog.text and "seq_len=80" in caplog.text


def test_dropping_every_example_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"4 examples.*seq_len=4"):
        rows_of(tmp_path, RECORDS, 4)


def test_empty_answer_still_teaches_to_stop(tmp_path: Path) -> None:
    _, labels = rows_of(tmp_path, [{"instruction": "Nothing.", "output": ""}]).row(0)
    assert labels[labels != IGNORE].tolist() == [TOKENIZER.eos_id]


def test_json_list_json_lines_and_folder_give_the_same_rows(tmp_path: Path) -> None:
    wanted = rows_of(tmp_path, RECORDS)
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "a.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS[:2]))
    (lines / "b.json").write_bytes(b"\xef\xbb\xbf\n " + json.dumps(RECORDS[2:], indent=1).encode())
    found = instruction_rows(TOKENIZER, lines, seq_len=256)
    assert len(found) == len(wanted)
    for index in range(len(wanted)):
        assert all(map(torch.equal, found.row(index), wanted.row(index)))


def test_preamble_stands_before_the_prompt_that_generation_uses(tmp_path: Path) -> None:
    input_ids, labels = rows_of(tmp_path, RECORDS[:1], preamble="Be brief.\n").row(0)
    start = int((labels != IGNORE).nonzero()[0])
    assert TOKENIZER.decode(input_ids[: start + 1]) == format_prompt("Add.", "1 2", "Be brief.\n")
    assert format_prompt("Add.", "1 2", "Be brief.\n").startswith("Be brief.\n### Instruction:\nAdd.")


def test_row_outside_is_an_index_error(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, RECORDS)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            rows.row(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no examples"),
        ("", "no examples"),
        ('[\n{"instruction": "x",\n]', r"data\.json:3: not JSON"),
        ('{"instruction": "x", "output": "y"}\n{"instruction"', r"data\.json:2: not JSON"),
        ('[{"instruction": "x", "output": "y"}, {"instruction": "x"}]', "example 2: no field 'output'"),
        ('[["x"]]', "example 1: a JSON object"),
        ('{"instruction": "x", "input": 3, "output": "y"}', r"data\.json:1: field 'input' must be text"),
    ],
)
def test_broken_file_names_the_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(DataError, match=message):
        instruction_rows(TOKENIZER, tmp_path / "data.json", seq_len=64)
