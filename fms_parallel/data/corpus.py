"""Where text comes from: files and folders, the installed standard library, JSON lines.

A corpus is a sorted list of files and a way to read one of them document by document. It knows files; it knows
nothing of tokenizers, tokens or rows (`packing.py`). Text is never changed: line ends stay as they are.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fms_parallel.errors import DataError

Document = Iterable[str | Sequence[int]]
"""One document in consecutive pieces, text or tokens; read once, and before the next document is asked for."""

PIECE = 1 << 16
"""Characters of a file that are tokenised at once; files are cut at line ends where they have any. A foreign
sentencepiece model that puts a space before every text does so before every piece."""


@dataclass(frozen=True)
class Corpus:
    """Documents on disk.

    Attributes:
        style: which reader with which options; two corpora with equal style and files hold the same documents.
        files: what is read, in order.
        read: the documents of one file.
    """

    style: str
    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[Document]]

    def documents(self) -> Iterator[Document]:
        """Every document of every file, in order."""
        for file in self.files:
            yield from self.read(file)

    def texts(self) -> Iterator[str]:
        """The text of every document, in pieces: what a tokenizer is trained on. DataError where it is tokens."""
        for document in self.documents():
            for piece in document:
                if not isinstance(piece, str):
                    raise DataError(f"{self.style} holds tokens, not text: a tokenizer cannot be trained on it.")
                yield piece

    def identity(self) -> list[object]:
        """What tells this corpus from another or from a later state of the same files: part of a cache's key."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        return [self.style, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]


# ---- the styles -----------------------------------------------------------------------------------------------------


def text_corpus(
    path: str | Path | None,
    *,
    suffixes: str | Sequence[str] | None = None,
    encoding: str = "utf-8",
    max_bytes: int | None = None,
) -> Corpus:
    """A text file, or every file of a folder; one document per file.

    Args:
        path: the file or folder. Hidden files and folders are left out, links to folders are not followed.
        suffixes: which files of a folder, for example `".txt,.md"` or `[".py"]`; None takes all.
        encoding: of every file; a file that is not in it is an error.
        max_bytes: take files from the first on while their sizes add up to at most this (at least one file).

    Raises DataError when nothing is there.
    """
    files = find_files(path, "text", suffixes)
    return Corpus(f"text encoding={encoding}", _first_bytes(files, max_bytes), partial(_text_file, encoding=encoding))


_NOT_SOURCE = frozenset(
    # Installed by hand, or tests, or tables that a program wrote: no source code of the library itself.
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "__pycache__",
    )
)


def stdlib_corpus(path: str | Path | None = None, *, max_bytes: int | None = None) -> Corpus:
    """The source code of the installed Python standard library, one document per module, sorted by name.

    Real text that is on every machine and the same every time on one machine; about 10 MB. `max_bytes` as for text.
    Raises DataError when a path is given (there is nothing to choose) or the library is not installed as source.
    """
    if path is not None:
        raise DataError(
            f"the stdlib style finds its own files and takes no path; drop {str(path)!r} or use style 'text'."
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in _walk(root, _NOT_SOURCE)
        # _sysconfigdata*: build settings, generated, different on every machine.
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise DataError(f"no .py files under {root}: this Python has no library source; use style 'text' with a path.")
    return Corpus("stdlib", _first_bytes(files, max_bytes), partial(_text_file, encoding="utf-8"))


def jsonl_corpus(
    path: str | Path | None,
    *,
    field: str = "text",
    suffixes: str | Sequence[str] | None = (".jsonl",),
    max_bytes: int | None = None,
) -> Corpus:
    """JSON lines: each line an object whose `field` is one document's text.

    `path`, `suffixes` and `max_bytes` as for `text_corpus`. Reading raises DataError with file and line for a line
    that is not such an object.
    """
    files = find_files(path, "jsonl", suffixes)
    return Corpus(f"jsonl field={field}", _first_bytes(files, max_bytes), partial(_jsonl_file, field=field))


# ---- finding files --------------------------------------------------------------------------------------------------


def find_files(path: str | Path | None, style: str, suffixes: str | Sequence[str] | None = None) -> list[Path]:
    """The file `path`, or the files of the folder `path` that end in one of `suffixes`, sorted.

    Raises DataError when there is no path, or nothing there.
    """
    if path is None:
        raise DataError(f"dataset style {style!r} needs a path to a file or folder.")
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"no file or folder {str(path)!r} for dataset style {style!r}; check the path.")
    wanted = tuple(suffixes.replace(" ", "").split(",") if isinstance(suffixes, str) else suffixes or [""])
    files = [file for file in _walk(root) if file.name.endswith(wanted)]
    if not files:
        kind = f"file that ends in {' or '.join(wanted)}" if any(wanted) else "file"
        raise DataError(
            f"folder {str(path)!r} holds no {kind} for dataset style {style!r}; name the file or its suffixes."
        )
    return files


def _walk(root: Path, without: frozenset[str] = frozenset()) -> list[Path]:
    """Files below `root` sorted by their path's parts, without hidden ones and folders named in `without`."""
    found: list[Path] = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _first_bytes(files: list[Path], max_bytes: int | None) -> tuple[Path, ...]:
    if max_bytes is None:
        return tuple(files)
    if max_bytes < 1:
        raise DataError(f"max_bytes={max_bytes}: must be >= 1; drop it to take everything.")
    total = 0
    taken: list[Path] = []
    for file in files:
        total += file.stat().st_size
        if taken and total > max_bytes:
            break
        taken.append(file)
    return tuple(taken)


# ---- reading files --------------------------------------------------------------------------------------------------


def _text_file(path: Path, encoding: str) -> Iterator[Document]:
    """The one document of a text file; an empty file is a document without pieces."""
    yield _pieces(path, encoding)


def _pieces(path: Path, encoding: str) -> Iterator[str]:
    try:
        with open(path, encoding=encoding, newline="") as file:  # newline="": line ends as they are
            while piece := file.read(PIECE):
                # To the end of the line, since tokens seldom span lines; bounded, since a file may be one line.
                yield piece + file.readline(PIECE)
    except (OSError, LookupError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not {encoding} text ({error}); name its encoding, or leave it out by suffixes."
        ) from None


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """`(file:line, value)` of every non-blank line. Raises DataError with file and line for a line that is not JSON."""
    try:
        with open(path, "rb") as file:  # bytes: only \n ends a line, and a bad character has a line number
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}); each line must hold one whole value.") from None


def _jsonl_file(path: Path, field: str) -> Iterator[Document]:
    for place, record in json_lines(path):
        yield [text_field(record, field, place)]


def text_field(record: Any, field: str, place: str) -> str:
    """`record[field]`, which must be text. Raises DataError that names `place` and the fields there are."""
    if not isinstance(record, dict):
        raise DataError(f"{place}: a JSON object with a field {field!r} is needed, not a {type(record).__name__}.")
    if field not in record:
        raise DataError(f"{place}: no field {field!r}. Fields here: {', '.join(record) or 'none'}.")
    if not isinstance(record[field], str):
        raise DataError(f"{place}: field {field!r} must be text, not {type(record[field]).__name__}.")
    text: str = record[field]
    return text
