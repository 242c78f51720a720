"""Generation: one call for a batch of prompts (`generate`), or an engine for many requests (`InferenceEngine`).

request.py, options.py, intake.py   what is asked for, checked before anything is computed
cache.py                            `generate`'s keys and values, allocated once
kv_manager.py, paged.py             the engine's: their memory, and which row has which of it
sampling.py, vocabulary.py, sampler.py   logits -> distribution -> token, the same in every layout
ranks.py, commands.py               all ranks continue with the same tokens, and hear of the same requests
loop.py                             `generate`: one forward per new token
ragged.py, runner.py                one forward of rows of any lengths
scheduler.py, worker.py, row.py      which rows take part in a step; a step; a request on its way
channel.py, staged.py, sockets.py    pipeline stages with several steps under way; sums between ranks of one host
transformers_model.py, transformers_stages.py   their modules, our cache; over tp and pipeline stages
weights.py, kernels.py, compiled.py  how matrices lie and are read for few rows, and which is fastest here
engine.py, setup.py, report.py      the engine, what it is made of, what it holds
handle.py, text.py                  a request as its owner sees it; text that grows
speculative.py, draft.py            several tokens per forward
beam.py, two_phase.py, tables.py    beam search, and loops that callers write themselves
"""

from fms_parallel.inference.beam import Hypothesis
from fms_parallel.inference.cache import KVCache
from fms_parallel.inference.draft import DraftModel
from fms_parallel.inference.engine import InferenceEngine
from fms_parallel.inference.handle import Completion, Event, Handle
from fms_parallel.inference.kv_manager import KVCacheManager
from fms_parallel.inference.loop import CausalModel, generate, generate_text
from fms_parallel.inference.report import Counts, MemoryReport
from fms_parallel.inference.sampling import Sampling
from fms_parallel.inference.speculative import PromptLookup
from fms_parallel.inference.two_phase import ScheduleGeneration

__all__ = [
    "CausalModel",
    "Completion",
    "Counts",
    "DraftModel",
    "Event",
    "Handle",
    "Hypothesis",
    "InferenceEngine",
    "KVCache",
    "KVCacheManager",
    "MemoryReport",
    "PromptLookup",
    "Sampling",
    "ScheduleGeneration",
    "generate",
    "generate_text",
]
