"""Text to token ids and back: bytes, sentencepiece models, and Hugging Face `tokenizer.json` files.

It knows text and ids; it knows nothing of models, tensors or datasets. No special token is ever added unless asked
for with `bos=` / `eos=`, and no text, however it is spelt, turns into one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fms_parallel.errors import DataError, unknown

UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""What `decode` writes for an id that the tokenizer does not have (a model's vocabulary is often padded)."""


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: ids are in `[0, vocab_size)`.
        bos_id, eos_id, pad_id, mask_id: the special ids, or None where the tokenizer has no such token.
        special_ids: every id that stands for no text; `decode` skips them.
    """

    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    mask_id: int | None = None
    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with the bos id before and the eos id behind where asked.

        A lone surrogate (half a character, as broken JSON has it) is no text and is read as `?`.
        Raises DataError when a special id is asked for that the tokenizer does not have.
        """
        valid = text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
        before = [self._special("bos")] if bos else []
        behind = [self._special("eos")] if eos else []
        return before + self._encode(valid) + behind

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special ids are skipped, ids that the tokenizer does not have become U+FFFD."""
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if 0 <= token < self.vocab_size:
                if token not in self.special_ids:
                    run.append(token)
                continue
            parts += [self._decode(run), UNREADABLE]
            run = []
        return "".join([*parts, self._decode(run)])

    def _special(self, name: str) -> int:
        token: int | None = getattr(self, f"{name}_id")
        if token is None:
            raise DataError(
                f"this tokenizer has no {name} token; encode without {name}=True or take another tokenizer."
            )
        return token

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A word that differs whenever the ids of some text would: part of the key of cached tokens."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of valid Unicode text, none of them special."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ordinary ids."""


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError when `tokenizer` can produce an id that a model of `vocab_size` rows has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocabulary is {vocab_size}: every id "
            f"must have an embedding. Use a model vocabulary >= {tokenizer.vocab_size} or the model's own tokenizer."
        )


# ---- bytes ----------------------------------------------------------------------------------------------------------


class CharTokenizer(Tokenizer):
    """One id per UTF-8 byte: 256 ids, no file, round-trips any text.

    bos is 2 and eos is 3. Those two bytes may occur in text, so there they take the ids 0xC0 and 0xC1, which no UTF-8
    text ever uses; pad is 0xFF and mask 0xFE, which are as free.
    """

    vocab_size = 256
    bos_id = 2
    eos_id = 3
    pad_id = 0xFF
    mask_id = 0xFE
    special_ids = frozenset((2, 3, 0xFE, 0xFF))
    fingerprint = "utf8-bytes-1"

    _to_ids = bytes.maketrans(b"\x02\x03", b"\xc0\xc1")
    _to_bytes = bytes.maketrans(b"\xc0\xc1", b"\x02\x03")

    def _encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8").translate(self._to_ids))

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).translate(self._to_bytes).decode("utf-8", "replace")


# ---- sentencepiece --------------------------------------------------------------------------------------------------

SPACE_MARK = "\u2581"
"""How sentencepiece writes a space inside its pieces; by itself it cannot tell this character from a space."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file. `train_sentencepiece` makes one that round-trips every text exactly."""

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise DataError(f"{path} is not a sentencepiece model ({_reason(error)}).") from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = (
            token if token >= 0 else None
            for token in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )
        mask = self._model.piece_to_id("<mask>")  # unk, when there is no such piece
        self.mask_id = mask if self._model.id_to_piece(mask) == "<mask>" else None
        control = self._model.is_control(list(range(self.vocab_size)))
        self.special_ids = frozenset(token for token, yes in enumerate(control) if yes or token == self.mask_id)
        self._mark_ids = self._space_mark_ids()

    def _space_mark_ids(self) -> list[int] | None:
        """Byte pieces of SPACE_MARK, or None where text cannot be cut around it (no bytes, or a space is put first)."""
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        adds_space = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        return ids if all(self._model.is_byte(ids)) and not adds_space else None

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._model.serialized_model_proto()).hexdigest()

    def _encode(self, text: str) -> list[int]:
        if self._mark_ids is None or SPACE_MARK not in text:
            ids: list[int] = self._model.encode(text)
            return ids
        first, *others = (self._model.encode(part) for part in text.split(SPACE_MARK))
        return first + [token for part in others for token in (*self._mark_ids, *part)]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text


def train_sentencepiece(
    sources: Iterable[str | Path],
    vocab_size: int,
    out_path: str | Path,
    *,
    num_threads: int = 1,
    character_coverage: float = 0.9995,
) -> Path:
    """Train a byte-pair sentencepiece model that encodes and decodes every text exactly, and write it to `out_path`.

    Nothing is normalised, no space is added or removed, runs of spaces become single pieces, digits stay apart, and
    whatever has no piece of its own (newlines, tabs, rare characters) is spelt in bytes. Ids: unk 0, bos 1, eos 2,
    pad 3, then 256 bytes.

    Args:
        sources: what to learn from: a `str` is text, a `Path` is a UTF-8 file. Consumed once, one at a time.
        vocab_size: pieces in all.
        out_path: the `.model` file; replaced in one step, so that a killed run leaves no torn file.
        character_coverage: share of the text's characters that get a piece of their own.

    Returns `out_path`. Raises DataError when there is no text, or too little or too much of it for `vocab_size`.
    """
    from sentencepiece import SentencePieceTrainer

    if vocab_size < 1:
        raise DataError(f"cannot train a sentencepiece model with vocab_size={vocab_size}: it has at least 1 piece.")

    lines = _TrainingLines([sources] if isinstance(sources, str | Path) else sources)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=character_coverage,
            max_sentence_length=4 * LINE_CHARACTERS,
            pad_id=3,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        reason = _reason(error) if lines.count else "there is no text in the sources"
        raise DataError(f"cannot train a sentencepiece model with vocab_size={vocab_size}: {reason}") from None
    return _write_whole(Path(out_path), model.getvalue())


