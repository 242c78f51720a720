"""Documents to rows without padding: tokenised once, joined, kept flat, and cut into windows.

It knows tokens and their file; it knows nothing of where documents come from (`corpus.py`) or in which order rows
are read (`feed.py`).

    tokens  [bos] a a a [eos] [bos] b b b b b [eos] ...          flat, 2 or 4 bytes each, on disk or in memory
    row i   tokens[i*S : i*S + S + 1]: the first S are the inputs, the last S the labels
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fms_parallel.data.corpus import Corpus, Document
from fms_parallel.data.rows import next_token_row
from fms_parallel.errors import DataError
from fms_parallel.log import get_logger
from fms_parallel.tokenizers import Tokenizer

BLOCK = 1 << 20
"""Tokens that are in memory at once while a file of tokens is written."""

FORMAT = 1
"""Part of a cache file's name: raise it when the same corpus would be packed differently."""

_log = get_logger(__name__)


class PackedRows:
    """Rows cut from one flat run of tokens. Neighbouring rows share one token; a tail shorter than S+1 is left out."""

    def __init__(self, tokens: Tensor, seq_len: int, source: str) -> None:
        """`tokens`: integers `[T]`. `source` names them in errors. Raises DataError when T < S+1."""
        if len(tokens) < seq_len + 1:
            raise DataError(
                f"{source} holds {len(tokens)} tokens, but one row of seq_len={seq_len} needs {seq_len + 1}: add data "
                f"or use seq_len <= {max(len(tokens) - 1, 1)}."
            )
        self.tokens = tokens
        self.seq_len = seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Row `index` as `(input_ids [S], labels [S])`, int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.seq_len
        return next_token_row(self.tokens[start : start + self.seq_len + 1])


def load_tokens(corpus: Corpus, tokenizer: Tokenizer, cache_dir: str | Path | None = None) -> Tensor:
    """All tokens of `corpus` as one flat tensor `[T]`, uint16 or int32 by the size of the vocabulary.

    Every document gets the tokenizer's bos before and eos behind, where it has them. With `cache_dir` the tokens are
    a memory-mapped file whose name is a hash of the files (names, sizes, times), the tokenizer and the options: made
    on the first call, shared by every process and run after that. Several processes may make it at once, and one that
    is killed leaves no half file under that name. Without `cache_dir` the tokens are in memory.

    Raises DataError when there are none, when a document cannot be read, or when the cache cannot be written.
    """
    code = "H" if tokenizer.vocab_size <= 1 << 16 else "i"
    blocks = _token_blocks(corpus, tokenizer, code)
    if cache_dir is None:
        tokens = array(code)
        for block in blocks:
            tokens.extend(block)
        return torch.frombuffer(tokens, dtype=_DTYPES[code]) if tokens else _no_tokens(corpus)
    kind = str(_DTYPES[code]).removeprefix("torch.")
    file = Path(cache_dir) / f"tokens-{_key(corpus, tokenizer)}.{kind}"
    if not file.exists():
        _write_whole(file, blocks)
    count = file.stat().st_size // _DTYPES[code].itemsize
    if not count:
        return _no_tokens(corpus)
    return torch.from_file(str(file), shared=False, size=count, dtype=_DTYPES[code])


# torch has no arithmetic for uint32; int32 holds every vocabulary there is.
_DTYPES = {"H": torch.uint16, "i": torch.int32}


def _no_tokens(corpus: Corpus) -> Tensor:
    raise DataError(f"empty dataset: no text in {describe(corpus)}; name a file that holds some.")


def describe(corpus: Corpus) -> str:
    """The corpus in an error message."""
    first, *others = corpus.files
    return str(first) if not others else f"{len(corpus.files)} files ({first} ...)"


def _key(corpus: Corpus, tokenizer: Tokenizer) -> str:
    special = (tokenizer.bos_id, tokenizer.eos_id)
    parts = [FORMAT, sys.byteorder, tokenizer.fingerprint, special, corpus.identity()]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()[:32]


def _write_whole(file: Path, blocks: Iterable[array[int]]) -> None:
    """Write under another name, then rename: a reader sees all of the file or none of it."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    _log.info("tokenising into %s", file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            for block in blocks:
                block.tofile(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise DataError(
                f"cannot write tokens to cache_dir {str(file.parent)!r}: {error}; name another one."
            ) from None
        raise


def _token_blocks(corpus: Corpus, tokenizer: Tokenizer, code: str) -> Iterator[array[int]]:
    block = array(code)
    for document in corpus.documents():
        for ids in _document_ids(document, tokenizer):
            block.extend(ids)
            if len(block) >= BLOCK:
                yield block
                block = array(code)
    yield block


def _document_ids(document: Document, tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    """Ids of one document in pieces, between bos and eos; tokenised documents that have them keep the ones they have.

    A document without tokens gives nothing.
    """
    last: int | None = None
    for piece in document:
        ids = tokenizer.encode(piece) if isinstance(piece, str) else _checked(piece, tokenizer)
        if not ids:
            continue
        if last is None and tokenizer.bos_id is not None and ids[0] != tokenizer.bos_id:
            yield [tokenizer.bos_id]
        yield ids
        last = ids[-1]
    if last is not None and tokenizer.eos_id is not None and last != tokenizer.eos_id:
        yield [tokenizer.eos_id]


def _checked(ids: Sequence[int], tokenizer: Tokenizer) -> Sequence[int]:
    for worst in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= worst < tokenizer.vocab_size:
            raise DataError(
                f"a tokenised document holds id {worst}, but the tokenizer has {tokenizer.vocab_size} tokens: "
                "name the tokenizer that made these ids."
            )
    return ids
