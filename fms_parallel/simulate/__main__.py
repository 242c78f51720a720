"""`python -m fms_parallel.simulate`."""

from fms_parallel.cli import run
from fms_parallel.simulate.cli import main

run(main)
