"""`python -m fms_parallel.planner` is `fms-plan`."""

from fms_parallel.planner.cli import console

if __name__ == "__main__":
    console()
