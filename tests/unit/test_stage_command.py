# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi stage``: what is listed, what is removed, what stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.stage.manifest import scan
from dynamo_mpi.stage.store import Store
from tests.unit.test_stage_store import copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the copies."""
    return tmp_path / "local"


def stage(folder: Path, name: str) -> tuple[str, int]:
    """Make a copy of a model; return its name and its lock."""
    model = folder.parent / name
    model.mkdir()
    (model / "w").write_bytes(bytes(1000))
    manifest = scan(str(model))
    return manifest.folder_name, copy(Store(str(folder)), manifest)


def test_copies_are_listed_and_removed_unless_a_worker_uses_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_MPI_STAGE", str(folder))
    (first, lock), (second, in_use) = stage(folder, "a"), stage(folder, "b")
    os.close(lock)
    assert main(["stage"]) == 0
    text = capsys.readouterr().out
    assert f"  {first}  0.0 GiB  used " in text
    assert f"  {second}  0.0 GiB  in use, of {folder.parent / 'b'}" in text
    assert main(["stage", "--unstage", "all"]) == 75
    assert f"in use and kept: {second}" in capsys.readouterr().out
    assert main(["stage", "--output", "json"]) == 0
    (left,) = json.loads(capsys.readouterr().out)["copies"]
    assert (left["name"], left["in_use"], left["size"]) == (second, True, 1000)
    os.close(in_use)
    assert main(["stage", "--unstage", second]) == 0
    assert Store(str(folder)).entries() == []


def test_what_isn_t_there_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage"]) == 64
    assert "no folder was given" in capsys.readouterr().err
    assert main(["stage", "--stage", str(folder)]) == 64
    assert f"there is no folder {folder}" in capsys.readouterr().err
    assert not folder.exists()
    folder.mkdir()
    assert main(["stage", "--stage", str(folder), "--unstage", "x"]) == 64
    assert "there is no copy x in" in capsys.readouterr().err
