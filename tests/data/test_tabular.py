"""Arrow and Parquet columns against the values written (the reading needs pyarrow)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.data import tabular
from fms_parallel.data.corpus import Corpus
from fms_parallel.data.tabular import arrow_corpus, parquet_corpus
from fms_parallel.errors import DataError

TEXTS = [f"row {number} é\n" for number in range(700)]


def write(kind: str, file: Path, columns: dict[str, Any]) -> Path:
    """One file in three record batches (or row groups)."""
    pa = pytest.importorskip("pyarrow")
    table = pa.table(columns)
    step = -(-max(len(table), 1) // 3)
    if kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, file, row_group_size=step)
        return file
    make = {"arrow file": pa.ipc.new_file, "arrow stream": pa.ipc.new_stream}[kind]
    with make(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=step)
    return file


KINDS: list[tuple[str, Callable[..., Corpus]]] = [
    ("arrow file", arrow_corpus),
    ("arrow stream", arrow_corpus),
    ("parquet", parquet_corpus),
]


def documents(corpus: Corpus) -> list[Any]:
    return [piece for document in corpus.documents() for piece in document]


@pytest.mark.parametrize(("kind", "corpus"), KINDS)
def test_text_column_gives_the_values_written(tmp_path: Path, kind: str, corpus: Callable[..., Corpus]) -> None:
    file = write(kind, tmp_path / "data", {"id": list(range(700)), "text": TEXTS})
    assert documents(corpus(file)) == TEXTS


@pytest.mark.parametrize(("kind", "corpus"), KINDS)
def test_token_column_gives_the_lists_written_without_nulls(
    tmp_path: Path, kind: str, corpus: Callable[..., Corpus]
) -> None:
    file = write(kind, tmp_path / "data", {"input_ids": [[1, 2], None, [], [3]]})
    assert documents(corpus(file, column="input_ids")) == [[1, 2], [], [3]]


def test_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    write("parquet", tmp_path / "b.parquet", {"text": ["b"]})
    write("parquet", tmp_path / "a.parquet", {"text": ["a"]})
    (tmp_path / "readme.txt").write_text("no table")
    assert documents(parquet_corpus(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(("kind", "corpus"), KINDS)
def test_rows_become_python_objects_a_batch_at_a_time(
    tmp_path: Path, kind: str, corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first document asks for one slice of its column, not for all of it."""
    file = write(kind, tmp_path / "data", {"text": TEXTS})
    sizes: list[int] = []
    monkeypatch.setattr(tabular, "BATCH_ROWS", 50)
    rows = tabular._BATCHES[kind.split()[0]]

    class Spy:
        def __init__(self, column: Any) -> None:
            self.column, self.type = column, column.type

        def __len__(self) -> int:
            return len(self.column)

        def slice(self, start: int, length: int) -> Any:
            part = self.column.slice(start, length)
            sizes.append(len(part))
            return part

    spied = {kind.split()[0]: lambda path, column: map(Spy, rows(path, column))}
    monkeypatch.setattr(tabular, "_BATCHES", spied)
    next(iter(corpus(file).documents()))
    assert sizes == [50]


@pytest.mark.parametrize(("kind", "corpus"), KINDS)
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("txt", r"unknown column 'txt'. Did you mean 'text'\?.*number, text"),
        ("number", "column 'number' is double; text or lists"),
    ],
)
def test_column_that_does_not_fit_is_refused(
    tmp_path: Path, kind: str, corpus: Callable[..., Corpus], column: str, message: str
) -> None:
    file = write(kind, tmp_path / "data", {"text": ["a"], "number": [0.5]})
    with pytest.raises(DataError, match=message):
        documents(corpus(file, column=column))


@pytest.mark.parametrize(("style", "corpus"), [("arrow", arrow_corpus), ("parquet", parquet_corpus)])
@pytest.mark.parametrize("content", [b"", b"hello, this is no table", b"ARROW1\0\0 cut", b"PAR1 cut"])
def test_broken_file_is_refused_by_name(
    tmp_path: Path, style: str, corpus: Callable[..., Corpus], content: bytes
) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read .*data as {style}"):
        documents(corpus(tmp_path / "data"))


def test_missing_extra_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"fms_parallel\[data\]"):
        parquet_corpus(tmp_path)
