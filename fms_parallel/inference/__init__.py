"""Generation: what is asked, the cache, sampling, and the loop that joins them.

request.py    what one call asks for, checked before anything is computed
cache.py      keys and values of earlier tokens, allocated once
sampling.py   logits -> distribution -> token, a row at a time and the same in every layout
ranks.py      all ranks continue with the same tokens
generate.py   the loop
"""
