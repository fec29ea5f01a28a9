# SPDX-License-Identifier: Apache-2.0
"""``scripts/local.sh`` on a fresh clone, up to where the network would come in."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout without a .venv, in a folder with a space."""
    clone = tmp_path / "a clone"
    clone.mkdir()
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    shutil.copy(ROOT / "pyproject.toml", clone)
    return clone


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run(clone: Path, *words: str, python: Path | str) -> subprocess.CompletedProcess[str]:
    command = [str(clone / "scripts" / "local.sh"), *words]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_an_old_python_is_refused(clone: Path) -> None:
    result = run(clone, python="false")
    assert result.returncode == 64
    assert "PYTHON=false is not a Python 3.10 or newer" in result.stderr
    assert not (clone / ".venv").exists()


def test_a_missing_venv_module_is_named(clone: Path, tmp_path: Path) -> None:
    python = write_program(tmp_path / "python", 'case "$2" in *venv*) exit 1 ;; esac')
    result = run(clone, python=python)
    assert result.returncode == 64
    assert "has no venv module" in result.stderr
    assert "apt-get install python3-venv" in result.stderr


def test_what_is_installed_is_not_installed_again_and_gets_the_words(clone: Path) -> None:
    write_program(clone / ".venv" / "bin" / "dynamo-mpi", 'printf "<%s>" "$@"; exit 7')
    checksum = subprocess.run(["cksum"], stdin=(clone / "pyproject.toml").open(), capture_output=True, text=True)
    (clone / ".venv" / "dynamo-mpi-local.stamp").write_text(checksum.stdout)
    result = run(clone, "--ask", "two words", "", python="false")
    assert (result.returncode, result.stdout) == (7, "<local><--ask><two words><>")


def test_a_changed_pyproject_is_installed_anew(clone: Path) -> None:
    write_program(clone / ".venv" / "bin" / "dynamo-mpi", "exit 7")
    (clone / ".venv" / "dynamo-mpi-local.stamp").write_text("an older one")
    assert run(clone, python="false").returncode == 64


def test_help_installs_nothing(clone: Path) -> None:
    result = run(clone, "--help", python="false")
    assert result.returncode == 0
    assert "scripts/local.sh --ask" in result.stdout
