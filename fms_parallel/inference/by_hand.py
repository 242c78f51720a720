"""`ByHand`: what an engine offers to callers that run their own loop: two phases, and beam search.

It knows that steps of the engine must wait meanwhile; it plans none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.inference.beam import BeamSearch, Hypothesis
from fms_parallel.inference.two_phase import ScheduleGeneration

if TYPE_CHECKING:
    from fms_parallel.inference.intake import Intake, Prompt
    from fms_parallel.inference.kv_manager import Storage
    from fms_parallel.inference.paged import BlockPool
    from fms_parallel.inference.runner import EvalMode, Runner
    from fms_parallel.inference.setup import Setup
    from fms_parallel.inference.worker import Worker
    from fms_parallel.tokenizers import Tokenizer


class ByHand:
    """The part of an `InferenceEngine` that is driven by its caller."""

    setup: Setup
    tokenizer: Tokenizer | None
    vocab: int
    intake: Intake
    pool: BlockPool | None
    storage: Storage | None
    runner: Runner
    _lock: threading.RLock
    _mode: EvalMode
    _worker: Worker
    _closed: bool
    _generation: ScheduleGeneration | None = None

    def beam_search(self, prompt: Prompt, **options: Any) -> list[Hypothesis]:
        """The likeliest continuations that beam search finds, best first; see `BeamSearch` for options.

        Collective: on several ranks all make the same call. Steps of other requests wait meanwhile.
        """
        ids = self.intake.ids(prompt)
        with self.by_hand():
            return BeamSearch.read(options, self.intake.eos_id).run(ids, self)

    def prefill(self, input_ids: Tensor | Sequence[Sequence[int]], *, chunk: int | None = None) -> Tensor:
        """Compute prompts of any lengths; returns the logits `[B, V]` behind each. See `ScheduleGeneration`."""
        self.clear()
        self._generation = ScheduleGeneration(self)
        return self._generation.prefill(input_ids, chunk=chunk)

    def decode_step(self, tokens: Tensor | Sequence[int], positions: Tensor | Sequence[int] | int) -> Tensor:
        """One token of each row at its position; returns the logits `[B, V]` behind it."""
        if self._generation is None:
            raise ConfigError("decode_step without prompts: call prefill first.")
        return self._generation.decode_step(tokens, positions)

    def clear(self) -> None:
        """Forget what `prefill` computed; memory stays."""
        if self._generation is not None:
            self._generation.close()
            self._generation = None

    @contextmanager
    def by_hand(self) -> Iterator[None]:
        """For one who runs the model: eval mode, no gradients, and no step of the engine meanwhile."""
        with self._lock:
            if self._closed:
                raise ConfigError("this engine is closed: make a new one.")
            self._mode.enter()
            try:
                with self._mode.no_gradients():
                    self._worker.finish()
                    yield
            finally:
                self._rest()

    def _rest(self) -> None:
        raise NotImplementedError
