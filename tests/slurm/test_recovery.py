# SPDX-License-Identifier: Apache-2.0
"""What follows which fault in a deployment with a spare node on the real Slurm: which rank and node are blamed, what is done, what is left
behind; and the other worker's streams, of which none may fail or stall. Each row has a cluster of its own, as it breaks nodes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.fault_traces import run_out_of_memory, why_no_memory_limit
from tests.gpu_nodes import gpu_node, write_whole

from .conftest import MakeSlurm
from .recovery import DIED, HUNG, LOST, RecoveringDeployment, write_model
from .session import SlurmSession
from .stack import OUR_MODULES

pytestmark = [pytest.mark.slurm, pytest.mark.dynamo]
# no row waits for Slurm's own discovery
NODE_TIMEOUT = 300
GIB = 2**30
RANK_1 = "rank 1 on n4"


class Row(NamedTuple):
    """A fault in ``agg-1`` on n3 and n4, and what follows.

    Args:
        happen: lets it happen.
        nodes: the worker's nodes afterwards.
        blamed: the rank with its host, and how it ended, as its report says.
        excluded: the nodes that are left out, each with a part of the reason.
        start: the number of the start that serves.
        spares: number of spares, from n5 on.
    """

    happen: Callable[[RecoveringDeployment], object]
    nodes: tuple[str, ...]
    blamed: tuple[str, str]
    excluded: dict[str, str]
    start: int = 2
    spares: int = 1


def kill_rank(deployment: RecoveringDeployment) -> None:
    deployment.kill("n4", signal.SIGKILL)


def stop_rank(deployment: RecoveringDeployment) -> None:
    deployment.kill("n4", signal.SIGSTOP)


def exhaust_memory(deployment: RecoveringDeployment) -> None:
    with run_out_of_memory(deployment.rank("n4")):
        pass


def power_off(deployment: RecoveringDeployment) -> None:
    deployment.slurm.kill_node("n4")


def cut(deployment: RecoveringDeployment) -> None:
    deployment.slurm.switch_cable("n4", on=False)


def drain_and_kill(deployment: RecoveringDeployment) -> None:
    deployment.slurm.drain("n4", "a fan is loud")
    eventually(lambda: deployment.description().get("drained"), "launch knows it", 40)
    deployment.kill("n4", signal.SIGKILL)


def kill_again_while_it_starts(deployment: RecoveringDeployment) -> None:
    deployment.kill("n4", signal.SIGKILL)
    deployment.wait_for_text("start 2 of at most", 30)
    log = deployment.run_dir / "logs" / "agg-1.log"
    eventually(lambda: log.read_text(errors="replace").count("preflight: ok") == 2, "it starts again", 30)
    deployment.kill("n4", signal.SIGKILL)


def power_off_with_a_spare(deployment: RecoveringDeployment) -> None:
    deployment.slurm.kill_node("n5")
    deployment.slurm.kill_node("n4")


def power_off_with_a_hung_spare(deployment: RecoveringDeployment) -> None:
    deployment.slurm.stop_slurmd("n5", stopped=True)
    deployment.slurm.kill_node("n4")


ROWS = {
    "rank killed": Row(kill_rank, ("n3", "n4"), (RANK_1, DIED), {}),
    "rank hangs": Row(stop_rank, ("n3", "n4"), (RANK_1, HUNG), {}),
    "out of memory": Row(exhaust_memory, ("n3", "n4"), (RANK_1, DIED), {}),
    "node off": Row(power_off, ("n3", "n5"), (RANK_1, LOST), {"n4": "doesn't answer"}),
    "node cut": Row(cut, ("n3", "n5"), (RANK_1, LOST), {"n4": "doesn't answer"}),
    "drained by the administrator": Row(drain_and_kill, ("n3", "n5"), (RANK_1, DIED), {"n4": "a fan is loud"}),
    "killed while it starts again": Row(
        kill_again_while_it_starts, ("n3", "n5"), (RANK_1, DIED), {"n4": "2 failures within an hour"}, 3
    ),
    "spare off too": Row(
        power_off_with_a_spare, ("n3", "n6"), (RANK_1, LOST), {"n4": "doesn't answer", "n5": "doesn't answer"}, 2, 2
    ),
    "spare whose slurmd hangs": Row(
        power_off_with_a_hung_spare, ("n3", "n6"), (RANK_1, LOST), {"n4": "doesn't answer", "n5": "a probe there"}, 2, 2
    ),
}
LANDING = ("node cut",)
# a hung slurmd takes connections: only the time limit of a step on it shows it
SERVES_SECONDS = 90.0


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("two-layers"))


Launch = Callable[..., RecoveringDeployment]


@pytest.fixture
def launch(make_slurm: MakeSlurm, tmp_path: Path, two_layers: Path) -> Iterator[Launch]:
    """Build a cluster and launch the deployment in it; both end with the test."""
    begun: list[tuple[SlurmSession, RecoveringDeployment]] = []

    def begin(
        spares: int = 1, prepare: Callable[[SlurmSession], object] = lambda slurm: None, **environment: str
    ) -> RecoveringDeployment:
        slurm = make_slurm(nodes=4 + spares, node_timeout=NODE_TIMEOUT)
        prepare(slurm)
        deployment = RecoveringDeployment(slurm, tmp_path, two_layers, spares, (), environment)
        begun.append((slurm, deployment))
        deployment.all_ready()
        return deployment

    yield begin
    for slurm, deployment in begun:
        deployment.stop()
        slurm.cluster.down()


def end(deployment: RecoveringDeployment, *, off: tuple[str, ...] = ()) -> None:
    """End the deployment, and require that it leaves nothing on the nodes that are on."""
    os.kill(deployment.launcher(), signal.SIGINT)
    assert deployment.wait() == 130, deployment.text()
    on = [node for node in deployment.slurm.nodes if node not in off]
    eventually(lambda: not leftovers(deployment, on), "nothing is left", 10)


def leftovers(deployment: RecoveringDeployment, nodes: list[str]) -> list[str]:
    """Return what is left of the deployment on nodes: processes, shared memory."""
    found = [f"{node}: process {pid}" for node in nodes for pid in deployment.pids_of(node, "dynamo")]
    for node in nodes:
        shared = Path(f"/proc/{deployment.slurm.cluster.init_pid(node)}/root/dev/shm")
        found += [f"{node}: /dev/shm/{path.name}" for path in shared.iterdir() if "dynamo" in path.name]
    return found


@pytest.mark.serial  # no stream may stall for a second
@pytest.mark.landing(*LANDING)
@pytest.mark.parametrize("name", ROWS)
def test_what_follows_a_fault(name: str, launch: Launch) -> None:
    row = ROWS[name]
    if name == "out of memory" and (reason := why_no_memory_limit()):
        pytest.skip(reason)
    deployment = launch(row.spares)
    streams = deployment.streams()
    before = deployment.instance("agg-1")
    began = time.time()
    row.happen(deployment)
    served = deployment.serves("agg-1", row.start, SERVES_SECONDS)
    longest = streams.require_undisturbed()
    print(f"{name}: serves again after {served - began:.1f} s; longest wait of a stream {longest:.2f} s")
    print(deployment.text())

    assert deployment.nodes_of("agg-1") == row.nodes
    assert deployment.nodes_of("agg-0") == ("n1", "n2")
    assert deployment.blamed() == {row.blamed}, deployment.record()
    excluded = deployment.excluded()
    assert excluded.keys() == row.excluded.keys(), excluded
    assert all(part in excluded[node] for node, part in row.excluded.items()), excluded
    eventually(lambda: before not in json.dumps(deployment.instances()), "the ended start is out of discovery", 5)
    assert deployment.instance("agg-1") in json.dumps(deployment.instances())
    # ranks that are cut off see it for themselves
    away = [node for node in row.excluded if deployment.slurm.cluster.find_init_pid(node)]
    eventually(lambda: not leftovers(deployment, away), "nothing is left on the nodes that are left out", 15)
    off = tuple(node for node in deployment.slurm.nodes if not deployment.slurm.cluster.find_init_pid(node))
    end(deployment, off=off)
    if row.excluded:
        assert f"--exclude={','.join(excluded)}" in deployment.text()


@pytest.mark.full
def test_a_drained_node_is_replaced_by_request(launch: Launch) -> None:
    deployment = launch()
    streams = deployment.streams()
    deployment.slurm.drain("n4", "a fan is loud")

    def replace(node: str) -> tuple[int, str]:
        words = (sys.executable, "-m", "dynamo_mpi", "replace", node, "--run-dir", deployment.run_dir)
        # from any host that sees the run folder
        done = deployment.slurm.exec(*words, env=OUR_MODULES, host="n2", timeout=120)
        return done.returncode, done.stdout + done.stderr

    code, said = replace("n9")
    assert (code, "doesn't use a node 'n9'" in said) == (64, True), said
    code, said = replace("n1")
    assert (code, "head node" in said) == (64, True), said
    code, said = replace("n4")
    assert (code, "agg-1 serves with n5 in its place" in said) == (0, True), said
    assert "agg-1 drains" in said
    assert deployment.nodes_of("agg-1") == ("n3", "n5")
    assert deployment.excluded().keys() == {"n4"}
    assert deployment.blamed() == set(), deployment.text()
    assert "drain: deregistered" in deployment.text()
    # no spare is left, but another worker of the role
    code, said = replace("n3")
    assert (code, "agg-1 isn't started again" in said) == (0, True), said
    streams.require_undisturbed()
    eventually(lambda: len(deployment.instances()) == 1, "only the other one is registered", 10)
    code, said = replace("n2")
    assert (code, "no spare node is left" in said) == (64, True), said
    end(deployment)


@pytest.mark.full
def test_two_workers_fail_at_once(launch: Launch) -> None:
    deployment = launch()
    deployment.slurm.kill_node("n4")
    deployment.kill("n2", signal.SIGKILL)
    deployment.serves("agg-0", 2, SERVES_SECONDS)
    deployment.serves("agg-1", 2, SERVES_SECONDS)
    assert (deployment.nodes_of("agg-0"), deployment.nodes_of("agg-1")) == (("n1", "n2"), ("n3", "n5"))
    assert deployment.blamed() == {("rank 1 on n2", DIED), (RANK_1, LOST)}, deployment.record()
    assert deployment.excluded().keys() == {"n4"}
    end(deployment, off=("n4",))


@pytest.mark.full
def test_without_a_spare_left_the_other_worker_serves_on(launch: Launch) -> None:
    deployment = launch()
    streams = deployment.streams()
    deployment.slurm.kill_node("n4")
    deployment.serves("agg-1", 2, SERVES_SECONDS)
    deployment.slurm.kill_node("n5")
    deployment.wait_for_text("no spare node is left for n5", 60)
    streams.require_undisturbed()
    eventually(lambda: len(deployment.instances()) == 1, "only the other one is registered", 10)
    assert deployment.process.poll() is None
    assert deployment.excluded().keys() == {"n4", "n5"}
    # now the last one
    deployment.slurm.kill_node("n2")
    assert deployment.wait(90) == 75, deployment.text()
    eventually(lambda: not leftovers(deployment, ["n1", "n3"]), "nothing is left", 10)
    assert "--exclude=n4,n5,n2" in deployment.text() or "--exclude=n2,n4,n5" in deployment.text(), deployment.text()


@pytest.mark.full
def test_the_head_node_is_lost(launch: Launch) -> None:
    deployment = launch()
    deployment.slurm.kill_node("n1")
    assert deployment.wait(90) == 75, deployment.text()
    assert "head node n1" in deployment.text(), deployment.text()
    assert "n1" in deployment.excluded()
    eventually(lambda: not leftovers(deployment, ["n2", "n3", "n4", "n5"]), "nothing is left", 15)


@pytest.mark.full
def test_down_after_a_killed_launcher_does_not_wait_for_a_lost_node(launch: Launch) -> None:
    deployment = launch()
    deployment.slurm.switch_cable("n4", on=False)
    os.kill(deployment.launcher(), signal.SIGKILL)
    words = (sys.executable, "-m", "dynamo_mpi", "down", deployment.run_dir)
    began = time.time()
    done = deployment.slurm.exec(*words, env=OUR_MODULES, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "where n4 was lost" in done.stderr and done.stderr.count("which a killed launcher has left") <= 2, (
        done.stderr
    )
    assert time.time() - began < 45, "not until Slurm gives the node up"
    eventually(lambda: not leftovers(deployment, list(deployment.slurm.nodes)), "nothing is left", 15)


def test_a_mistake_in_a_new_start_ends_the_deployment_at_once(launch: Launch, tmp_path: Path) -> None:
    deployment = launch()
    (tmp_path / "engine.yaml").write_text("tensor_parallel_size: 3\npipeline_parallel_size: 2\n")
    deployment.kill("n4", signal.SIGKILL)
    assert deployment.wait(120) == 64, deployment.text()
    assert deployment.text().count("agg-1: 2 ranks on") == 2, deployment.text()
    assert deployment.excluded() == {}
    eventually(lambda: not leftovers(deployment, list(deployment.slurm.nodes)), "nothing is left", 10)


@pytest.mark.full
def test_starts_that_end_the_same_way_end_the_deployment(launch: Launch, tmp_path: Path) -> None:
    trigger = tmp_path / "now"
    deployment = launch(1, DYN_MPI_ALLOW_FAULTS="1", DYN_MPI_FAULT=f"rank1:load@{trigger}:exception")
    # in both workers, which serve, and then in each of their loads
    trigger.touch()
    assert deployment.wait(180) == 70, deployment.text()
    assert "with the same cause" in deployment.text(), deployment.text()
    eventually(lambda: not leftovers(deployment, list(deployment.slurm.nodes)), "nothing is left", 10)


def gpus(used: int = 0, uncorrected: int = 0, count: int = 1) -> str:
    """Describe a node's GPUs for the stand-in of nvidia-ml-py."""
    memory = {"free": (80 << 30) - used, "used": used, "processes": [[1, used]] if used else []}
    return gpu_node(*[{**memory, "uncorrected": uncorrected}] * count)


