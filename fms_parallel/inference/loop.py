"""`generate`: continue prompts of any lengths, one token per row and step, in any layout.

    columns      0  1  2  3  4 | 5  6 ...        rows are padded on the left, so that every row's next token is in
    row 0        a  b  c  d  e | f  g            the same column; a row's positions start at 0 with its first real
    row 1        -  -  -  p  q | r  s            token, and no query sees padding: a row computes what it would alone
    position 1   0  0  0  0  1 | 2  3

It knows any module with the forward of `CausalModel`; it knows no model.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.inference.cache import KVCache
from fms_parallel.inference.ranks import SameOnAllRanks
from fms_parallel.inference.request import Endings, Prompts, Request, read_prompts
from fms_parallel.inference.sampling import NOT_FINITE, Sampling
from fms_parallel.modules.sequences import KVStore
from fms_parallel.strategy.base import parallel_of
from fms_parallel.tokenizers import Tokenizer, check_vocab


class CausalModel(Protocol):
    """What `generate` asks of a module's forward.

    Where the module has a `config` with `vocab_size` and `max_positions`, requests are checked against them.
    """

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None,
        first_position: int,
        mask: Tensor | None,
        cache: KVStore | None,
        last: int | None,
    ) -> Tensor:
        """Logits `[B, last, V]` of the last positions of `input_ids [B, S]`.

        Args:
            positions: `[B, S]`; None: first_position .. first_position + S in every row.
            first_position: column of the first token: how many the cache holds. No position is beyond its column.
            mask: bool `[B, 1, S, T]`, True where a query may attend; None is causal, aligned to the last key.
            cache: every attention layer appends its keys and values, and attends to all it holds; None: to these S.
        """
        ...


def generate(
    model: nn.Module,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue each prompt.

    A row's tokens depend on its own prompt, the seed and its index, not on the other rows. On several ranks every rank
    makes the same call and gets the same tokens. (Rope scalings that depend on the length, `ntk` and `dynamic`, are the
    exception: a model takes them from the longest row so far, cached keys from the length at their own time.)

    Args:
        model: a `CausalModel`, spread by `compose` or not. It is put in eval mode meanwhile.
        prompts: token ids, one list or tensor per row, or one tensor `[B, S]`.
        max_new_tokens: of each row, at most.
        temperature, top_k, top_p, seed: see `Sampling`; temperature 0 takes the likeliest token.
        eos_id: token or tokens that end a row. stop: token sequences that end a row (new tokens only).
        use_cache: keep keys and values; without, every step computes the whole sequence again, to the same tokens.
    Returns:
        the new tokens of each row. One that ended early keeps the eos or stop sequence that ended it.
    Raises:
        ConfigError: an impossible request, before anything is computed, on every rank alike.
        FmsError: the model's logits are NaN or infinite.
    """
    ranks = SameOnAllRanks(parallel_of(model).mesh, _device_of(model))
    failure: ConfigError | None = None
    try:
        sampling = Sampling(temperature, top_k, top_p, seed)
        endings = Endings.read(eos_id, stop)
        request = Request(read_prompts(prompts), max_new_tokens, sampling, endings, use_cache)
        _check_model(model, request)
    except ConfigError as error:
        failure = error
    # A rank that raised alone would leave the others waiting for it.
    ranks.check_same(str(failure) if failure else request, "the prompts or settings of generate")
    if failure is not None:
        raise failure
    if parallel_of(model).pipeline is not None:
        return _in_stages(model, request)
    with _evaluating(model):
        return _continue(model, request, ranks)


def generate_text(model: nn.Module, tokenizer: Tokenizer, prompts: str | Sequence[str], **options: Any) -> list[str]:
    """Continue each text; returns the continuations alone, without the eos or stop sequence that ended them.

    A prompt starts with the tokenizer's bos where it has one, as documents do in training.

    Args:
        options: as of `generate`; `eos_id` is the tokenizer's unless given (None: rows end at `max_new_tokens`).
    Raises:
        DataError: the tokenizer has more tokens than the model. Others: see `generate`.
    """
    vocab = _of_config(model, "vocab_size")
    if vocab is not None:
        check_vocab(tokenizer, vocab)
    options.setdefault("eos_id", tokenizer.eos_id)
    texts = [prompts] if isinstance(prompts, str) else prompts
    ids = [tokenizer.encode(text, bos=tokenizer.bos_id is not None) for text in texts]
    rows = generate(model, ids, **options)
    endings = Endings.read(options["eos_id"], options.get("stop", ()))
    return [_text_behind(tokenizer, *pair, endings) for pair in zip(ids, rows, strict=True)]


def _text_behind(tokenizer: Tokenizer, prompt: list[int], new: list[int], endings: Endings) -> str:
    """The text that `new` adds: some tokenizers drop a leading space when they decode it by itself."""
    new = new[: len(new) - endings.of(new)]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)


