# SPDX-License-Identifier: Apache-2.0
"""The order of packages: each imports only what stands below it, in lazy imports and in those for types alone as well."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "dynamo_mpi"
ORDER = (
    *("common", "layout", "mpi", "config", "discovery", "engines", "supervisor"),
    *("checks", "stage", "telemetry", "runtime", "deploy", "ops", "cli"),
)
ENTRY_POINTS = {"__init__", "__main__", "worker", "head_node", "pods"}


MOST_LINES, LEAST_LINES = 350, 40
LONG = {
    "config/worker_options.py": "a table of options",
    "runtime/leader.py": "rank 0's life, read from its start to its end",
}
SHORT = {
    "__main__.py": "an entry point",
    "worker.py": "an entry point",
    "head_node.py": "an entry point",
    "pods.py": "an entry point",
    "runtime/rank_binding.py": "all ranks have it; what it calls is imported only where ranks are bound",
    "common/codec.py": "every rank imports it before the preflight result",
    "supervisor/context.py": "every rank imports it before the preflight result",
}


def level(package: str) -> int:
    return len(ORDER) if package in ENTRY_POINTS else ORDER.index(package)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def find_cycle(graph: Mapping[str, Collection[str]]) -> list[str] | None:
    """Return a path that leads back to its start, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # from the imported one to who imports it
        return list(reversed(error.args[1]))
    return None


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the name, without ``dynamo_mpi``, of each module of ours that is imported, also within functions and for types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else ["dynamo_mpi.?"]
            modules += [node.module or "?"]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            head, _, rest = module.partition(".")
            if head == "dynamo_mpi" and rest not in ("", "__version__"):
                yield node.lineno, rest


def packages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the package of each import of ours."""
    yield from ((line, module.partition(".")[0]) for line, module in imports(path))


def test_every_package_is_in_the_order() -> None:
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert found == {*ORDER, *ENTRY_POINTS}


def test_no_package_imports_upward() -> None:
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {own} imports {other}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, other in packages(path)
        if level(own := path.relative_to(PACKAGE).parts[0].removesuffix(".py")) < level(other)
    ]
    assert upward == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Neither at run time nor for types alone: where one needs a type of another that uses it, the type belongs below both."""
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
    graph = {name: {other for _, other in imports(path)} & paths.keys() for name, path in paths.items()}
    assert (cycle := find_cycle(graph)) is None, " -> ".join(cycle)


def test_a_cycle_of_modules_is_found() -> None:
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


def test_nothing_imports_an_entry_point() -> None:
    users = [path.name for path in PACKAGE.rglob("*.py") for _, other in packages(path) if other in ENTRY_POINTS]
    assert users == []


def test_modules_are_neither_long_nor_short() -> None:
    sizes = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    long = {name: lines for name, lines in sizes.items() if lines > MOST_LINES}
    short = {name: lines for name, lines in sizes.items() if lines < LEAST_LINES and not name.endswith("__init__.py")}
    assert {name for name in long if name not in LONG} == set(), "split them, or say the same in fewer lines"
    assert {name for name in short if name not in SHORT} == set(), "put them to the module of their subject"
    assert not (LONG.keys() | SHORT.keys()) - sizes.keys(), "they are gone"


@pytest.mark.parametrize("package", ["layout", "engines/reference"])
def test_a_package_s_map_has_each_of_its_modules_once(package: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    rows = re.findall(r"^ {4}(\S.*(?:\n {5,}\S.*)*)", text, re.MULTILINE)
    mapped: list[str] = []
    for row in rows:
        first, *others = re.split(r";\s+", row)
        mapped += re.split(r" {2,}", first)[0].split(", ")
        mapped += [name for other in others for name in other.partition(":")[0].split(", ")]
    modules = [path.stem for path in (PACKAGE / package).glob("*.py") if path.stem != "__init__"]
    folders = [f"{path.parent.name}/" for path in (PACKAGE / package).glob("*/__init__.py")]
    assert sorted(mapped) == sorted([*modules, *folders])
