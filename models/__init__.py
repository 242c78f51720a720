"""Models by name: `fms_parallel.models`. The code lies in `models/` at the repository root.

To add one: a file beside `llama.py` that ends in `register_model(...)`, its test, and its line below.
"""

if __name__ != "fms_parallel.models":
    raise ImportError("models/ is the package fms_parallel.models: write `from fms_parallel.models import ...`")

from . import gpt_bigcode, granite, llama, mistral, mixtral, qwen3, roberta
from .build import get_config, get_model, get_shape, load_lora, save_hf, save_lora
from .registry import Architecture, list_models, list_sources, list_variants, register_model

__all__ = [
    "Architecture",
    "get_config",
    "get_model",
    "get_shape",
    "gpt_bigcode",
    "granite",
    "list_models",
    "list_sources",
    "list_variants",
    "llama",
    "load_lora",
    "mistral",
    "mixtral",
    "qwen3",
    "register_model",
    "roberta",
    "save_hf",
    "save_lora",
]
