"""Corpora: which files are read, in which order, and that their text is not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.data import corpus as corpus_module
from fms_parallel.data.corpus import Corpus, jsonl_corpus, stdlib_corpus, text_corpus
from fms_parallel.errors import DataError


def texts(corpus: Corpus) -> list[str]:
    return ["".join(map(str, document)) for document in corpus.documents()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.txt, a/z.txt, a.md, and what must be left out: hidden files and folders."""
    root = tmp_path / "corpus"
    for name in ("b.txt", "a/z.txt", "a.md", ".hidden.txt", ".git/config.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_folder_is_walked_sorted_without_hidden_files(folder: Path) -> None:
    assert texts(text_corpus(folder)) == ["a/z.txt", "a.md", "b.txt"]


@pytest.mark.parametrize("suffixes", [".txt", ".txt, .rst", [".txt"], (".rst", ".txt")])
def test_suffixes_choose_files(folder: Path, suffixes: Any) -> None:
    assert texts(text_corpus(folder, suffixes=suffixes)) == ["a/z.txt", "b.txt"]


def test_max_bytes_takes_whole_files_from_the_first_and_at_least_one(folder: Path) -> None:
    taken = {limit: len(text_corpus(folder, max_bytes=limit).files) for limit in (1, 10, 11, 15, 16, 99)}
    assert taken == {1: 1, 10: 1, 11: 2, 15: 2, 16: 3, 99: 3}


@pytest.mark.parametrize("piece", [1, 3, 1 << 18])
def test_text_is_read_unchanged_whatever_the_piece(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "PIECE", piece)
    text = "a\r\nb\rc\n\n\té🙂 no end of line" * 50
    (tmp_path / "t").write_bytes(text.encode())
    assert texts(text_corpus(tmp_path / "t")) == [text]


def test_pieces_end_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "PIECE", 10)
    (tmp_path / "t").write_text("seven..\n" * 20)
    assert all(piece.endswith("\n") for piece in text_corpus(tmp_path / "t").texts())


def test_encoding_is_an_option_and_a_wrong_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes("é".encode("latin-1"))
    assert texts(text_corpus(tmp_path / "t", encoding="latin-1")) == ["é"]
    for encoding, message in (("utf-8", "not utf-8 text"), ("utf-88", "utf-88")):
        with pytest.raises(DataError, match=message):
            texts(text_corpus(tmp_path / "t", encoding=encoding))


def test_identity_follows_files_options_and_changes(folder: Path) -> None:
    before = text_corpus(folder).identity()
    assert before == text_corpus(folder).identity()
    assert before != text_corpus(folder, encoding="latin-1").identity()
    assert before != text_corpus(folder, suffixes=".txt").identity()
    (folder / "a.md").write_text("longer")
    assert before != text_corpus(folder).identity()


# ---- the standard library -----------------------------------------------------------------------------------------


def test_stdlib_is_source_code_without_tests_and_packages() -> None:
    corpus = stdlib_corpus()
    parts = {part for file in corpus.files for part in file.parts[-3:]}
    assert {"dataclasses.py", "argparse.py", "asyncio"} <= parts
    assert not {"site-packages", "test", "tests", "lib2to3", "pydoc_data"} & parts
    assert sum(file.stat().st_size for file in corpus.files) > 5_000_000
    assert list(corpus.files) == sorted(corpus.files)


def test_stdlib_reads_as_utf8_to_the_end() -> None:
    corpus = stdlib_corpus()
    assert sum(len(text.encode()) for text in corpus.texts()) == sum(file.stat().st_size for file in corpus.files)


def test_stdlib_takes_no_path() -> None:
    with pytest.raises(DataError, match="takes no path"):
        stdlib_corpus("somewhere")


# ---- JSON lines ---------------------------------------------------------------------------------------------------


def test_jsonl_gives_one_document_per_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    wanted = ["one\ntwo", "", "dréi \u2028"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in wanted]
    file.write_bytes("\n\n".join(lines).encode())
    assert texts(jsonl_corpus(file)) == wanted


def test_jsonl_field_is_an_option(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": 1, "body": "b"}\n')
    assert texts(jsonl_corpus(tmp_path, field="body")) == ["b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"d\.jsonl:3: not JSON"),
        ("\udcff", r"d\.jsonl:3: not JSON"),
        ('{"body": "x", "id": 1}', r"d\.jsonl:3: no field 'text'. Fields here: body, id"),
        ('{"text": 3}', r"d\.jsonl:3: field 'text' must be text, not int"),
        ('["x"]', r"d\.jsonl:3: a JSON object .*not a list"),
    ],
)
def test_jsonl_names_file_and_line_of_a_bad_record(tmp_path: Path, line: str, message: str) -> None:
    content = f'{{"text": "fine"}}\n\n{line}\n'
    (tmp_path / "d.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        texts(jsonl_corpus(tmp_path))


# ---- nothing there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (None, {}, "'text' needs a path"),
        ("nowhere", {}, "no file or folder '.*nowhere'"),
        (".", {"suffixes": ".rst"}, r"no file that ends in \.rst"),
        (".", {"suffixes": [".a", ".b"]}, r"ends in \.a or \.b"),
        ("empty", {}, "holds no file for"),
        (".", {"max_bytes": 0}, "max_bytes=0"),
    ],
)
def test_nothing_to_read_is_refused(folder: Path, path: str | None, options: dict[str, Any], message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        text_corpus(None if path is None else folder / path, **options)
