"""FASOP (HPDC 2024): its profiles, its pipeline with blocking sends, its partitions, its ranked tables.

`compat=True` keeps its mistakes, so that its tables can be reproduced; the rest of the planner does not share them.
Units are its own: milliseconds in profiles, bits per second on wires, GB of 2^30 bytes.
"""
