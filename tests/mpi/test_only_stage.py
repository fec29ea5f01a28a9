# SPDX-License-Identifier: Apache-2.0
"""Staging ahead of a job: worlds that copy the model and end, without an engine config or services."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_mpi.common.process import host_name
from dynamo_mpi.stage.manifest import scan
from dynamo_mpi.stage.store import State, Store
from tests.conftest import Mpirun, mpi_environment, run_command
from tests.dynamo.running import eventually
from tests.mpi.test_worker_refusals import assert_refused

pytestmark = pytest.mark.mpi


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(os.urandom(20 << 20))
    return folder


def test_a_world_stages_and_ends(mpirun: Mpirun, tmp_path: Path, model: Path) -> None:
    local, ready = tmp_path / "local", tmp_path / "ready.json"
    ready.write_text("of a worker that runs")
    words = ("--only-stage", "--model", str(model), "--stage", str(local), "--ready-file", str(ready))
    done = mpirun.worker(2, *words, env={"DYN_MPI_STAGEE": "auto"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unknown variable DYN_MPI_STAGEE, which is ignored: is DYN_MPI_STAGE meant?") == 1
    assert "stage: 1 node has the model (0.0 GiB) in " in done.stderr
    store = Store(str(local))
    assert store.is_complete(scan(str(model)), digests=True)
    (entry,) = store.entries()
    assert not entry.in_use
    assert ready.exists()
    again = mpirun.worker(2, *words)
    assert "1 node had the model already" in again.stderr


def test_a_wait_for_another_worker_s_copy_is_logged_at_once(mpirun: Mpirun, tmp_path: Path, model: Path) -> None:
    local, manifest = tmp_path / "local", scan(str(model))
    store = Store(str(local))
    # this process is the other worker
    lock = store.open_lock(manifest.folder_name)
    assert store.take(lock, manifest) is State.MISSING
    words = ("--only-stage", "--model", str(model), "--stage", str(local), "--stage-timeout", "2")
    done = mpirun.worker(1, *words)
    os.close(lock)
    assert done.returncode == 75
    waiting = f"stage: another worker on {host_name()} copies the model, waiting for it (at most 2 s)"
    assert waiting in done.stderr.partition("has not copied the model within 2 s")[0]


def test_the_verb_stages_on_this_node(tmp_path: Path, model: Path) -> None:
    local = tmp_path / "local"
    command = [sys.executable, "-m", "dynamo_mpi", "stage", model.name, "--stage", str(local)]
    # as in the shell of a job of several tasks
    shell = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
    done = run_command(command, env=mpi_environment(shell), cwd=model.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Store(str(local)).is_complete(scan(str(model)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_copied_in_part_is_removed_when_it_is_stopped(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    os.truncate(model / "model.safetensors", 1 << 30)
    local = tmp_path / "local"
    command = [sys.executable, "-m", "dynamo_mpi", "stage", str(model), "--stage", str(local)]
    # as by Ctrl-C: to the whole process group
    with subprocess.Popen(
        command, env=mpi_environment({}), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        eventually(lambda: list(local.glob("*/.partial-*")), "it copies")
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number, said
    assert f"stopped by {number.name}" in said
    assert "MPI" not in said.replace("dynamo_mpi", ""), said
    assert list(local.glob("*/.partial-*")) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_can_t_be_staged_ends_the_world(mpirun: Mpirun, tmp_path: Path, model: Path, ranks: int) -> None:
    words = ("--only-stage", "--model", str(model), "--stage", str(tmp_path / "local"))
    (model / "link").symlink_to("/etc/hostname")
    assert_refused(mpirun.worker(ranks, *words), 66, "link is a link that leaves the model's folder, to /etc/hostname")
    (model / "link").unlink()
    inside = (*words[:-1], str(model / "local"))
    assert_refused(
        mpirun.worker(ranks, *inside), 64, f"--stage is {model}/local: the model's own folder {model}, or in it"
    )
    assert not (model / "local").exists()
    misspelt = (*words[:-1], str(tmp_path / "scrtch" / "me"))
    assert_refused(mpirun.worker(ranks, *misspelt), 75, "the model is not staged", f"there is no {tmp_path}/scrtch")
    assert not (tmp_path / "scrtch").exists()
    (tmp_path / "local").touch()
    assert_refused(mpirun.worker(ranks, *words), 75, "the model is not staged", "local can't be used: Not a directory")


def test_a_copy_that_the_disk_has_damaged_is_made_again_with_a_warning(
    mpirun: Mpirun, tmp_path: Path, model: Path
) -> None:
    words = ("--only-stage", "--model", str(model), "--stage", str(tmp_path), "--stage-verify", "digest")
    warning = f"warning: the copy of the model on {host_name()} was damaged, and has been made again"
    assert warning not in mpirun.worker(1, *words).stderr
    store, manifest = Store(str(tmp_path)), scan(str(model))
    file = Path(store.copy_path(manifest.folder_name)) / manifest.files[0].path
    times = file.stat()
    file.write_bytes(bytes(len(file.read_bytes())))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = mpirun.worker(1, *words)
    assert (done.returncode, warning in done.stderr) == (0, True), done.stderr
    assert store.is_complete(manifest, digests=True)
    assert warning not in mpirun.worker(1, *words).stderr


def test_where_to_must_be_known(mpirun: Mpirun, model: Path) -> None:
    assert_refused(mpirun.worker(2, "--only-stage", "--model", str(model)), 64, "no folder was given")


def test_the_site_s_folder_is_where_to(tmp_path: Path, model: Path) -> None:
    scratch = tmp_path / "job"
    scratch.mkdir(0o700)
    command = [sys.executable, "-m", "dynamo_mpi.worker", "--only-stage", "--model", str(model)]
    done = run_command(command, env=mpi_environment({"SLURM_TMPDIR": str(scratch)}), timeout=60)
    assert done.returncode == 0, done.stderr
    assert Store(str(scratch)).is_complete(scan(str(model)))
