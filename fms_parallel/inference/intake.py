"""Reading requests: prompts and options as callers pass them -> token ids and `Options`, or one clear error.

It knows a tokenizer, sizes and rules; it knows no models and no running rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fms_parallel.errors import ConfigError, FmsError, unknown
from fms_parallel.inference.options import Options, check_tokens, read_prompt
from fms_parallel.inference.paged import most_blocks
from fms_parallel.inference.report import sizes
from fms_parallel.inference.request import Ids
from fms_parallel.inference.setup import Setup
from fms_parallel.tokenizers import Tokenizer, check_vocab

Prompt = str | Sequence[int] | Tensor
Read = tuple[Ids, Options]


class Intake:
    """Checks every request against one model, cache and tokenizer, before anything of it is computed."""

    def __init__(self, setup: Setup, tokenizer: Tokenizer | None, vocab: int) -> None:
        self.setup, self.tokenizer, self.vocab = setup, tokenizer, vocab
        if tokenizer is not None:
            if not isinstance(tokenizer, Tokenizer):
                raise ConfigError(
                    f"tokenizer is a {type(tokenizer).__name__}: give what fms_parallel.tokenizers.get_tokenizer makes "
                    "of a folder or a file; it reads those of transformers."
                )
            check_vocab(tokenizer, vocab)

    @property
    def eos_id(self) -> int | None:
        """What ends a row unless a request says otherwise."""
        return None if self.tokenizer is None else self.tokenizer.eos_id

    def ids(self, prompt: Prompt, name: str = "the prompt") -> Ids:
        """Token ids of a prompt. Raises ConfigError on something that is none, or of another vocabulary."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError(f"{name} is a text, and this engine has no tokenizer: give one, or token ids.")
            prompt = self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
        ids = read_prompt(name, prompt)
        check_tokens(name, ids, self.vocab)
        return ids

    def read(self, prompt: Prompt, options: Mapping[str, Any], name: str = "the prompt") -> Read:
        """A whole request. Raises ConfigError on one that cannot be served."""
        read = Options.read(options, self.eos_id)
        read.check_vocabulary(self.vocab)
        if read.stop_text and self.tokenizer is None:
            raise ConfigError(f"stop={read.stop_text!r} are texts, and this engine has no tokenizer: give token ids.")
        ids = self.ids(prompt, name)
        self._check_fits(name, ids, read)
        return ids, read

    def try_read(self, row: int, prompts: Sequence[Any], options: Mapping[str, Any]) -> Read | FmsError:
        """One of several requests with common options, or what is wrong with it."""
        try:
            mine = {name: _of_row(name, value, row, len(prompts)) for name, value in options.items()}
            mine.setdefault("row", 0 if isinstance(options.get("seed"), list) else row)
            return self.read(prompts[row], mine, f"prompt {row} of {len(prompts)}")
        except FmsError as error:
            return error

    def _check_fits(self, name: str, ids: Ids, options: Options) -> None:
        setup, token, total = self.setup, self.setup.size.token_bytes, len(ids) + options.max_new_tokens
        asked = f"{name} has {len(ids)} tokens; with max_new_tokens={options.max_new_tokens} that makes"
        if total > setup.longest:
            raise ConfigError(
                f"{asked} {sizes(total, total * token)}, beyond max_seq_len={setup.longest} "
                f"({sizes(setup.longest, setup.longest * token)}): "
                f"shorten the prompt or ask for at most {max(0, setup.longest - len(ids))} new tokens."
            )
        for window, blocks in zip(setup.size.windows, setup.blocks, strict=True):
            least = most_blocks(max(len(ids), total - 1), setup.block_size, window)
            if setup.cache != "none" and least > blocks:
                has = f"but the whole cache has {sizes(blocks * setup.block_size, setup.cache_bytes)}"
                seen = f" (window={window}: {least * setup.block_size:,} of them at a time)"
                asked += f" {sizes(total, total * token)}{'' if window is None else seen}"
                raise ConfigError(f"{asked}, {has}: make the engine with more cache_tokens.")


def several_of(prompts: Any) -> list[Any]:
    """The prompts of one call. Raises ConfigError on something that is no list of them."""
    if not isinstance(prompts, Iterable) or (isinstance(prompts, Tensor) and prompts.ndim == 0):
        raise ConfigError(f"prompts={prompts!r}: give a text, or a list of texts or of lists of token ids.")
    return list(prompts)


def read_errors(word: Any) -> bool:
    """Whether impossible requests are raised. Raises ConfigError on an unknown word."""
    if word not in ("raise", "return"):
        raise ConfigError(unknown("word of errors", str(word), ("raise", "return")))
    return bool(word == "raise")


def _of_row(name: str, value: Any, row: int, rows: int) -> Any:
    """A row's own value, where a list gives one per row; stop and eos_id are lists by nature."""
    if not isinstance(value, list) or name in ("stop", "eos_id"):
        return value
    if len(value) != rows:
        raise ConfigError(f"{name} has {len(value)} values for {rows} prompts: give one, or one per prompt.")
    return value[row]
