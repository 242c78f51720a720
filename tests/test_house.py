"""The rules of the house, held by reading the source: imports go down, the library knows no model, nothing prints.

A rule is a function from sources to offences, each opening with `file:line`, so that it can be shown to catch a made-up
one. What the rules are and why: the floors of the house in ARCHITECTURE.md.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]

FACE = "fms_parallel"
FLOORS = {
    **dict.fromkeys((FACE, "layout", "fit", "nearest", "words", "schedules", "schedule_file", "shape", "phases"), 1),
    **dict.fromkeys(("errors", "log", "compat", "cli"), 1),
    **dict.fromkeys(("distributed", "data", "tokenizers"), 2),
    **dict.fromkeys(("modules", "planner"), 3),
    **dict.fromkeys(("strategy", "checkpoint"), 4),
    **dict.fromkeys(("training", "inference", "auto", "verify", "simulate"), 5),
    **dict.fromkeys(("models", "dynamic"), 6),
    **dict.fromkeys(("scripts", "benchmarks"), 7),
}
"""Room -> floor. A room is a folder or a single file of the library; the face is `fms_parallel/__init__.py`."""

MODELS_NAME = re.compile(r"(fms_parallel)?\.models(\.\w+)*(:\w+)?")
"""A string that importlib could turn into a model."""

Sources = Mapping[str, str]
"""Path from the root -> text."""


class Import(NamedTuple):
    """One imported name: where it stands, in which room, what it names in full, and that name's room.

    `other` is `""` for a name that is not of this house; `dots` counts those of a relative import.
    """

    place: str
    room: str
    target: str
    other: str
    dots: int


def python_files(*folders: str) -> Iterator[Path]:
    """Every Python file in these folders of the root, each once: links are not followed."""
    for folder in folders:
        for parent, _, names in os.walk(ROOT / folder, followlinks=False):
            yield from (Path(parent, name) for name in names if name.endswith(".py"))


def read_house() -> Sources:
    """The library, the models and the scripts."""
    files = python_files(FACE, "models", "scripts", "benchmarks")
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(files)}


def nodes(sources: Sources) -> Iterator[tuple[str, ast.AST]]:
    """Every node of every file, with the file's path."""
    for path, text in sources.items():
        yield from ((path, node) for node in ast.walk(ast.parse(text, path)))


def module_of(path: str) -> tuple[str, ...]:
    """`models/llama.py` -> (fms_parallel, models, llama); a package goes by its own name, without `__init__`."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return (FACE, *parts) if parts[0] == "models" else tuple(parts)


def room_of(module: tuple[str, ...]) -> str:
    """The room of a module or of a name in it, `""` when it is not of this house."""
    if module[0] != FACE:
        return module[0] if module[0] in ("models", "scripts", "benchmarks") else ""
    return module[1] if len(module) > 1 and module[1] in FLOORS else FACE


def imports(sources: Sources) -> Iterator[Import]:
    """Every import, also deferred ones and those for type checkers; relative ones are resolved."""
    for path, node in nodes(sources):
        base: tuple[str, ...] = ()
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.ImportFrom):
            package = module_of(path) if path.endswith("/__init__.py") else module_of(path)[:-1]
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
        dots = getattr(node, "level", 0)
        for alias in node.names:
            target = (*base, *alias.name.split("."))
            yield Import(f"{path}:{node.lineno}", room_of(module_of(path)), ".".join(target), room_of(target), dots)


def crossings(sources: Sources) -> list[Import]:
    """The imports that go from one room into another."""
    return [one for one in imports(sources) if one.other and one.other != one.room]


# ---- the rules --------------------------------------------------------------------------------------------------


def library_that_knows_models(sources: Sources) -> list[str]:
    """Imports of models by the library, and strings that are a model module's name (importlib, lazy tables)."""
    library = {path: text for path, text in sources.items() if path.startswith(f"{FACE}/")}
    return [f"{one.place} imports {one.target}" for one in imports(library) if one.other == "models"] + [
        f"{path}:{node.lineno} names {node.value!r}"
        for path, node in nodes(library)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MODELS_NAME.fullmatch(node.value)
    ]


def upward_imports(sources: Sources) -> list[str]:
    """Imports from a higher floor."""
    return [
        f"{one.place} imports {one.target}, up from floor {FLOORS[one.room]} to {FLOORS[one.other]}"
        for one in crossings(sources)
        if FLOORS[one.other] > FLOORS[one.room]
    ]


def circles(sources: Sources) -> list[str]:
    """The first circle of rooms, one import for each of its steps."""
    steps = {(one.room, one.other): f"{one.place} imports {one.target}" for one in crossings(sources)}
    needs: dict[str, set[str]] = {}
    for room, other in steps:
        needs.setdefault(room, set()).add(other)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = error.args[1]  # each room is imported by the next
        return [steps[room, other] for other, room in pairwise(circle)]
    return []


def rooms_without_a_floor(sources: Sources) -> list[str]:
    """Rooms of the library that FLOORS does not list: their imports would go unread."""
    return [
        f"{path}:1 is in a room without a floor"
        for path in sources
        if path.startswith(f"{FACE}/") and path != f"{FACE}/__init__.py" and module_of(path)[1] not in FLOORS
    ]


