"""Datasets by name: `get_dataset` finds the style, checks its options, and builds rows.

It knows names and options; how each style reads its files is in the file of that style. To add one: a function
`(tokenizer, path, *, seq_len, cache_dir, **its options) -> RowDataset`, and `register_dataset(name, function)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fms_parallel.data.corpus import Corpus, jsonl_corpus, stdlib_corpus, text_corpus
from fms_parallel.data.instruction import instruction_rows
from fms_parallel.data.packing import PackedRows, describe, load_tokens
from fms_parallel.data.rows import RandomRows, RowDataset
from fms_parallel.data.tabular import arrow_corpus, parquet_corpus
from fms_parallel.errors import DataError, unknown
from fms_parallel.tokenizers import Tokenizer

Builder = Callable[..., RowDataset]
"""`(tokenizer, path, *, seq_len, cache_dir, **options) -> RowDataset`."""

CORPORA: Mapping[str, Callable[..., Corpus]] = {
    "arrow": arrow_corpus,
    "jsonl": jsonl_corpus,
    "parquet": parquet_corpus,
    "stdlib": stdlib_corpus,
    "text": text_corpus,
}
"""The styles whose documents are packed: name -> `(path, **options) -> Corpus`."""


def get_dataset(
    name: str,
    tokenizer: Tokenizer,
    path: str | Path | None = None,
    *,
    seq_len: int,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> RowDataset:
    """The dataset of style `name`.

    Args:
        name: `text`, `stdlib`, `jsonl`, `arrow`, `parquet` (packed), `instruction` (one example per row), `random`,
            or a registered one.
        tokenizer: makes the ids; see `check_vocab` for whether a model fits it.
        path: file or folder, for the styles that read one.
        seq_len: S, tokens of a row.
        cache_dir: where packed tokens are kept from run to run; None keeps them in memory.
        options: of that style, see its builder: `text_corpus`, `jsonl_corpus`, `instruction_rows`, ...

    Raises DataError for an unknown name or option, and for data that is missing, broken, or too little for one row.
    """
    if name not in _BUILDERS:
        raise DataError(unknown("dataset style", name, _BUILDERS))
    if seq_len < 1:
        raise DataError(f"seq_len={seq_len}: a row has at least 1 token.")
    _check_options(_BUILDERS[name], options, name)
    return _BUILDERS[name](tokenizer, path, seq_len=seq_len, cache_dir=cache_dir, **options)


def get_corpus(name: str, path: str | Path | None = None, **options: Any) -> Corpus:
    """The documents behind a packed style, before any tokenizer: `.texts()` is what one is trained on.

    Raises DataError for a name or option that is not one of those styles'.
    """
    if name not in CORPORA:
        raise DataError(unknown("dataset style that holds documents", name, CORPORA))
    _check_options(CORPORA[name], options, name)
    return CORPORA[name](path, **options)


def register_dataset(name: str, builder: Builder) -> None:
    """Let `get_dataset` know `builder` as `name`. Raises DataError when the name is taken by another one."""
    if _BUILDERS.setdefault(name, builder) is not builder:
        raise DataError(f"dataset style {name!r} is already registered; take another name.")


def list_datasets() -> list[str]:
    """Names that `get_dataset` knows, sorted."""
    return sorted(_BUILDERS)


def _check_options(function: Callable[..., object], options: Mapping[str, Any], name: str) -> None:
    """Refuse a word that `function` does not take; one that takes any word checks for itself."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"seq_len", "cache_dir"}
    for word in options:
        if word not in known:
            raise DataError(unknown(f"option of dataset style {name!r}", word, known))


def _packed(name: str) -> Builder:
    def build(
        tokenizer: Tokenizer, path: str | Path | None, *, seq_len: int, cache_dir: str | Path | None, **options: Any
    ) -> RowDataset:
        corpus = get_corpus(name, path, **options)
        return PackedRows(load_tokens(corpus, tokenizer, cache_dir), seq_len, describe(corpus))

    return build


def _random(
    tokenizer: Tokenizer,
    path: str | Path | None,
    *,
    seq_len: int,
    cache_dir: str | Path | None,
    vocab_size: int | None = None,
    rows: int = 1 << 16,
    seed: int = 0,
) -> RowDataset:
    """Uniform random ids of `vocab_size` (None: the tokenizer's); there is nothing to read and nothing to keep."""
    if path is not None:
        raise DataError(f"the random style reads nothing and takes no path; drop {str(path)!r}.")
    return RandomRows(seq_len, tokenizer.vocab_size if vocab_size is None else vocab_size, rows, seed)


# The one registry of the room: filled here, and by `register_dataset`.
_BUILDERS: dict[str, Builder] = {
    **{name: _packed(name) for name in CORPORA},
    "instruction": instruction_rows,
    "random": _random,
}
