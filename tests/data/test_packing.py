"""Packing: rows against tokens joined by hand, and a cache file that is whole or not there."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fms_parallel.data import packing
from fms_parallel.data.corpus import Corpus, Document, text_corpus
from fms_parallel.data.packing import PackedRows, load_tokens
from fms_parallel.errors import DataError
from fms_parallel.tokenizers import CharTokenizer, Tokenizer


class CodePoints(Tokenizer):
    """One id per code point, with whatever specials a test wants."""

    def __init__(self, vocab_size: int = 128, bos_id: int | None = None, eos_id: int | None = None) -> None:
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id

    @property
    def fingerprint(self) -> str:
        return f"code points {self.vocab_size}"

    def _encode(self, text: str) -> list[int]:
        return [ord(letter) % self.vocab_size for letter in text]

    def _decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def made_of(*documents: Document, file: Path = Path(__file__)) -> Corpus:
    def read(_: Path) -> Iterator[Document]:
        yield from documents

    return Corpus("made in a test", (file,), read)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    root.mkdir()
    for name in "abc":
        (root / name).write_text(f"{name} é\n" * 50)
    (root / "empty").write_text("")
    return root


@pytest.mark.parametrize(
    ("bos", "eos", "wanted"),
    [
        (None, None, [97, 98, 99, 100]),
        (None, 2, [97, 98, 2, 99, 100, 2]),
        (1, None, [1, 97, 98, 1, 99, 100]),
        (1, 2, [1, 97, 98, 2, 1, 99, 100, 2]),
    ],
)
def test_documents_are_joined_by_the_specials_the_tokenizer_has(
    bos: int | None, eos: int | None, wanted: list[int]
) -> None:
    corpus = made_of(["a", "", "b"], [], [""], ["cd"])
    assert load_tokens(corpus, CodePoints(bos_id=bos, eos_id=eos)).tolist() == wanted


def test_tokenised_documents_keep_the_specials_they_have() -> None:
    corpus = made_of([[7, 8]], [[1, 7], [8]], [[7], [8, 2]], [[1, 2]], [[]])
    wanted = [1, 7, 8, 2] * 3 + [1, 2]
    assert load_tokens(corpus, CodePoints(bos_id=1, eos_id=2)).tolist() == wanted


@pytest.mark.parametrize("token", [-1, 128, 70_000])
def test_tokenised_document_of_another_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(DataError, match=f"id {token}, but the tokenizer has 128"):
        load_tokens(made_of([[5, token]]), CodePoints())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("vocab", "dtype"), [(1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)])
def test_largest_id_survives_storage(vocab: int, dtype: torch.dtype, cached: bool, tmp_path: Path) -> None:
    corpus = made_of([[0, vocab - 1, 1]])
    tokens = load_tokens(corpus, CodePoints(vocab), tmp_path if cached else None)
    assert tokens.dtype == dtype
    assert tokens.to(torch.int64).tolist() == [0, vocab - 1, 1]


def test_rows_are_windows_of_the_joined_text(folder: Path) -> None:
    tokenizer = CharTokenizer()
    flat = [token for name in "abc" for token in tokenizer.encode(f"{name} é\n" * 50, bos=True, eos=True)]
    rows = PackedRows(load_tokens(text_corpus(folder), tokenizer), 7, "test")
    assert len(rows) == (len(flat) - 1) // 7
    for index in range(len(rows)):
        input_ids, labels = rows.row(index)
        assert input_ids.dtype == labels.dtype == torch.int64
        assert input_ids.tolist() == flat[7 * index : 7 * index + 7]
        assert labels.tolist() == flat[7 * index + 1 : 7 * index + 8]


@pytest.mark.parametrize(("count", "rows"), [(8, 1), (9, 1), (14, 1), (15, 2), (16, 2)])
def test_every_label_fits_and_none_is_asked_twice(count: int, rows: int) -> None:
    packed = PackedRows(torch.arange(count), 7, "test")
    labels = [label for index in range(len(packed)) for label in packed.row(index)[1].tolist()]
    assert len(packed) == rows
    assert labels == list(range(1, 7 * rows + 1))


def test_row_outside_is_an_index_error() -> None:
    packed = PackedRows(torch.arange(8), 7, "test")
    for index in (-1, 1):
        with pytest.raises(IndexError):
            packed.row(index)


def test_too_few_tokens_for_a_row_names_both_numbers() -> None:
    with pytest.raises(DataError, match=r"a\.txt holds 7 tokens.*seq_len=7 needs 8.*seq_len <= 6"):
        PackedRows(torch.arange(7), 7, "a.txt")


@pytest.mark.parametrize("cached", [False, True])
def test_corpus_without_text_is_refused_every_time(cached: bool, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="empty dataset"):
            load_tokens(made_of([], [""]), CharTokenizer(), tmp_path if cached else None)


# ---- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def plain(folder: Path) -> torch.Tensor:
    """The tokens of `folder`, uncached."""
    return load_tokens(text_corpus(folder), CharTokenizer()).to(torch.int64)


def test_cache_gives_the_same_tokens_and_is_read_again(folder: Path, cache: Path, plain: torch.Tensor) -> None:
    first = load_tokens(text_corpus(folder), CharTokenizer(), cache)
    (file,) = cache.iterdir()
    unread = Corpus(text_corpus(folder).style, text_corpus(folder).files, read=None)  # type: ignore[arg-type]
    again = load_tokens(unread, CharTokenizer(), cache)
    assert torch.equal(first.to(torch.int64), plain) and torch.equal(again.to(torch.int64), plain)
    assert file.stat().st_size == 2 * len(plain)


def test_blocks_join_without_a_seam(
    folder: Path, cache: Path, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK", 100)
    assert torch.equal(load_tokens(text_corpus(folder), CharTokenizer(), cache).to(torch.int64), plain)


def test_cache_is_not_used_after_a_change(folder: Path, cache: Path) -> None:
    """Another tokenizer, other options, a file of another size or merely of another time: each has its own tokens."""
    before = load_tokens(text_corpus(folder), CharTokenizer(), cache)
    load_tokens(text_corpus(folder), CodePoints(300), cache)
    load_tokens(text_corpus(folder), CodePoints(300, eos_id=0), cache)
    load_tokens(text_corpus(folder, suffixes="a"), CharTokenizer(), cache)
    assert len(list(cache.iterdir())) == 4
    (folder / "a").write_text("A" + (folder / "a").read_text()[1:])
    os.utime(folder / "a", ns=(0, 0))
    after = load_tokens(text_corpus(folder), CharTokenizer(), cache)
    assert [int(before[1]), int(after[1])] == [ord("a"), ord("A")]


def test_several_makers_at_once_agree_and_leave_one_file(folder: Path, cache: Path, plain: torch.Tensor) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: load_tokens(text_corpus(folder), CharTokenizer(), cache), range(8)))
    assert all(torch.equal(tokens.to(torch.int64), plain) for tokens in made)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_maker_that_stops_half_way_leaves_nothing(
    folder: Path, cache: Path, plain: torch.Tensor, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK", 10)
    whole = text_corpus(folder)

    def read(file: Path) -> Iterator[Document]:
        if file.name == "b":
            assert len(list(cache.iterdir())) == 1  # its partial file
            raise error
        yield from whole.read(file)

    with pytest.raises(error):
        load_tokens(Corpus(whole.style, whole.files, read), CharTokenizer(), cache)
    assert not list(cache.iterdir())
    assert torch.equal(load_tokens(whole, CharTokenizer(), cache).to(torch.int64), plain)


def test_partial_file_of_a_killed_maker_is_never_read(folder: Path, cache: Path, plain: torch.Tensor) -> None:
    load_tokens(text_corpus(folder), CharTokenizer(), cache)
    (file,) = cache.iterdir()
    file.rename(cache / f".{file.name}.0123.tmp")
    os.truncate(cache / f".{file.name}.0123.tmp", 11)
    assert torch.equal(load_tokens(text_corpus(folder), CharTokenizer(), cache).to(torch.int64), plain)


def test_cache_dir_that_is_a_file_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(DataError, match=r"cache_dir '.*/a'"):
        load_tokens(text_corpus(folder), CharTokenizer(), folder / "a")


def test_memory_stays_small_while_a_large_corpus_is_tokenised(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK", 1 << 16)
    (tmp_path / "large").write_bytes(b"some more text\n" * (1 << 18))
    tracemalloc.start()
    tokens = load_tokens(text_corpus(tmp_path / "large"), CharTokenizer(), cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tokens) > 3_900_000
    assert peak < len(tokens) * tokens.itemsize / 2
