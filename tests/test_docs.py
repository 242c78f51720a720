"""The documents say what is there: flags, files, links and layout strings in them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from fms_parallel.auto.table import build_parser as table_parser
from fms_parallel.layout import ParallelLayout
from fms_parallel.simulate.cli import build_parser as simulate_parser
from fms_parallel.verify import build_parser as verify_parser
from scripts import benchmark_inference, convert_checkpoint, inference, train_causal, train_hf_pipeline, train_masked

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}

COMMANDS = {
    "scripts/train_causal.py": train_causal.build_parser,
    "scripts/train_masked.py": train_masked.build_parser,
    "scripts/train_hf_pipeline.py": train_hf_pipeline.build_parser,
    "scripts/inference.py": inference.build_parser,
    "scripts/benchmark_inference.py": benchmark_inference.build_parser,
    "scripts/convert_checkpoint.py": convert_checkpoint.build_parser,
    "-m fms_parallel.verify": verify_parser,
    "-m fms_parallel.auto.table": table_parser,
    "-m fms_parallel.simulate": simulate_parser,
}


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", TEXTS)
def test_commands_use_flags_that_exist(page: str) -> None:
    launcher = {word for action in torchrun_parser()._actions for word in action.option_strings}
    for block in blocks(TEXTS[page]):
        for line in block.replace("\\\n", " ").splitlines():
            for name, parser in COMMANDS.items():
                if name in line:
                    known = {word for action in parser()._actions for word in action.option_strings} | launcher
                    known |= {"--architecture", "--variant"}  # verify passes them on
                    flags = re.findall(r"(?<=\s)--[a-z][\w]*", line)
                    assert set(flags) <= known, line


@pytest.mark.parametrize("page", TEXTS)
def test_layouts_in_commands_and_code_parse(page: str) -> None:
    written = r"--distributed (\S+)|distributed_strategy=\"([^\"]+)\"|Layout\.parse\(\"([^\"]+)\"\)"
    for word in re.findall(written, TEXTS[page]):
        layout = next(filter(None, word))
        if layout not in ("LAYOUT", "`", "auto"):
            ParallelLayout.parse(layout)


@pytest.mark.parametrize("page", TEXTS)
def test_python_examples_compile(page: str) -> None:
    for block in blocks(TEXTS[page], "python"):
        compile(block, page, "exec")


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXTS[page]):
        assert (folder / link).exists(), link
    for name in re.findall(r"`((?:fms_parallel|models|tests|scripts|docs|benchmarks)/[\w./]+\.\w+)`", TEXTS[page]):
        assert (ROOT / name).exists(), name
