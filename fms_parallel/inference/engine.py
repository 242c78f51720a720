"""`InferenceEngine`: many requests through one model, joining and leaving between steps.

    submit --> waiting --plan--> running --pieces--> runner --tokens--> rows --> handles, streams
                  ^_____________________|  (a row that must give its blocks back)

One driver calls `step`; `submit` and `cancel` may be called from any thread. On several ranks the first takes requests
and the others `follow`, or all make the same call of `generate`. It knows schedules, rows and runners; it knows no
model.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError, FmsError, LayoutError
from fms_parallel.inference.by_hand import ByHand
from fms_parallel.inference.commands import Command, Inbox
from fms_parallel.inference.draft import DraftModel
from fms_parallel.inference.handle import Completion, Event, Handle
from fms_parallel.inference.intake import Intake, Prompt, Read, read_errors, several_of
from fms_parallel.inference.kv_manager import KVCacheManager
from fms_parallel.inference.local import connect
from fms_parallel.inference.report import Counts, MemoryReport, memory_report
from fms_parallel.inference.row import Row
from fms_parallel.inference.runner import EvalMode
from fms_parallel.inference.scheduler import Limits, Scheduler
from fms_parallel.inference.setup import (
    Setup,
    distributed,
    make_cache,
    make_proposer,
    make_ranks,
    make_runner,
    prepared,
    vocabulary_of,
)
from fms_parallel.inference.speculative import PromptLookup
from fms_parallel.inference.worker import Worker
from fms_parallel.layout import ParallelLayout
from fms_parallel.tokenizers import Tokenizer

Stream = Callable[[Event], object]


class InferenceEngine(ByHand):
    """Generates with one model for many requests at a time.

    Args:
        model: a `CausalModel` made of our attention modules; whole, or spread by `compose`.
        tokenizer: for prompts that are texts, and for texts that come back; without it both are token ids.
        layout: spread the model so first (all ranks hold the same weights); None: as it is.
        max_batch_size: rows running at a time. max_seq_len: tokens of one row, prompt and new (None: max_positions).
        cache: `paged`, `manager`, `internal` or `none`, see docs/inference.md (None: paged or an older word).
        cache_tokens: tokens that the paged cache holds (None: max_batch_size * max_seq_len); fewer where layers have
            windows.
        block_size: tokens of one of its blocks. share_prefixes: rows with the same beginning compute it once.
        serving_mode: keep the cache's memory, and what it holds, while there is nothing to do.
        max_step_tokens: of all rows in one step: the largest chunk of a prompt.
        groups: with pp, steps under way at a time, each with its share of the rows (None: as many as stages).
        fast_weights: lay matrices out for decoding until `close`, as fast as this machine reads them: up to one more
            copy of them (`memory_report`), and seconds to find out; "compiled": also by kernels for their very shapes,
            see `prepare_for_decode`. Weights must not change meanwhile.
        local_sockets: ranks of tp that compute on one host's CPU talk through its sockets, if a self-test finds that
            right and faster (None); False: never; True: it is an error where there is no such tp; "shared_memory": as
            True, and sums of any size go through memory that the ranks share, if a self-test finds that right.
        speculative: propose tokens: a `PromptLookup` or a `DraftModel`.
        static_batches: fill a batch only when the one before it has ended altogether (for comparison).
        use_kv_cache, use_kv_manager: older words for cache="internal" and cache="manager".
    Attributes:
        setup: sizes. pool, storage: which rows have which tokens of the cache, and its memory.
    Raises:
        ConfigError, LayoutError: a model, or settings, with which no request could be served.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        layout: str | ParallelLayout | None = None,
        *,
        max_batch_size: int = 8,
        max_seq_len: int | None = None,
        cache: str | None = None,
        cache_tokens: int | None = None,
        block_size: int = 16,
        share_prefixes: bool = True,
        serving_mode: bool = True,
        max_step_tokens: int = 512,
        groups: int | None = None,
        fast_weights: bool | str = False,
        local_sockets: bool | str | None = None,
        speculative: PromptLookup | DraftModel | None = None,
        static_batches: bool = False,
        use_kv_cache: bool = False,
        use_kv_manager: bool = False,
    ) -> None:
        self.model = distributed(model, layout)
        self.tokenizer, self.serving_mode = tokenizer, serving_mode
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.ranks = make_ranks(self.model, device, groups)
        self.ranks.use(connect(self.model, local_sockets))
        self.setup = Setup.read(
            self.model,
            cache=cache,
            rows=max_batch_size,
            longest=max_seq_len,
            tokens=cache_tokens,
            block_size=block_size,
            share=share_prefixes,
            step=max_step_tokens,
            use_kv_cache=use_kv_cache,
            use_kv_manager=use_kv_manager,
            speculative=speculative,
        )
        self.vocab = vocabulary_of(self.model)
        self.intake = Intake(self.setup, tokenizer, self.vocab)
        self.pool, self.storage = make_cache(self.model, self.setup, self.ranks.device)
        self.runner = make_runner(self.model, self.vocab, self.ranks)
        self.proposer = make_proposer(speculative, self.setup, self.vocab, self.ranks)
        limits = Limits(max_batch_size, max_step_tokens, static_batches)
        self.scheduler = Scheduler(limits, self.pool, 0 if speculative is None else speculative.tokens)
        self._worker = Worker(self.runner, self.scheduler, self.storage, self.proposer, self._forget)
        self._inbox, self._lock, self._numbers = Inbox(self.ranks), threading.RLock(), itertools.count()
        self._rows: dict[int, Row] = {}
        self._handles: dict[int, Handle] = {}  # of requests that the next step will hear of
        self._driver: threading.Thread | None = None
        self._closed, self._mode = False, EvalMode(self.model)
        self._fast = prepared(self.model, self.setup.rows, self.runner.groups, fast_weights)
        self._totals: Counter[str] = Counter()

    # ---- requests --------------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, *, stream: Stream | None = None, **options: Any) -> Handle:
        """A request, on the first rank; it is begun by a later `step`. From any thread.

        Args:
            prompt: text (it starts with the tokenizer's bos, where that has one) or token ids.
            stream: called by the driver with each `Event`. options: see `Options.read`.
        Raises:
            ConfigError: this request is impossible; nobody else notices. LayoutError: this is not the first rank.
        """
        if not self.ranks.is_first:
            raise LayoutError("submit is for the first rank; the others call engine.follow().")
        return self._submit(self.intake.read(prompt, options), stream, 0)

    def step(self) -> bool:
        """One forward of the model, for all rows that can take part; returns whether there is more to do.

        On several ranks the first calls it and the others are in `follow`.
        """
        return self._step(patient=True)

    def follow(self) -> None:
        """Take part in the first rank's steps until it closes its engine. For the other ranks."""
        while not self._closed:
            self.step()

    def start(self) -> InferenceEngine:
        """Let a thread of its own drive the engine until `close`; then nobody else needs to.

        It steps when there is something to do, and every second, so that ranks that wait are not given up.
        """
        if self._driver is None:
            self._driver = threading.Thread(target=self._drive_on, name="inference", daemon=True)
            self._driver.start()
        return self

    def close(self) -> None:
        """End all requests; give memory back; leave the model in the mode it was in.

        On several ranks every rank closes; those that follow are closed by the first.
        """
        if self._closed:
            return
        if self.ranks.broken:
            return self._close()
        if not self.ranks.is_first:
            return self.follow()
        self._inbox.put(Command("close"))
        if self._driver is not None:
            self._driver.join()
        else:
            self.step()
        self._close()

    def generate(
        self, prompts: str | Sequence[Prompt] | Tensor, *, stream: Stream | None = None, **options: Any
    ) -> list[Completion]:
        """Continue prompts; they share steps with each other, and with whatever was submitted.

        On several ranks all make the same call, with nothing else submitted. Row i draws the random numbers of
        (seed, i).

        Args:
            prompts: one text, or texts or lists of token ids, or ids `[B, S]`.
            options: of `Options.read`, for all rows; a list gives one value per row. errors="return" turns an
                impossible request into a completion whose `error` says why, where otherwise it is raised and nothing is
                generated; and so for a row whose logits turn out to be no distribution.
        Returns:
            one completion per prompt.
        Raises:
            ConfigError: an impossible request, before anything is computed. FmsError: a row failed.
        """
        several = [prompts] if isinstance(prompts, str) else several_of(prompts)
        raises = read_errors(options.pop("errors", "raise"))
        read = [self.intake.try_read(row, several, options) for row in range(len(several))]
        # What is refused is refused everywhere, but a stage tells its own sizes.
        same = ["refused" if isinstance(one, FmsError) else str(one) for one in read]
        self.ranks.check_same(same, "the prompts or options of generate")
        if not several:
            raise ConfigError("no prompts: give at least one.")
        failed = next((one for one in read if isinstance(one, FmsError)), None)
        if failed is not None and raises:
            raise failed
        found = self._generate(read, stream)
        failed = next((one.error for one in found if one.error is not None), None)
        if failed is not None and raises:
            raise failed
        return found

    # ---- memory ----------------------------------------------------------------------------------------------------

    def init_kv_cache(
        self,
        num_layers: int | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Take the cache's memory now, rather than at the first step.

        Numbers given are checked against the model and the engine. What is stored are kv heads, however many heads
        there are of queries.
        """
        self.setup.check_numbers(self.model, num_layers, num_heads, head_dim, batch_size)
        if not isinstance(self.storage, KVCacheManager):
            raise ConfigError(f"cache={self.setup.cache!r} has no manager to allocate: use cache='manager' or 'paged'.")
        with self._mode.no_gradients():
            self.storage.allocate()

    def release_kv_cache(self) -> None:
        """Give the cache's memory back, with what it keeps for rows to come. Only while nothing runs."""
        with self._lock:
            self.clear()
            if self.pool is not None and self.pool.in_use:
                used = f"release_kv_cache while {self.pool.in_use} blocks are in use"
                raise ConfigError(f"{used}: cancel the requests that run, and close every ScheduleGeneration.")
            self._release()

    def memory_report(self) -> MemoryReport:
        """What this rank holds, and what would fit."""
        return memory_report(self.model, self.setup, self.pool, self.storage, self.proposer, self._fast)

    def counts(self) -> Counts:
        """What it is doing, and has done."""
        waiting = len(self.scheduler.waiting) + len(self._handles)
        done = self._totals + self._worker.counts
        return Counts.of(waiting, len(self.scheduler.running), self.scheduler.preemptions, done)

    def eval(self) -> InferenceEngine:
        """Put the model in eval mode until `close`."""
        self._mode.held = True
        self._mode.enter()
        return self

    def __enter__(self) -> InferenceEngine:
        return self.eval()

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- driving ---------------------------------------------------------------------------------------------------

    def _submit(self, read: Read, stream: Stream | None, row: int) -> Handle:
        number = next(self._numbers)
        handle = Handle(number, row, stream, self._drive_once, lambda n: self._inbox.put(Command("cancel", n)))
        self._handles[number] = handle
        if not self._inbox.put(Command("add", number, read)):
            del self._handles[number]
            raise ConfigError("this engine is closed: make a new one.")
        return handle

    def _generate(self, read: Sequence[Read | FmsError], stream: Stream | None) -> list[Completion]:
        with self._lock:
            if not (self.ranks.alone or (self._idle and self._inbox.empty)):
                raise ConfigError("generate on several ranks while requests run: submit those too, or wait for them.")
            handles = [None if isinstance(x, FmsError) else self._submit(x, stream, n) for n, x in enumerate(read)]
            if not self.ranks.alone:  # all ranks take the same steps without telling each other
                self._obey(self._inbox.take())
                while not self._idle:
                    self._advance(patient=False)
        failed = (Completion((), (), "", "error", one if isinstance(one, FmsError) else None) for one in read)
        return [no if handle is None else handle.result() for handle, no in zip(handles, failed, strict=True)]

    def _drive_once(self) -> bool:
        """A step for somebody who waits, unless a thread does that."""
        if self._driver is not None or not self.ranks.is_first or self._closed:
            return False
        self._step(patient=not self.ranks.alone)  # nobody else is there who could make room
        return True

    def _step(self, patient: bool) -> bool:
        with self._lock:
            self._obey(self._inbox.take_everywhere())
            self._advance(patient)
            return not (self._idle and self._inbox.empty)

    def _drive_on(self) -> None:
        try:
            while not self._closed:
                if not self.step():
                    with self._inbox.arrived:
                        if self._inbox.empty and not self._closed:
                            self._inbox.arrived.wait(1.0)
        finally:
            self._close()  # whatever happened, nobody is left waiting

    def _obey(self, commands: Sequence[Command]) -> None:
        for number, word, value in ((c.number, c.word, c.value) for c in commands):
            if word == "add":
                known = self._handles.pop(number, None)
                handle = known or Handle(number, 0, None, lambda: False, lambda n: None)
                ids, options = value
                self._rows[number] = Row(number, ids, options, self.tokenizer, handle)
                self.scheduler.add(self._rows[number])
            elif word == "cancel" and number in self._rows:
                self._cancel(self._rows[number])
            elif word == "close":
                self._close()

    @property
    def _idle(self) -> bool:
        return self.scheduler.idle and not self._worker.flights

    def _advance(self, patient: bool) -> None:
        if not self._idle:
            self._mode.enter()
            try:
                with self._mode.no_gradients():
                    self._worker.step(patient)
            except BaseException:
                self.ranks.broken = not self.ranks.alone  # where the others are, nobody knows
                raise
        self._rest()

    def _cancel(self, row: Row) -> None:
        row.finish = "cancelled"
        self._forget(row)
        row.tell(())

    def _forget(self, row: Row) -> None:
        """A row that has ended: its blocks are free, its tokens counted."""
        self.scheduler.end(row)
        if self.proposer is not None:
            self.proposer.end(row)
        if self._rows.pop(row.number, None) is not None:
            self._totals.update({f"{row.finish}": 1, "prompt": len(row.prompt), "new": len(row.new)})

    def _close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._obey([command for command in self._inbox.close() if command.word == "add"])
            self._closed, self._mode.held = True, False
            for row in list(self.scheduler.rows()):
                self._cancel(row)
            if not self.ranks.broken:
                self._worker.finish()
            self.clear()
            self._release()
            if self.storage is not None:
                self.storage.close()
            if self._fast is not None:
                self._fast.undo()
            self._rest()
            self.ranks.close()

    def _rest(self) -> None:
        """With nothing to do, the model is as it was found, and batch mode holds no memory."""
        if not self._idle:
            return
        self._mode.leave()
        if not self.serving_mode and self.pool is not None and not self.pool.in_use:
            self._release()

    def _release(self) -> None:
        if self.storage is not None and self.pool is not None:
            self.storage.release()
            self.pool.clear()
