# SPDX-License-Identifier: Apache-2.0
"""How the property tests run, and an etcd for the tests of operators' commands."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, settings

from tests.certificates import certificates, without_certificate
from tests.servers import running_etcd, running_secured_etcd
from tests.unit.board import Board, running_board
from tests.unit.slurm_commands import SlurmCommands

# by default an example that takes 200 ms fails its test, which on a busy machine any may
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def shared_board() -> Iterator[Board]:
    """An etcd for many tests."""
    with running_board() as board:
        yield board


@pytest.fixture
def clean_board(shared_board: Board, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Board:
    """It with nothing in it, and an environment that names it and no other, in a folder with nothing in it."""
    shared_board.wipe()
    for name in os.environ:
        if name.startswith(("ETCD_", "NATS_", "SLURM_", "HEAD_NODE", "DYN_MPI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ETCD_ENDPOINTS", shared_board.url)
    monkeypatch.chdir(tmp_path)
    return shared_board


@pytest.fixture(scope="module")
def etcd() -> Iterator[str]:
    """An etcd of the module's own; the value is its address."""
    with running_etcd() as url:
        yield url


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmCommands:
    """Stand-ins for Slurm's commands, first on PATH."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return SlurmCommands(folder)


@pytest.fixture
def secured_etcd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An etcd that takes clients with a certificate alone, named by an environment without one; yields the variables of one that it takes."""
    files = certificates(tmp_path / "tls")
    with running_secured_etcd(files) as url:
        for name, value in {"ETCD_ENDPOINTS": url, **without_certificate(files)}.items():
            monkeypatch.setenv(name, value)
        yield files.client_environment()


@pytest.fixture(scope="session")
def tiny_tokens(tiny_model_dir: Path) -> list[list[int]]:
    """The tokens that the tiny model makes of each golden prompt alone, with its prompt in one step."""
    from tests.unit.test_reference_engine import PROMPTS, build, submit

    engine = build(tiny_model_dir, max_batch_size=1, max_seq_len=160)
    engine.start()
    try:
        return [submit(engine, prompt=prompt, max_tokens=40).done().tokens for prompt in PROMPTS]
    finally:
        engine.close()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp, in which every user may make files; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory(prefix="shared-") as text:
        folder = Path(text)
        folder.chmod(0o1777)
        yield folder


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this user have no home directory: no HOME, and no entry in the system's list of users."""

    def getpwuid(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
