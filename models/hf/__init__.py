"""What all Hugging Face model folders have in common; each architecture's own fields and keys are in its file.

`to_hf_api(model)` is the way back: one of our models as a `transformers` model.
"""

from typing import Any

__all__ = ["to_hf_api"]


def __getattr__(name: str) -> Any:
    """`to_hf_api` comes when it is asked for: it stands above `get_model`, which reads this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .api import to_hf_api

    return to_hf_api
