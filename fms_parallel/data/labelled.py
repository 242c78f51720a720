"""Texts with a class each, one per row: JSON lines or CSV, tokenised, cut and padded.

    {"text": "fine", "label": "good"}  ->  input_ids [bos] f i n e [eos] . . .   labels 1   (classes: bad, good)

It knows such files and how a record becomes a row; it knows nothing of batches or models.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fms_parallel.data.corpus import find_files, json_lines, text_field
from fms_parallel.errors import DataError, unknown
from fms_parallel.log import get_logger
from fms_parallel.tokenizers import Tokenizer

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Suffix -> what stands between columns; other files hold JSON lines."""

_log = get_logger(__name__)


class LabelledRows:
    """Texts in one flat array, each cut to S tokens.

    Attributes:
        names: of the classes, in the order of their numbers.
    """

    def __init__(self, seq_len: int, padding_id: int, names: Sequence[str]) -> None:
        self.seq_len, self.padding_id, self.names = seq_len, padding_id, tuple(names)
        self._tokens, self._ends, self._classes = array("i"), array("q", [0]), array("i")

    def add(self, tokens: Sequence[int], label: int) -> None:
        """Keep one text of at most S tokens."""
        self._tokens.extend(tokens)
        self._ends.append(len(self._tokens))
        self._classes.append(label)

    def __len__(self) -> int:
        return len(self._classes)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Text `index` as `(input_ids [S], label)`, int64; padded at the end. The label is a scalar."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        tokens = torch.tensor(self._tokens[self._ends[index] : self._ends[index + 1]], dtype=torch.int64, device="cpu")
        input_ids = torch.full((self.seq_len,), self.padding_id, dtype=torch.int64, device="cpu")
        input_ids[: len(tokens)] = tokens
        return input_ids, torch.tensor(self._classes[index], dtype=torch.int64, device="cpu")


def labelled_rows(
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    seq_len: int,
    padding_id: int,
    text: str = "text",
    label: str = "label",
    names: Sequence[str] | None = None,
) -> LabelledRows:
    """Rows of a JSON-lines file (objects), or of a `.csv` or `.tsv` file with a header.

    Args:
        text, label: the fields. A label is text or a whole number.
        names: the classes, in the order of their numbers; None: those of the file, sorted.
    Raises:
        DataError: with file and line for a record that is none, a label that is not among `names`, or no text at all.
    """
    if seq_len < 3:
        raise DataError(f"seq_len={seq_len}: a text with its first and last token needs 3 or more.")
    found = read_labelled(path, text, label)
    rows = LabelledRows(seq_len, padding_id, _sorted({name for _, name, _ in found}) if names is None else names)
    numbers = {name: number for number, name in enumerate(rows.names)}
    cut = 0
    for content, name, place in found:
        if name not in numbers:
            raise DataError(f"{place}: {unknown('label', name, numbers)}")
        tokens = tokenizer.encode(content, bos=tokenizer.bos_id is not None, eos=tokenizer.eos_id is not None)
        cut += len(tokens) > seq_len
        rows.add(_shortened(tokens, seq_len, tokenizer.eos_id), numbers[name])
    if cut:
        _log.info("%s: cut %d of %d texts at seq_len=%d", path, cut, len(rows), seq_len)
    return rows


def read_labelled(path: str | Path, text: str = "text", label: str = "label") -> list[tuple[str, str, str]]:
    """(text, label, file:line) of every record; arguments and errors as of `labelled_rows`."""
    files = find_files(path, "labelled")
    found = [_record(record, text, label, place) for file in files for place, record in _read(file)]
    if not found:
        raise DataError(f"empty dataset: no texts in {path}; name a file that holds some.")
    return found


def _shortened(tokens: list[int], seq_len: int, eos: int | None) -> list[int]:
    """The first S tokens; the last of them is eos, where texts end in it."""
    if len(tokens) <= seq_len:
        return tokens
    return tokens[:seq_len] if eos is None else [*tokens[: seq_len - 1], eos]


def _sorted(names: set[str]) -> list[str]:
    """Numbers by value, so that classes 0 .. C-1 keep their numbers; otherwise by name."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _record(record: Any, text: str, label: str, place: str) -> tuple[str, str, str]:
    """(text, label, place) of one record."""
    content = text_field(record, text, place)
    if not content.strip():
        raise DataError(f"{place}: field {text!r} is empty: there is nothing to classify.")
    if isinstance(record.get(label), int) and not isinstance(record[label], bool):
        return content, str(record[label]), place
    return content, text_field(record, label, place), place


def _read(file: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, record) of every record."""
    separator = SEPARATORS.get(file.suffix)
    return json_lines(file) if separator is None else _table(file, separator)


def _table(file: Path, separator: str) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as content:
            reader = csv.DictReader(content, delimiter=separator, strict=True)
            for record in reader:
                place = f"{file}:{reader.line_num}"
                if None in record or None in record.values():
                    raise DataError(f"{place}: not as many columns as the header has ({len(reader.fieldnames or ())}).")
                yield place, record
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file} as a table: {error}") from None
