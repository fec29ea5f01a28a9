# SPDX-License-Identifier: Apache-2.0
"""Every refusal says what was expected and how to fix it: all places that make an error or a finding, by the syntax of the modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.conftest import ROOT

PARTS = ("expected", "fix")
# module: the beginnings of its errors that lack a part, and why that is right
_OF_THE_PROTOCOL = "misuse of the engine by its caller, which is ours"
_OF_A_REQUEST = "the answer to one request, for a client that can't fix the worker"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("checks/kv.py", 'f"{counted(len(found), '): "its findings have both",
    ("checks/kv.py", "problems[0]"): "the text of the host's own error, with both",
    ("discovery/record_publisher.py", "text"): "the text of the comparison, with both",
    ("engines/reference/engine.py", 'f"rank {self._rank} cannot start the engine'): _OF_THE_PROTOCOL,
    ("engines/reference/engine.py", '"rank 0 cannot follow'): _OF_THE_PROTOCOL,
    ("engines/reference/engine.py", '"the engine is not loaded yet"'): _OF_THE_PROTOCOL,
    ("engines/reference/engine.py", '"the engine was started or closed before"'): _OF_THE_PROTOCOL,
    ("engines/reference/engine.py", '"the engine is not running"'): _OF_THE_PROTOCOL,
    ("engines/reference/engine.py", '"rank 0 got no logits"'): _OF_THE_PROTOCOL,
    ("engines/reference/engine.py", '"rank 0 has no scheduler'): _OF_THE_PROTOCOL,
    ("engines/reference/kv_transfer.py", "str(error)"): _OF_A_REQUEST,
    ("engines/requests.py", '"this decode worker got a request'): _OF_A_REQUEST,
    ("ops/wait.py", 'f"it serves no completion yet'): "what wait still waits for",
    ("ops/wait.py", 'f"no answer in '): "what wait still waits for",
    ("ops/wait.py", '"something else than a frontend'): "what wait still waits for",
}


@cache
def trees() -> dict[str, tuple[str, ast.Module]]:
    """Return the package's modules: their texts and their syntax."""
    folder = ROOT / "dynamo_mpi"
    texts = {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}
    return {path: (text, ast.parse(text)) for path, text in texts.items()}


@cache
def error_names() -> frozenset[str]:
    """Return the names of all error classes that take ``expected`` and ``fix``; others make their own."""
    classes = [node for _, tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names, count = {"DynamoMpiError"}, 0
    while count < len(names):
        count = len(names)
        names |= {
            node.name
            for node in classes
            if any(isinstance(base, ast.Name) and base.id in names for base in node.bases)
            and all(
                {"expected", "fix"} <= {each.arg for each in part.args.kwonlyargs}
                for part in node.body
                if isinstance(part, ast.FunctionDef) and part.name == "__init__"
            )
        }
    return frozenset(names)


def incomplete(source: str, tree: ast.Module) -> Iterator[tuple[str, int, list[str]]]:
    """Yield what errors and findings of a module begin with, their lines and what they lack."""
    findings = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "dynamo_mpi.layout.finding"
        for name in node.names
        if name.name in ("error", "warning")
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in error_names() and not (name in findings and isinstance(node.func, ast.Name)):
            continue
        given = {keyword.arg for keyword in node.keywords}
        lacks = [part for part in PARTS if part not in given]
        if lacks and None not in given:  # **parts
            text = ast.get_source_segment(source, node.args[-1]) if node.args else None
            yield text or "", node.lineno, lacks


def excepted(path: str, text: str) -> tuple[str, str] | None:
    return next((key for key in EXCEPTIONS if key[0] == path and text.startswith(key[1])), None)


def test_every_error_and_finding_has_both() -> None:
    found = [
        f"{path}:{line}: {text[:60]} lacks {' and '.join(lacks)}"
        for path, module in trees().items()
        for text, line, lacks in incomplete(*module)
        if excepted(path, text) is None
    ]
    assert found == []


def test_every_exception_is_needed() -> None:
    used = {excepted(path, text) for path, module in trees().items() for text, _, _ in incomplete(*module)}
    assert set(EXCEPTIONS) - used == set()


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ('raise UsageError("x", expected="y", fix="z")', []),
        ('raise UsageError("x", fix="z")', [["expected"]]),
        ('raise errors.UsageError(f"{x}")', [["expected", "fix"]]),
        ("raise UsageError('x', **parts)", []),
        ("from dynamo_mpi.layout.finding import error\nyield_ = error('B1', 'x', fix='y')", [["expected"]]),
        ("error('B1', 'x')", []),
    ],
)
def test_what_is_found(source: str, lacks: list[list[str]]) -> None:
    assert [found for _, _, found in incomplete(source, ast.parse(source))] == lacks
