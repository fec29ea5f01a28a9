# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi stage``: what is listed, what is removed, what stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.ops.doctor.check import Check, Context, Status
from dynamo_mpi.ops.doctor.staged import check_staged
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


def test_doctor_shows_what_is_staged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(**environ: str) -> list[Check]:
        return list(check_staged(Context(environ)))

    variable = {"DYN_MPI_STAGE": str(folder)}
    assert check() == check(DYN_MPI_STAGE="none") == []
    assert check(**variable) == [Check("staged", Status.OK, f"nothing: {folder} isn't there yet")]
    (misspelt,) = check(DYN_MPI_STAGE=f"{folder}/me")
    assert (misspelt.status, misspelt.found) == (
        Status.WARNING,
        f"there is no {folder}, in which workers would create {folder}/me",
    )
    folder.mkdir(0o700)
    assert list(folder.iterdir()) == []
    (first, lock), (_, in_use) = stage(folder, "a"), stage(folder, "b")
    os.close(lock)
    (whole,) = check(SLURM_TMPDIR=str(folder))
    assert whole.status is Status.OK
    lines = whole.found.splitlines()
    assert lines[0].startswith(f"2 copies, 0.0 GiB, in {folder}/dynamo-mpi-")
    assert lines[1].startswith(f"{first}  0.0 GiB  used ")
    assert lines[2].endswith(f"in use, of {folder.parent / 'b'}")
    copied = Path(Store(str(folder)).copy_path(first)) / "w"
    copied.chmod(0o600)
    copied.write_bytes(b"other")
    (damaged,) = check(**variable)
    assert (damaged.status, damaged.fix) == (Status.WARNING, f"dynamo-mpi stage --unstage {first}")
    assert "damaged: a file is not as it was copied, of " in damaged.found
    os.close(in_use)
    folder.chmod(0o777)
    (open_to_others,) = check(SLURM_TMPDIR=str(folder))
    assert (open_to_others.status, "can be written by others" in open_to_others.found) == (Status.WARNING, True)
    folder.chmod(0o700)
    monkeypatch.setattr("dynamo_mpi.stage.store.file_system_type", lambda _: "lustre")
    (shared,) = check(**variable)
    assert "is on a shared file system (lustre)" in shared.found


def test_a_model_and_copies_to_remove_are_two_commands(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, lock = stage(folder, "a")
    os.close(lock)
    # it would start the copy in this process's place
    assert main(["stage", str(tmp_path / "a"), "--stage", str(folder), "--dry-run", "--unstage", "all"]) == 64
    assert "two commands: dynamo-mpi stage --unstage NAME, then" in capsys.readouterr().err
    assert [entry.name for entry in Store(str(folder)).entries()] == [name]
