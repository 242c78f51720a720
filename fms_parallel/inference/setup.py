"""What an engine is made of: sizes, cache, runner, proposer; checked before memory is taken.

It knows models only by their config and attention modules.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fms_parallel.distributed.start import require_group
from fms_parallel.errors import ConfigError, LayoutError, unknown
from fms_parallel.inference.channel import StagedRanks
from fms_parallel.inference.draft import DraftModel, LookupProposer, ModelProposer
from fms_parallel.inference.kv_manager import AttentionMemory, CacheSize, KVCacheManager, Storage
from fms_parallel.inference.loop import check_forward
from fms_parallel.inference.paged import BlockPool, most_blocks
from fms_parallel.inference.ranks import SameOnAllRanks
from fms_parallel.inference.report import sizes
from fms_parallel.inference.runner import EvalMode, ModelRunner, Runner
from fms_parallel.inference.speculative import PromptLookup
from fms_parallel.inference.staged import StagedRunner
from fms_parallel.inference.transformers_model import TransformersModel, is_transformers
from fms_parallel.inference.transformers_stages import spread
from fms_parallel.inference.weights import Prepared, prepare_for_decode
from fms_parallel.layout import ParallelLayout
from fms_parallel.strategy.base import parallel_of
from fms_parallel.strategy.compose import compose

CACHES = ("paged", "manager", "internal", "none")
"""Blocks that rows share; a run per row, outside the model; the same inside its attention; compute all again."""

Proposer = LookupProposer | ModelProposer


@dataclass(frozen=True)
class Setup:
    """Sizes of an engine.

    Attributes:
        cache: one of `CACHES`. size: what the model keeps per token. rows: at a time. longest: tokens of one.
        block_size, blocks: of the cache, of each kind of layers. share: rows with the same beginning share blocks.
        step: tokens of one forward.
    """

    cache: str
    size: CacheSize
    rows: int
    longest: int
    block_size: int
    blocks: tuple[int, ...]
    share: bool
    step: int

    @classmethod
    def read(
        cls,
        model: nn.Module,
        *,
        cache: str | None,
        rows: int,
        longest: int | None,
        tokens: int | None,
        block_size: int,
        share: bool,
        step: int,
        use_kv_cache: bool,
        use_kv_manager: bool,
        speculative: PromptLookup | DraftModel | None,
    ) -> Setup:
        """From an engine's arguments. Raises ConfigError on impossible ones."""
        if not isinstance(speculative, PromptLookup | DraftModel | None):
            raise ConfigError(f"speculative={speculative!r}: give a PromptLookup() or a DraftModel(model).")
        mode = _mode(cache, use_kv_cache, use_kv_manager)
        longest = _longest(model, longest)
        _check_whole(max_batch_size=rows, max_seq_len=longest, block_size=block_size, max_step_tokens=step)
        _check_whole(cache_tokens=0 if tokens is None else tokens)
        drafted = 0 if speculative is None else speculative.tokens
        for name, value, least in (
            ("max_batch_size", rows, 1),
            ("max_seq_len", longest, 2),
            ("block_size", block_size, 1),
            ("max_step_tokens", step, rows * (1 + drafted) + 1),
        ):
            if value < least:
                more = " (every row's next token, its draft, and one of a prompt)" if name == "max_step_tokens" else ""
                raise ConfigError(f"{name}={value}: must be >= {least}{more}.")
        if tokens is not None and mode != "paged":
            raise ConfigError(f"cache_tokens={tokens} with cache={mode!r}: it is of the paged cache; drop one of them.")
        size = CacheSize.of(model)
        if mode == "paged":
            wanted = [rows * most_blocks(longest, block_size, window, step + drafted) for window in size.windows]
            blocks = tuple(wanted) if tokens is None else _of_tokens(tokens // block_size, wanted)
            if blocks[0] < 1:
                raise ConfigError(f"cache_tokens={tokens}: must hold one block of {block_size} tokens.")
        else:
            size, block_size, blocks, share = size.as_one(), longest, (rows,), False
        made = cls(mode, size, rows, longest, block_size, blocks, share, step)
        made._check_memory(next((p.device for p in model.parameters()), torch.device("cpu")))
        return made

    @property
    def window(self) -> int | None:
        """Behind which rows give back blocks of all layers; None: of some they keep all."""
        return self.size.windows[0]

    def chunk(self, asked: int | None) -> int | None:
        """Tokens of a row that a caller's own loop computes at a time, `asked` at most; None: all.

        Where layers have a window a row has no place for all its tokens at once.
        """
        return asked if self.size.windows == (None,) else min(asked or self.step, self.step)

    @property
    def cache_bytes(self) -> int:
        """Of the whole cache on this rank."""
        return self.size.bytes_of([count * self.block_size for count in self.blocks])

    def check_numbers(
        self, model: nn.Module, layers: int | None, heads: int | None, width: int | None, rows: int | None
    ) -> None:
        """Raise ConfigError when numbers of a cache are not this model's, or more rows than there are (None: any)."""
        own_heads = getattr(getattr(model, "config", None), "heads", heads)
        own_layers = getattr(getattr(model, "config", None), "layers", len(self.size.layers))  # of all stages
        own_width = next(iter(self.size.layers.values()))[1]
        given = {"num_layers": (layers, own_layers), "num_heads": (heads, own_heads)}
        for name, (number, own) in (given | {"head_dim": (width, own_width)}).items():
            if number is not None and number != own:
                raise ConfigError(f"init_kv_cache({name}={number}): this model's is {own}.")
        if rows is not None and rows > self.rows:
            raise ConfigError(f"init_kv_cache(batch_size={rows}): max_batch_size={self.rows} of the engine.")

    def _check_memory(self, device: torch.device) -> None:
        """A cache that cannot be is refused now, not when requests have filled it."""
        free = available_bytes(device)
        if free is not None and self.cache != "none" and self.cache_bytes > free:
            raise ConfigError(
                f"a cache of {sizes(self.blocks[0] * self.block_size, self.cache_bytes)} does not fit the "
                f"{free / 2**30:.2f} GiB that are free: lower max_seq_len, max_batch_size, or cache_tokens."
            )


def _of_tokens(blocks: int, wanted: Sequence[int]) -> tuple[int, ...]:
    """So many of the layers that see farthest; of others no more than rows can ever need."""
    return (blocks, *(min(blocks, most) for most in wanted[1:]))


def _check_whole(**numbers: Any) -> None:
    """Raise ConfigError on one that is no whole number."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError(f"{name}={number!r}: must be a whole number.")


def _mode(cache: str | None, use_kv_cache: bool, use_kv_manager: bool) -> str:
    old = "manager" if use_kv_manager else "internal" if use_kv_cache else None
    if cache is not None and old is not None and cache != old:
        raise ConfigError(f"cache={cache!r} and use_kv_{'manager' if use_kv_manager else 'cache'}: give one of them.")
    mode = cache or old or "paged"
    if mode not in CACHES:
        raise ConfigError(unknown("cache", str(mode), CACHES))
    return mode


def _longest(model: nn.Module, longest: int | None) -> int:
    most: int | None = getattr(getattr(model, "config", None), "max_positions", None)
    if longest is None and most is None:
        raise ConfigError(f"{type(model).__name__} does not say how many positions it has: give max_seq_len.")
    if isinstance(longest, int) and most is not None and longest > most:
        raise ConfigError(f"max_seq_len={longest} is beyond max_positions={most} of this model.")
    found = most if longest is None else longest
    assert found is not None
    return found


def available_bytes(device: torch.device) -> int | None:
    """Memory that could be taken on `device`; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def vocabulary_of(model: nn.Module) -> int:
    """V, as the model's config says it. Raises ConfigError when it does not."""
    vocab: int | None = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab is None:
        raise ConfigError(
            f"{type(model).__name__} has no config.vocab_size: the engine cannot check tokens against it."
        )
    return vocab


def distributed(model: nn.Module, layout: str | ParallelLayout | None) -> nn.Module:
    """`model` as `layout` says; checked that it can be served."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{type(model).__name__} is no model: give a torch.nn.Module, as get_model makes one.")
    if not isinstance(layout, str | ParallelLayout | None):
        raise ConfigError(f"layout={layout!r}: give a text, as 'tp=2', or a ParallelLayout.")
    if is_transformers(model) and hasattr(getattr(model, "model", None), "parallel"):
        model = model.model  # type: ignore[assignment]  # one of ours behind their words (to_hf_api)
    if layout is not None:
        if parallel_of(model).mesh is not None:
            raise LayoutError(f"layout={str(layout)!r} for a model that is spread already: leave it out.")
        require_group()
        world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        wanted = ParallelLayout.parse(layout) if isinstance(layout, str) else layout
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if is_transformers(model):
            return spread(model, wanted.resolve(world, local))
        model = compose(model, wanted.resolve(world, local), device=device)
    if is_transformers(model):
        return TransformersModel(model)
    check_forward(model)
    return model


def make_cache(model: nn.Module, setup: Setup, device: torch.device) -> tuple[BlockPool | None, Storage | None]:
    """Which rows have which tokens, and where their keys and values lie; no memory is taken yet."""
    if setup.cache == "none":
        return None, None
    blocks = dict(zip(setup.size.windows, setup.blocks, strict=True))
    pool = BlockPool(blocks, setup.block_size, share=setup.share)
    if setup.cache == "internal":
        return pool, AttentionMemory(model, setup.size, setup.blocks[0] * setup.block_size)
    return pool, KVCacheManager(setup.size, setup.blocks, setup.block_size, device)


def make_ranks(model: nn.Module, device: torch.device, groups: int | None) -> SameOnAllRanks:
    """Who goes on with the same tokens; with stages, where messages are not waited for. Collective."""
    parallel = parallel_of(model)
    if groups is not None and (not isinstance(groups, int) or groups < 1):
        raise ConfigError(f"groups={groups!r}: at least 1 group of rows is under way.")
    if parallel.pipeline is None:
        if groups not in (None, 1):
            raise ConfigError(f"groups={groups}: only pipeline stages work on several groups of rows; leave it out.")
        return SameOnAllRanks(parallel.mesh, device)
    assert parallel.mesh is not None
    return StagedRanks(parallel.mesh, device, groups or parallel.layout.pp)


def make_runner(model: nn.Module, vocab: int, ranks: SameOnAllRanks) -> Runner:
    """What runs the model."""
    if not isinstance(ranks, StagedRanks):
        return ModelRunner(model, vocab, ranks)
    runner = StagedRunner(model, vocab, ranks)
    if isinstance(model, TransformersModel) and model.expected is not None:
        with EvalMode(model).no_gradients():
            model.compare(model.expected, lambda pieces: runner.logits(pieces, None))
    return runner


FAST_WEIGHTS = ("copies", "compiled")
"""Words: matrices in other layouts; and kernels compiled for their shapes as well."""


def prepared(model: nn.Module, rows: int, groups: int, fast_weights: bool | str) -> Prepared | None:
    """The model with its matrices laid out for the rows of one step; None: as they lie.

    Raises:
        ConfigError: an unknown word, or what `prepare_for_decode` refuses.
    """
    if fast_weights not in (True, False, *FAST_WEIGHTS):
        raise ConfigError(f"fast_weights={fast_weights!r}: one of {', '.join(FAST_WEIGHTS)}, True (copies) or False.")
    return prepare_for_decode(model, -(-rows // groups), fast_weights == "compiled") if fast_weights else None


def make_proposer(
    speculative: PromptLookup | DraftModel | None, setup: Setup, vocab: int, ranks: SameOnAllRanks
) -> Proposer | None:
    """Who proposes tokens; None: nobody."""
    if speculative is None:
        return None
    if isinstance(speculative, PromptLookup):
        return LookupProposer(speculative)
    if (own := vocabulary_of(speculative.model)) != vocab:
        raise ConfigError(f"the draft model has {own} tokens, the model {vocab}: both must have the same.")
    check_forward(speculative.model)
    speculative.model.eval()
    tokens = setup.rows * (setup.longest + speculative.tokens)
    return ModelProposer(ModelRunner(speculative.model, vocab, ranks), tokens, min(16, setup.longest), setup.step)