def badly_written_model_imports(sources: Sources) -> list[str]:
    """In `models/`, siblings are imported relatively and the library absolutely: no tool misreads that."""
    return [
        f"{one.place} imports {one.target}: a sibling relatively, the library absolutely"
        for one in imports(sources)
        if one.room == "models" and one.other and (one.other == "models") != (one.dots > 0)
    ]


def prints(sources: Sources) -> list[str]:
    """Calls of `print` in the library and the models: scripts decide what a person sees."""
    return [
        f"{path}:{node.lineno} prints"
        for path, node in nodes(sources)
        if path.startswith((f"{FACE}/", "models/"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


RULES: tuple[Callable[[Sources], list[str]], ...] = (
    library_that_knows_models,
    upward_imports,
    circles,
    rooms_without_a_floor,
    badly_written_model_imports,
    prints,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Callable[[Sources], list[str]]) -> None:
    offences = rule(read_house())
    assert not offences, f"{rule.__doc__}\n" + "\n".join(offences)


LOOP, LLAMA = "fms_parallel/training/loop.py", "models/llama.py"


@pytest.mark.parametrize(
    ("rule", "sources", "first_offence"),
    [
        (library_that_knows_models, {LOOP: "import fms_parallel.models"}, f"{LOOP}:1"),
        (library_that_knows_models, {LOOP: "\nfrom fms_parallel import models"}, f"{LOOP}:2"),
        (library_that_knows_models, {LOOP: "def f():\n  from ..models.llama import x"}, f"{LOOP}:2"),
        (library_that_knows_models, {LOOP: "import models"}, f"{LOOP}:1"),
        (library_that_knows_models, {LOOP: "f('fms_parallel.models.llama')"}, f"{LOOP}:1"),
        (library_that_knows_models, {LOOP: "f('.models:get_model', 'fms_parallel')"}, f"{LOOP}:1"),
        (upward_imports, {"fms_parallel/layout.py": "import os\nfrom .strategy import x"}, "fms_parallel/layout.py:2"),
        (upward_imports, {"fms_parallel/__init__.py": "from .training.loop import x"}, "fms_parallel/__init__.py:1"),
        (upward_imports, {LLAMA: "from scripts import x"}, f"{LLAMA}:1"),
        (
            circles,
            {
                "fms_parallel/data/a.py": "from fms_parallel.tokenizers import x",
                "fms_parallel/tokenizers.py": "from .data.a import y",
            },
            "fms_parallel/",
        ),
        (rooms_without_a_floor, {"fms_parallel/attic/a.py": ""}, "fms_parallel/attic/a.py:1"),
        (badly_written_model_imports, {LLAMA: "from ..modules import x"}, f"{LLAMA}:1"),
        (badly_written_model_imports, {LLAMA: "from fms_parallel.models.roberta import x"}, f"{LLAMA}:1"),
        (prints, {LLAMA: "def f():\n  print(1)"}, f"{LLAMA}:2"),
    ],
)
def test_a_made_up_offence_is_caught(
    rule: Callable[[Sources], list[str]], sources: Sources, first_offence: str
) -> None:
    assert [offence.startswith(first_offence) for offence in rule(sources)][:1] == [True]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_imports_that_go_down_are_no_offence(rule: Callable[[Sources], list[str]]) -> None:
    house = {
        LOOP: '"""Knows nothing of fms_parallel.models."""\nimport torch\nfrom fms_parallel import ParallelLayout',
        LLAMA: "from .registry import x\nfrom fms_parallel.modules.attention import y",
        "models/hf/llama.py": "from ..llama import x",
        "scripts/train_causal.py": "from fms_parallel.models import get_model\nprint(get_model)",
    }
    assert rule(house) == []


# ---- the models' place ------------------------------------------------------------------------------------------


def test_bare_models_is_refused_with_the_right_name() -> None:
    with pytest.raises(ImportError, match=r"^models/ is the package fms_parallel\.models: write "):
        importlib.import_module("models")
    assert importlib.import_module("fms_parallel.models").__name__ == "fms_parallel.models"


def test_link_to_models_is_relative() -> None:
    """A link that every clone has, wherever it lies."""
    link = ROOT / FACE / "models"
    assert link.is_symlink(), f"{link} is not a link: was it checked out as text (git config core.symlinks)?"
    assert os.readlink(link) == os.path.join("..", "models")


def test_face_needs_no_torch() -> None:
    """Read in a fresh interpreter: this one has torch already."""
    code = "import sys; from fms_parallel import ParallelLayout; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- the wheel --------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Distribution:
    """What `setup.py` describes, without building it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    from distutils.core import run_setup  # setuptools' own copy

    return run_setup("setup.py", stop_after="init")


def test_wheel_holds_every_package_there_is(wheel: Distribution) -> None:
    folders = {
        ".".join(module_of(f"{path.parent.relative_to(ROOT).as_posix()}/__init__.py"))
        for path in python_files(FACE, "models")
    }
    assert sorted(wheel.packages) == sorted(folders)


def test_wheel_takes_models_from_their_real_place(wheel: Distribution) -> None:
    assert wheel.package_dir["fms_parallel.models"] == "models"
