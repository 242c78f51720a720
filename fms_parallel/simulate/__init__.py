"""A layout without its hardware: one process plays one rank of many and tells what that rank would hold and send.

unreal.py     a model that is cut for a rank of any world, and has shapes but no memory
recorder.py   what happens during a step: memory taken and freed, collectives
ledger.py     what the memory was for, and how much there was when there was most
run.py        `simulate`: the training step that trains, run on such a model, and its numbers
cli.py        `python -m fms_parallel.simulate`

The numbers come from running the library's own code, not from formulas: they are an oracle for the planner's.
"""

from fms_parallel.simulate.run import Collective, Simulation, simulate, stage_ranks

__all__ = ["Collective", "Simulation", "simulate", "stage_ranks"]