LINE_CHARACTERS = 4096
"""Longer lines are cut for training: sentencepiece would leave them out."""


class _TrainingLines:
    """Non-empty lines of texts and files, counted. An error of theirs is kept: the trainer turns it into its own."""

    def __init__(self, sources: Iterable[str | Path]) -> None:
        self.sources = sources
        self.count = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for source in self.sources:
                for line in _lines(source):
                    for start in range(0, len(line), LINE_CHARACTERS):
                        self.count += 1
                        yield line[start : start + LINE_CHARACTERS]
        except Exception as error:
            self.error = error
            raise


def _lines(source: str | Path) -> Iterator[str]:
    if isinstance(source, str):
        yield from (line.rstrip("\r") for line in source.split("\n"))
        return
    try:
        with open(source, encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {source} as UTF-8 text: {error}") from None


def _write_whole(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _reason(error: Exception) -> str:
    """The sentence in a sentencepiece error, without its source position."""
    return str(error).split("] ")[-1].strip() or "no reason given"


# ---- Hugging Face tokenizer.json ------------------------------------------------------------------------------------


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json` (extra `[hf]`).

    bos, eos, pad and mask come from `tokenizer_config.json` or `special_tokens_map.json` beside it; without those files
    they are None. The file's own truncation, padding and added special tokens are switched off.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ModuleNotFoundError:
            raise DataError(f"reading {path} needs `tokenizers`: pip install 'fms_parallel[hf]'.") from None
        try:
            self._model = Backend.from_file(str(path))
        except Exception as error:  # the backend raises bare Exception
            raise DataError(f"{path} is not a Hugging Face tokenizer.json ({error}).") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # text that spells a special token stays text
        # Ids may have gaps, so their count is not the bound.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        names = _special_token_names(Path(path).parent)
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = (
            self._model.token_to_id(names[name]) if name in names else None
            for name in ("bos_token", "eos_token", "pad_token", "mask_token")
        )
        added = self._model.get_added_tokens_decoder().items()
        named = (token for token in (self.bos_id, self.eos_id, self.pad_id, self.mask_id) if token is not None)
        self.special_ids = frozenset((*named, *(token for token, entry in added if entry.special)))

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._model.to_str().encode("utf-8")).hexdigest()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids, skip_special_tokens=False)
        return text


def _special_token_names(folder: Path) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}` from the files beside a tokenizer.json; the tokenizer's config wins."""
    names: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        for key, value in _json_object(file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                names[key] = text
    return names


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold one JSON object, not a {type(content).__name__}.")
    return content


# ---- by name --------------------------------------------------------------------------------------------------------

_STYLES: dict[str, Callable[[str | Path], Tokenizer]] = {
    "char": lambda _: CharTokenizer(),
    "sentencepiece": SentencePieceTokenizer,
    "hf": HFTokenizer,
}
_WORDS = ("char", "char_tokenizer")
_FILES: Sequence[tuple[str, str, str]] = (  # (style, file name in a folder, suffix of a file)
    ("hf", "tokenizer.json", ".json"),
    ("sentencepiece", "tokenizer.model", ".model"),
)
UNDERSTOOD = (
    "'char' (bytes), a sentencepiece .model file, a Hugging Face tokenizer.json file, or a folder that holds a "
    "tokenizer.json or a tokenizer.model"
)


def get_tokenizer(name_or_path: str | Path, style: str | None = None) -> Tokenizer:
    """The tokenizer of that name or file.

    Args:
        name_or_path: `"char"` or `"char_tokenizer"`, a sentencepiece `.model` file, a Hugging Face `tokenizer.json`,
            or a folder that holds `tokenizer.json` (looked for first) or `tokenizer.model`.
        style: `char`, `sentencepiece` or `hf` where the name does not tell; None reads it from the name.

    Raises DataError for a name nobody understands, a file that is missing or broken, or a missing extra.
    """
    if style is not None and style not in _STYLES:
        raise DataError(unknown("tokenizer style", style, _STYLES))
    if style == "char" or (style is None and str(name_or_path) in _WORDS):
        return CharTokenizer()
    path = Path(name_or_path)
    if not path.exists():
        raise DataError(
            f"no tokenizer {str(name_or_path)!r}: neither a known word nor a file. Understood: {UNDERSTOOD}."
        )
    for known, name, suffix in _FILES:
        file = path / name if path.is_dir() else path
        if file.is_file() and style in (None, known) and (style == known or file.suffix == suffix):
            return _STYLES[known](file)
    raise DataError(f"cannot tell what tokenizer {path} holds. Understood: {UNDERSTOOD}; or name a style.")