NVML = "/dev/shm/nvml.json"


def write_nvml(slurm: SlurmSession, texts: dict[str, str]) -> None:
    """Write what each node's NVML says."""
    for node, text in texts.items():
        write_whole(Path(f"/proc/{slurm.cluster.init_pid(node)}/root{NVML}"), text)


@pytest.mark.full
@pytest.mark.parametrize("how", ["memory is kept", "memory comes back", "uncorrected errors"])
def test_a_gpu_decides_whether_its_node_is_used_again(how: str, launch: Launch) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "standins")])

    def without_gpus(slurm: SlurmSession) -> None:
        write_nvml(slurm, dict.fromkeys(slurm.nodes, gpus(count=0)))

    deployment = launch(1, without_gpus, PYTHONPATH=path, PYNVML_STANDIN=NVML)
    streams = deployment.streams()
    worn = gpus(used=40 * GIB) if "memory" in how else gpus(uncorrected=3)
    write_nvml(deployment.slurm, {"n3": gpus(), "n4": worn, "n5": gpus()})
    # after SIGKILL, which no GPU sends, the nodes aren't asked the first time
    deployment.kill("n4", signal.SIGSEGV)
    if how == "memory comes back":
        log = deployment.run_dir / "logs" / "probe-n4.log"
        eventually(lambda: log.exists() and "node probe: here" in log.read_text(), "the node is asked", 30)
        write_nvml(deployment.slurm, {"n4": gpus()})
    deployment.serves("agg-1", 2, 120)
    streams.require_undisturbed()
    excluded = deployment.excluded()
    if how == "memory comes back":
        assert (deployment.nodes_of("agg-1"), excluded) == (("n3", "n4"), {})
    else:
        assert deployment.nodes_of("agg-1") == ("n3", "n5")
        assert ("in use" if "memory" in how else "V") in excluded["n4"], excluded
    end(deployment)
