"""The HTML report: well-formed, complete, and nothing in it needs a network; a browser sorts it if there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fms_parallel.planner.cli import main

JOB = ["--model", "llama:3.1-70b", "--gpus", "h100:64", "--global-batch", "256", "--seq", "8192", "--top", "5"]
VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Balance(HTMLParser):
    """Collects tags and fails on one that is closed wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "plan.html"
    assert main(["search", *JOB, "--html", str(path)]) == 0
    return path


def test_page_is_balanced_complete_and_needs_no_network(page: Path) -> None:
    text = page.read_text()
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.seen.count("tr") == 6 and parser.seen.count("svg") >= 3
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "torchrun" in text and "does not fit in memory" in text
    assert [p.name for p in page.parent.iterdir()] == ["plan.html"]


def test_report_command_writes_the_same_page(tmp_path: Path, page: Path) -> None:
    other = tmp_path / "other.html"
    main(["report", *JOB, "--html", str(other)])
    times = re.compile(r"\(\d+\.\d+ s\)")
    assert times.sub("", other.read_text()) == times.sub("", page.read_text())


def test_the_schedule_says_how_many_micro_batches_are_drawn_and_points_name_every_rank(page: Path) -> None:
    text = page.read_text()
    first = re.search(r'<td data-value="1">1 x (\d+)</td><td data-value="pp=(\d+),', text)
    assert first is not None and int(first[1]) > 4 * int(first[2])
    assert f"with {4 * int(first[2])} of its {first[1]} micro-batches: " in text
    named = [rank for words in re.findall(r"<title>([\d, ]+): [\d.]+ s, ", text) for rank in words.split(", ")]
    assert sorted(named) == ["1", "2", "3", "4", "5"]


def test_a_browser_sorts_the_table(page: Path, tmp_path: Path) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    clicked = tmp_path / "clicked.html"
    click = "<script>document.querySelectorAll('th')[0].click();document.querySelectorAll('th')[0].click()</script>"
    clicked.write_text(page.read_text().replace("</body>", click + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    out = subprocess.run([browser, *flags, clicked.as_uri()], capture_output=True, text=True, timeout=60).stdout
    ranks = re.findall(r'<tr[^>]*><td data-value="(\d+)"', out)
    assert ranks == ["5", "4", "3", "2", "1"]
