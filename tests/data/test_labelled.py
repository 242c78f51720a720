from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.data.labelled import labelled_rows
from fms_parallel.errors import DataError
from fms_parallel.tokenizers import CharTokenizer

CHARS = CharTokenizer()
BOS, EOS, PAD = 2, 3, 0xFF


def rows_of(path: Path, seq_len: int = 8, **options: Any) -> Any:
    return labelled_rows(CHARS, path, seq_len=seq_len, padding_id=PAD, **options)


def written(folder: Path, name: str, *lines: object) -> Path:
    file = folder / name
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_texts_are_ended_cut_and_padded(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", {"text": "fine", "label": "good"}, {"text": "not so fine", "label": "bad"})
    rows = rows_of(file)
    assert rows.names == ("bad", "good") and len(rows) == 2 and rows.seq_len == 8
    ids, label = rows.row(0)
    assert ids.tolist() == [BOS, *b"fine", EOS, PAD, PAD] and label.tolist() == 1
    ids, label = rows.row(1)
    assert ids.tolist() == [BOS, *b"not so", EOS] and label.tolist() == 0
    with pytest.raises(IndexError):
        rows.row(2)


def test_whole_numbers_are_sorted_by_value(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", *({"text": "x", "label": number} for number in (10, 2, "1")))
    assert rows_of(file).names == ("1", "2", "10")


def test_given_names_fix_the_numbers(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", {"text": "x", "label": "b"})
    assert rows_of(file, names=("c", "b", "a")).row(0)[1].tolist() == 1
    with pytest.raises(DataError, match=r"a\.jsonl:1: unknown label 'b'"):
        rows_of(file, names=("a", "c"))


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_tables_with_quotes_and_line_breaks(tmp_path: Path, name: str, separator: str) -> None:
    file = tmp_path / name
    lines = (("review", "stars"), ('"a, b\nc"', "5"), ("d", "1"))
    file.write_text("\ufeff" + "\n".join(map(separator.join, lines)))
    rows = rows_of(file, text="review", label="stars")
    assert rows.names == ("1", "5")
    assert rows.row(0)[0].tolist()[:7] == [BOS, *b"a, b\nc"] and rows.row(0)[1].tolist() == 1


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("a.jsonl", [{"text": "x"}], r"a\.jsonl:1: no field 'label'"),
        ("a.jsonl", [{"text": "x", "label": "a"}, {"label": "a"}], r"a\.jsonl:2: no field 'text'"),
        ("a.jsonl", [{"text": " ", "label": "a"}], r"a\.jsonl:1: field 'text' is empty"),
        ("a.jsonl", [{"text": "x", "label": 0.5}], r"a\.jsonl:1: field 'label' must be text, not float"),
        ("a.jsonl", [{"text": "x", "label": True}], r"a\.jsonl:1: field 'label' must be text, not bool"),
        ("a.jsonl", ["[1]"], r"a\.jsonl:1: a JSON object"),
        ("a.jsonl", ["{"], r"a\.jsonl:1: not JSON"),
        ("a.jsonl", [], r"empty dataset: no texts in .*a\.jsonl"),
        ("a.csv", ["text,label", "x"], r"a\.csv:2: not as many columns as the header has \(2\)"),
        ("a.csv", ["text,label", "x,a,b"], r"a\.csv:2: not as many columns"),
        ("a.csv", ["words,label", "x,a"], r"a\.csv:2: no field 'text'. Fields here: words, label"),
        ("a.csv", ["text,label", '"x,a'], r"cannot read .*a\.csv as a table"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, name: str, lines: list[object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        rows_of(written(tmp_path, name, *lines))


def test_rows_too_short_for_anything_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"seq_len=2"):
        rows_of(written(tmp_path, "a.jsonl", {"text": "x", "label": "a"}), seq_len=2)
