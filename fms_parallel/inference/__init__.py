"""Generation: what is asked, the cache, sampling, and the loop that joins them.

request.py    what one call asks for, checked before anything is computed
cache.py      keys and values of earlier tokens, allocated once
sampling.py   logits -> distribution -> token, a row at a time and the same in every layout
ranks.py      all ranks continue with the same tokens
loop.py       one forward per new token
"""

from fms_parallel.inference.cache import KVCache
from fms_parallel.inference.loop import CausalModel, generate, generate_text
from fms_parallel.inference.sampling import Sampling

__all__ = ["CausalModel", "KVCache", "Sampling", "generate", "generate_text"]
