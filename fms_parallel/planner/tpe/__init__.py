"""transformer-perf-estimates (arXiv 2410.00273): its layers, its collectives, its search, number for number.

`Rules(compat=True)` keeps its mistakes, so that published results can be reproduced; without it they are corrected
(`rules.CORRECTIONS` lists them). Units are its own: GB (1e9), TFLOP, seconds.
"""
