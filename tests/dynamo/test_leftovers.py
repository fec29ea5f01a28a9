# SPDX-License-Identifier: Apache-2.0
"""What those who were killed have left on a node is no obstacle to the next, and what belongs to those who live is left alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.ports import free_port
from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, http_get, system_port
from tests.dynamo.test_launch import LaunchCommand

pytestmark = pytest.mark.dynamo
# processes that this machine may start until the launcher's
NEXT_PROCESSES = 8000


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files. Short: a unix socket's name holds 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def folders_of_two_runs(temporary: Path, what: str) -> Iterator[tuple[Path, Path]]:
    """Make the folder of a run that was killed, and of one that lives."""
    killed, living = (temporary / f"dynamo-mpi-{what}-{name}" for name in ("killed", "living"))
    for folder in (killed, living):
        folder.mkdir()
        (folder / "session").touch()
    (killed / "lock").touch()
    with (living / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield killed, living


def sessions_of_the_next_processes(temporary: Path) -> set[Path]:
    """Make what an mpirun of Open MPI 5 leaves when it is killed, for each process id that comes next."""
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    made = set()
    for pid in range(os.getpid(), os.getpid() + NEXT_PROCESSES):
        folder = temporary / f"ompi.{pid % most}"
        folder.mkdir()
        (folder / f"pmix.{socket.gethostname()}.tool").touch()
        made.add(folder)
    return made


@pytest.mark.full
def test_a_deployment_starts_beside_what_others_have_left(tmp_path: Path, model_dir: Path) -> None:
    run_dir, temporary = tmp_path / "run", tmp_path / "tmp"
    for folder in (run_dir / "ready", run_dir / "failures" / "prefill-0", temporary):
        folder.mkdir(parents=True)
    run_dir.chmod(0o700)
    stale = {"pid": os.getpid(), "host": os.uname().nodename, "environment": {"ETCD_ENDPOINTS": "http://127.0.0.1:1"}}
    for name in ("ready/prefill-0.json", "services.json", "deployment.json", "failures/prefill-0/prefill-rank-0.json"):
        (run_dir / name).write_text(json.dumps(stale))
    (run_dir / "stop").touch()
    others = sessions_of_the_next_processes(temporary)
    with folders_of_two_runs(temporary, "launch") as (killed, living):
        with LaunchCommand(tmp_path, model_dir, "--skip-check") as launch:
            launch.wait_for_text("ready: smollm2. Try:")
            assert launch.ask()[0] == 200
            (own,) = set(temporary.glob("dynamo-mpi-launch-*")) - {living}
            assert list(own.glob("ompi.*")), "there are mpirun's files"
            assert launch.end(signal.SIGTERM) == 143, launch.err
            assert "drain: deregistered" in launch.err
            eventually(lambda: not launch.survivors(), "no process is left", 10)
            kept = {"ended.json", "failures", "lock", "logs", "ready", "services", "timeline"}
            assert {path.name for path in run_dir.iterdir()} == kept
            assert not list((run_dir / "ready").iterdir())
        assert (living / "session").exists()
        assert not killed.exists()
    assert not own.exists()
    assert set(temporary.glob("ompi.*")) == others
    assert all(len(list(folder.iterdir())) == 1 for folder in others)
    assert not (run_dir / "failures" / "prefill-0" / "prefill-rank-0.json").exists()


def test_a_worker_starts_where_one_was_killed(
    tmp_path: Path, etcd: EtcdServer, model_dir: Path, temporary: Path
) -> None:
    ports = {"DYN_TCP_RPC_PORT": str(free_port()), "DYN_SYSTEM_PORT": str(system_port())}
    flags = ("--failure-dir", str(tmp_path / "failures"))
    variables = {"TMPDIR": str(temporary), "ETCD_LEASE_TTL": "60", "DYN_SYSTEM_HOST": "127.0.0.1"}
    workers = [RunningWorker(tmp_path, etcd, model_dir, 1, "--namespace", "others", name="other", **variables)]
    try:
        workers[0].ready()
        theirs = etcd.keys("v1/instances/others/")
        workers.append(RunningWorker(tmp_path, etcd, model_dir, 3, *flags, **variables, **ports))
        old = workers[1].ready()
        workers[1].stop()
        assert workers[1].ready_file.exists()
        eventually(lambda: not etcd.keys("v1/instances/dynamo/"), "its node agent has taken it out", 3)

        workers.append(RunningWorker(tmp_path, etcd, model_dir, 3, *flags, **variables, **ports))
        eventually(lambda: "ready: " in workers[2].text(), f"ready\n{workers[2].text()}", 90)
        assert workers[2].ready()["pid"] != old["pid"]
        health = f"http://127.0.0.1:{ports['DYN_SYSTEM_PORT']}/health"
        eventually(lambda: http_get(health)[0] == 200, "it serves where the other one did", 20)
        assert len(etcd.keys("v1/instances/dynamo/")) == 1
        assert etcd.keys("v1/instances/others/") == theirs
        for worker in (workers[2], workers[0]):
            os.kill(worker.rank_zero(), signal.SIGTERM)
            assert worker.wait() == 0, worker.text()
    finally:
        for worker in workers:
            worker.stop()


def test_the_socket_of_a_killed_worker_is_removed_by_the_next(
    tmp_path: Path, etcd: EtcdServer, model_dir: Path, temporary: Path
) -> None:
    paths = [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)]
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
    }
    flags = ("--engine", "trtllm", "--allow-no-gpu", "--max-seq-len", "512", "--max-batch-size", "2")

    def sockets() -> set[Path]:
        return set(temporary.glob("dynamo-mpi-session-*"))

    with folders_of_two_runs(temporary, "session") as (killed, living):
        first = RunningWorker(
            tmp_path, etcd, model_dir, 1, *flags, name="first", **variables, STANDIN_TRTLLM_FAULT="slow:60"
        )
        second = None
        try:
            eventually(lambda: sockets() - {killed, living}, "it has a socket")
            (own,) = sockets() - {killed, living}
            assert not killed.exists()
            first.stop()
            assert own.exists()
            second = RunningWorker(tmp_path, etcd, model_dir, 1, *flags, name="second", **variables)
            second.ready()
            # gone as soon as both are connected
            assert sockets() == {living}
            assert (living / "session").exists()
            os.kill(second.rank_zero(), signal.SIGTERM)
            assert second.wait() == 0, second.text()
        finally:
            first.stop()
            if second is not None:
                second.stop()
    # what dynamo.trtllm and Open MPI leave is their own
    assert not [path for path in temporary.glob("dynamo*") if path != living]
