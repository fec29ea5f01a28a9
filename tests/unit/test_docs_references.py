# SPDX-License-Identifier: Apache-2.0
"""Files, modules and functions of this project that a page names exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from dynamo_mpi.common.phases import PHASES
from tests.conftest import ROOT
from tests.unit.test_architecture import ORDER, PACKAGE
from tests.unit.test_docs_links import PAGES

_TOP = "dynamo_mpi|tests|tools|scripts|examples|findings"
# `runtime/main.py:exit_process` or `tests/conftest.py`; pages leave dynamo_mpi/ out
_FILE = re.compile(rf"(?<![\w./-])((?:{_TOP}|{'|'.join(ORDER)})/[\w./-]+\.(?:py|sh))(?::([A-Za-z_][\w.]*\w))?")
# docs/source/ is TensorRT-LLM's
_PAGE = re.compile(r"(?<![\w./-])docs/(?!source/)[\w/-]+\.md")
LINKS_TEST = ROOT / "tests" / "unit" / "test_docs_links.py"
_MODULE = re.compile(r"(?<![\w.-])dynamo_mpi(?:\.\w+)+")
# subjects of NATS
_NOT_MODULES = ("dynamo_mpi.v1",)


@cache
def definitions(path: Path) -> frozenset[str]:
    """Return the functions, classes, methods and names that a module defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def missing(text: str) -> list[str]:
    """Return what a page names and this project doesn't have."""
    return [*missing_files(text), *missing_modules(text)]


def missing_files(text: str) -> list[str]:
    bad = []
    for file, name in _FILE.findall(text):
        path = next((path for path in (ROOT / file, PACKAGE / file) if path.is_file()), None)
        if path is None:
            bad.append(file)
        elif name and name not in definitions(path):
            bad.append(f"{file}:{name}")
    return bad


def missing_modules(text: str) -> list[str]:
    bad = []
    for module in _MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        parent = path.parent.with_suffix(".py")
        is_there = path.is_dir() or path.with_suffix(".py").is_file()
        is_name = parent.is_file() and path.name in definitions(parent)
        if not (is_there or is_name or module.startswith(_NOT_MODULES)):
            bad.append(module)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "dynamo_mpi/none.py",
        "`runtime/none.py`",
        "runtime/main.py:none",
        "common/hooks.py:WorkerHook.none",
        "scripts/none.sh",
    ],
)
def test_a_missing_file_or_function_is_found(text: str) -> None:
    assert missing(f"see {text}, and runtime/main.py:main") == [text.strip("`")]


def test_a_missing_module_is_found() -> None:
    text = (
        "dynamo_mpi.worker dynamo_mpi.none dynamo_mpi.common.hooks.WorkerHook dynamo_mpi.v1.NAMESPACE.COMPONENT.EVENT"
    )
    assert missing(f"python -m {text}.") == ["dynamo_mpi.none"]


def test_pages_that_sources_name_exist() -> None:
    """Comments, messages and scripts name pages by their path from the top."""
    folders = ("dynamo_mpi", "tests", "tools", "scripts", "examples", ".ci")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in ("", ".py", ".sh")]
    named = {}
    for path in sources:
        if path.is_file() and path != Path(__file__):
            for page in _PAGE.findall(path.read_text(encoding="utf-8")):
                named[page] = path
    assert len(named) > 10
    assert {page: path for page, path in named.items() if not (ROOT / page).is_file()} == {"docs/none.md": LINKS_TEST}


def test_architecture_lists_packages_and_phases_in_order() -> None:
    page = (ROOT / "docs" / "concepts" / "architecture.md").read_text(encoding="utf-8")
    assert tuple(reversed(re.findall(r"^    (\w+)/ ", page, re.MULTILINE))) == ORDER
    assert tuple(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == PHASES
