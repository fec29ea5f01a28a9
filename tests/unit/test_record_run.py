# SPDX-License-Identifier: Apache-2.0
"""The README's picture: what the tool draws of a run, and that the one that is there shows the README's commands."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from tests.conftest import ROOT
from tests.pages import commands
from tools.record_run import COMMANDS, Line, draw, record

PICTURE = ROOT / "docs" / "images" / "run.svg"


def texts(picture: str) -> list[str]:
    root = ElementTree.fromstring(picture)  # noqa: S314 - our own
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_run_is_drawn_line_by_line_with_its_exit_code(tmp_path: Path) -> None:
    lines = list(record(["echo '<a> & b'; echo '[worker] of mpirun'; echo '[worker] more'; exit 3"], tmp_path))
    shown = [line.text for line in lines]
    assert shown[1:] == ["<a> & b", "… (mpirun's own lines)", "$ echo $?   # 3", ""]
    assert [line.at for line in lines] == sorted(line.at for line in lines)
    assert texts(draw(lines)) == shown


def test_the_checkouts_path_is_not_in_the_picture(tmp_path: Path) -> None:
    _, line, *_ = record(["echo at $(pwd -P)/x"], tmp_path.resolve())
    assert line.text == "at ~/dynamo_mpi/x"


def test_a_long_line_is_wrapped(tmp_path: Path) -> None:
    _, first, second, *_ = record([f"echo {'word ' * 40}"], tmp_path)
    assert max(len(first.text), len(second.text)) <= 118
    assert second.text.startswith("    ")


def test_nothing_is_fetched_and_the_text_is_there_without_animation() -> None:
    picture = draw([Line(1.0, "a")])
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    assert "prefers-reduced-motion" in picture
    assert 'opacity="0"' not in picture


def test_the_picture_in_the_readme_is_of_the_readme_s_commands() -> None:
    lines = texts(PICTURE.read_text(encoding="utf-8"))
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ") and "echo $?" not in line]
    assert typed == list(COMMANDS)
    first, *_ = commands("README.md", "two-commands")
    assert [first.partition("   #")[0], commands("README.md", "refusal-and-fault")[1]] == typed
    assert "The capital of France is Paris." in lines
    assert [line for line in lines if "echo $?" in line] == ["$ echo $?   # 0", "$ echo $?   # 137"]
    assert "](docs/images/run.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
