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
    assert main(["stage", "--stage", str(folder), "--unstage", "../etc"]) == 64
    assert "there is no copy ../etc in" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    assert main(["stage", "--stage", str(folder)]) == 0
    assert ": 0 copies, 0.0 GiB, in " in capsys.readouterr().out
    assert list(folder.iterdir()) == []
    stage(folder, "a")
    assert main(["stage", "--stage", str(folder), "--unstage", "../etc"]) == 64
    assert "expected: a-" in capsys.readouterr().err


def test_a_step_beside_the_job_s_others_stages_on_nodes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = ["stage", str(tmp_path), "--stage", str(folder), "--nodes", "n[2-3]"]
    assert main([*words, "--dry-run", "--mpi", "pmix_v4"]) == 0
    line = capsys.readouterr().out
    # Slurm's PMIx plugin takes a node's index in the step for that in the job
    assert line.startswith("SLURM_JOB_NODELIST=n2,n3 ")
    assert "--jobid=7" in line
    assert "--overlap --mpi=pmix_v4 --nodes=2 --nodelist=n2,n3 --ntasks=2 --ntasks-per-node=1" in line
    assert f"-m dynamo_mpi.worker --only-stage --model {tmp_path} --stage {folder}" in line
    monkeypatch.setenv("PATH", "")
    assert main(words) == 64
    assert "srun can't be run: No such file or directory" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert main(words) == 64
    assert "mpirun --host n2,n3 --map-by ppr:1:node -n 2 " in capsys.readouterr().err
    assert main(["stage", "--stage", str(folder), "--nodes", "n2"]) == 64
    assert "--nodes and --dry-run are for copying a model" in capsys.readouterr().err
