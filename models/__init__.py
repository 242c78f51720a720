"""Models by name: `fms_parallel.models`. The code lies in `models/` at the repository root."""

if __name__ != "fms_parallel.models":
    raise ImportError("models/ is the package fms_parallel.models: write `from fms_parallel.models import ...`")
