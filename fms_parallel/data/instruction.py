"""Instruction tuning: one example per row, the prompt masked, the answer learned.

It knows alpaca-style records and how one becomes a row; it knows nothing of batches or shuffling.

    tokens   p p p p a a a e          p prompt, a answer, e eos          (S = 9)
    input    p p p p a a a . .        . padding
    labels   - - - a a a e - -        - IGNORE: the last prompt position already asks for the first answer token
"""

from __future__ import annotations

import json
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fms_parallel.data.corpus import find_files, json_lines, text_field
from fms_parallel.data.rows import IGNORE
from fms_parallel.errors import DataError
from fms_parallel.log import get_logger
from fms_parallel.tokenizers import Tokenizer

_log = get_logger(__name__)


def format_prompt(instruction: str, context: str = "", preamble: str = "") -> str:
    """The prompt that a model tuned by this style was shown; generation must use the same words."""
    sections = [("Instruction", instruction), ("Input", context)] if context else [("Instruction", instruction)]
    body = "".join(f"### {title}:\n{text}\n\n" for title, text in sections)
    return f"{preamble}{body}### Response:\n"


def instruction_rows(
    tokenizer: Tokenizer,
    path: str | Path | None,
    *,
    seq_len: int,
    cache_dir: str | Path | None = None,
    preamble: str = "",
) -> InstructionRows:
    """Rows of an alpaca-style file: a JSON list or JSON lines of objects with instruction, input (optional), output.

    Args:
        preamble: put before every prompt, as `format_prompt` does.
        cache_dir: not used; examples are few and stay in memory.

    Raises DataError with file and line (or number) for a record that is none, and when no example is left.
    """
    rows = InstructionRows(seq_len, _pad_id(tokenizer))
    for place, record in _records(find_files(path, "instruction", (".json", ".jsonl"))):
        instruction, answer = text_field(record, "instruction", place), text_field(record, "output", place)
        context = text_field(record, "input", place) if record.get("input") is not None else ""
        prompt = format_prompt(instruction, context, preamble)
        rows.add(
            tokenizer.encode(prompt, bos=tokenizer.bos_id is not None),
            tokenizer.encode(answer, eos=tokenizer.eos_id is not None),
        )
    rows.check(str(path))
    return rows


class InstructionRows:
    """Examples in one flat array, each cut to S+1 tokens."""

    def __init__(self, seq_len: int, pad_id: int) -> None:
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.dropped = 0
        self.truncated = 0
        self._tokens = array("i")
        self._ends = array("q", [0])
        self._prompts = array("i")

    def add(self, prompt: list[int], answer: list[int]) -> None:
        """Keep one example; count it as dropped instead when no token of its answer fits."""
        tokens = (prompt + answer)[: self.seq_len + 1]
        if len(tokens) <= len(prompt):
            self.dropped += 1
            return
        self.truncated += len(tokens) < len(prompt) + len(answer)
        self._tokens.extend(tokens)
        self._ends.append(len(self._tokens))
        self._prompts.append(len(prompt))

    def check(self, source: str) -> None:
        """Say what did not fit. Raises DataError when nothing is left."""
        whole = len(self) + self.dropped
        if not whole:
            raise DataError(f"empty dataset: no examples in {source}; name a file that holds some.")
        if not len(self):
            raise DataError(
                f"empty dataset: no answer token of the {whole} examples in {source} lies within "
                f"seq_len={self.seq_len}; use a longer seq_len."
            )
        if self.dropped:
            rule = f"no answer token lies within seq_len={self.seq_len}"
            _log.warning("%s: dropped %d of %d examples: %s", source, self.dropped, whole, rule)
        if self.truncated:
            _log.info("%s: cut %d of %d answers at seq_len=%d", source, self.truncated, whole, self.seq_len)

    def __len__(self) -> int:
        return len(self._prompts)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Example `index` as `(input_ids [S], labels [S])`, int64, padded at the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        tokens = torch.tensor(self._tokens[self._ends[index] : self._ends[index + 1]], dtype=torch.int64, device="cpu")
        input_ids = torch.full((self.seq_len,), self.pad_id, dtype=torch.int64, device="cpu")
        labels = torch.full_like(input_ids, IGNORE)
        last, first_answer = len(tokens) - 1, max(self._prompts[index] - 1, 0)
        input_ids[: min(len(tokens), self.seq_len)] = tokens[: self.seq_len]
        labels[first_answer:last] = tokens[first_answer + 1 :]
        return input_ids, labels


def _pad_id(tokenizer: Tokenizer) -> int:
    """Padding is never learned, nor seen by the tokens before it, so that any id would do."""
    return next((token for token in (tokenizer.pad_id, tokenizer.eos_id) if token is not None), 0)


def _records(files: list[Path]) -> Iterator[tuple[str, Any]]:
    for file in files:
        yield from _json_list(file) if _starts_a_list(file) else json_lines(file)


def _starts_a_list(file: Path) -> bool:
    try:
        with open(file, "rb") as content:
            return content.read(4096).removeprefix(BOM_UTF8).lstrip().startswith(b"[")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error}") from None


def _json_list(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}:{getattr(error, 'lineno', 1)}: not JSON ({error}).") from None
    for number, record in enumerate(records, start=1):
        yield f"{file}, example {number}", record
