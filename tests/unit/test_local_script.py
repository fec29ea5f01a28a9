# SPDX-License-Identifier: Apache-2.0
"""``scripts/local.sh`` on a fresh clone, up to where the network would come in."""

from __future__ import annotations

import shutil
import subprocess
import sys
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


def run(clone: Path, *words: str, python: Path | str, script: str = "local.sh") -> subprocess.CompletedProcess[str]:
    command = [str(clone / "scripts" / script), *words]
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


@pytest.mark.parametrize(
    ("script", "words", "meant"),
    [
        ("local.sh", ["--hepl"], "--help"),
        ("local.sh", ["--ask", "x", "--kep"], "--keep"),
        ("local.sh", ["--tp", "0"], ""),
        ("test.sh", ["--hepl"], "--help"),
        ("test.sh", ["tests/unit", "--stge=fast"], "--stage"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_installed(
    script: str, words: list[str], meant: str, clone: Path
) -> None:
    (clone / "dynamo_mpi").symlink_to(ROOT / "dynamo_mpi")
    result = run(clone, *words, python=sys.executable, script=script)
    assert (result.returncode, (clone / ".venv").exists()) == (64, False), result.stderr
    assert "expected:" in result.stderr and "fix:" in result.stderr
    assert f"is {meant} meant?" in result.stderr or not meant


@pytest.fixture
def shared(clone: Path, tmp_path: Path) -> Path:
    """The environment of another checkout, which the clone's .venv is a link to; its programs print what they are run with."""
    venv = tmp_path / "other" / ".venv"
    for name in ("dynamo-mpi", "python"):
        write_program(venv / "bin" / name, f'echo "{name} $PYTHONPATH $*"; exit 7')
    site = venv / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    (site / "_editable_impl_dynamo_mpi.pth").write_text(f"{tmp_path / 'other'}\n")
    (clone / ".venv").symlink_to(venv)
    return venv


def test_another_checkouts_environment_is_not_changed(clone: Path, shared: Path) -> None:
    result = run(clone, python="true")
    assert (result.returncode, result.stdout) == (64, "")
    assert f"is a link to the environment of {shared.parent}" in result.stderr
    assert "expected:" in result.stderr and f"fix:      rm {clone}/.venv" in result.stderr


def test_another_checkouts_environment_with_the_same_packages_runs_this_ones_code(clone: Path, shared: Path) -> None:
    checksum = subprocess.run(["cksum"], stdin=(clone / "pyproject.toml").open(), capture_output=True, text=True)
    (shared / "dynamo-mpi-local.stamp").write_text(checksum.stdout)
    result = run(clone, "--keep", python="false")
    assert (result.returncode, result.stdout) == (7, f"dynamo-mpi {clone} local --keep\n"), result.stderr
    assert f"the packages are those of {shared.parent}" in result.stderr


def test_a_link_to_this_checkouts_own_environment_is_one_like_any_other(
    clone: Path, shared: Path, tmp_path: Path
) -> None:
    (shared / "lib/python3.12/site-packages/_editable_impl_dynamo_mpi.pth").write_text(str(clone))
    assert "is a link" not in run(clone, python="true").stderr


def test_help_installs_nothing(clone: Path) -> None:
    result = run(clone, "--help", python="false")
    assert result.returncode == 0
    assert "scripts/local.sh --ask" in result.stdout