def _in_stages(model: nn.Module, request: Request) -> list[list[int]]:
    """Pipeline stages work on several groups of rows at a time, which is the engine's business; tokens are the same."""
    from fms_parallel.inference.engine import InferenceEngine

    rows, rules = len(request.prompts), request.sampling
    cache = "paged" if request.use_cache else "none"
    longest = max(2, request.width + request.max_new_tokens)
    engine = InferenceEngine(
        model,
        cache=cache,
        max_batch_size=rows,
        max_seq_len=longest,
        max_step_tokens=max(512, rows + 1),
    )
    options: dict[str, Any] = {
        "temperature": rules.temperature,
        "top_k": rules.top_k,
        "top_p": rules.top_p,
        "seed": rules.seed,
    }
    endings: dict[str, Any] = {"eos_id": sorted(request.endings.eos) or None, "stop": list(request.endings.stop)}
    with engine:
        found = engine.generate(request.prompts, max_new_tokens=request.max_new_tokens, **options, **endings)
    return [list(one.tokens) for one in found]


# ---- the loop -----------------------------------------------------------------------------------------------------


def _continue(model: nn.Module, request: Request, ranks: SameOnAllRanks) -> list[list[int]]:
    """One forward of all rows per step, until every row has ended."""
    ids, padding = _left_padded(request, ranks.device)
    cache = KVCache(request.width + request.max_new_tokens - 1) if request.use_cache else None
    rows: list[list[int]] = [[] for _ in request.prompts]
    running = set(range(len(rows)))
    start = 0
    for step in range(request.max_new_tokens):
        end = request.width + step
        columns = None if padding is None else Columns(start, end, padding)
        logits = model(
            ids[:, start:end],
            positions=columns.positions() if columns else None,
            first_position=start,
            mask=columns.mask() if columns else None,
            cache=cache,
            last=1,
        )
        tokens = ranks.first(request.sampling.choose(logits[:, -1], step))
        ids[:, end] = tokens.clamp(min=0)  # a row that has ended may be given anything, NOT_FINITE too
        chosen = tokens.tolist()
        for row in sorted(running):
            if chosen[row] == NOT_FINITE:
                raise FmsError(f"the logits of row {row} are NaN or infinite at new token {step}: check the weights.")
            rows[row].append(chosen[row])
            if request.endings.of(rows[row]):
                running.remove(row)
        if not running:
            break
        start = end if cache is not None else 0
    return rows


def _left_padded(request: Request, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids `[B, longest prompt + max_new_tokens]` and each row's padding `[B]`, None when no row has any."""
    width = request.width
    ids = torch.zeros(len(request.prompts), width + request.max_new_tokens, dtype=torch.int64)
    for row, prompt in enumerate(request.prompts):
        ids[row, width - len(prompt) : width] = torch.tensor(prompt)
    padding = torch.tensor([width - len(prompt) for prompt in request.prompts])
    return ids.to(device), padding.to(device) if padding.any() else None


class Columns(NamedTuple):
    """Columns `start .. end` of a batch whose row b begins with `padding[b]` columns that are no tokens."""

    start: int
    end: int
    padding: Tensor

    def positions(self) -> Tensor:
        """`[B, S]`: 0 at each row's first real token; padding, which nothing reads, has 0 too."""
        return (self._queries() - self.padding[:, None]).clamp(min=0)

    def mask(self) -> Tensor:
        """Bool `[B, 1, S, T]`: real tokens see real tokens up to themselves.

        A column of padding sees itself: with nothing to see, its softmax would be 0 / 0.
        """
        keys, queries = torch.arange(self.end, device=self.padding.device), self._queries()[:, None]
        real = keys >= self.padding[:, None, None]
        return ((keys <= queries) & real | (keys == queries)).unsqueeze(1)

    def _queries(self) -> Tensor:
        return torch.arange(self.start, self.end, device=self.padding.device)


# ---- the model ----------------------------------------------------------------------------------------------------


def check_forward(model: nn.Module) -> None:
    """Raise ConfigError when `model` has not the forward of a `CausalModel`."""
    taken = inspect.signature(model.forward).parameters
    words = [name for name in inspect.signature(CausalModel.forward).parameters if name not in ("self", "input_ids")]
    missing = [name for name in words if name not in taken]
    if missing and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise ConfigError(
            f"{type(model).__name__} cannot generate: its forward takes no {', '.join(missing)} "
            "(see inference.generate.CausalModel)."
        )


def _check_model(model: nn.Module, request: Request) -> None:
    """Raise ConfigError when the model cannot do what is asked."""
    check_forward(model)
    request.check_fits(_of_config(model, "vocab_size"), _of_config(model, "max_positions"))


def _of_config(model: nn.Module, name: str) -> int | None:
    value: int | None = getattr(getattr(model, "config", None), name, None)
    return value


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    # inference_mode saves a tenth of a small model's step, but FSDP keeps the buffers of its first forward, and
    # training could not use them.
    gathers = any(isinstance(module, FSDPModule) for module in model.modules())
    try:
        with torch.no_grad() if gathers else torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
