# SPDX-License-Identifier: Apache-2.0
"""Spare nodes: which nodes are spares, what Slurm says about nodes, what a probe finds, and what is written of those left out."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynamo_mpi.checks.gpu_fabric import COMPLETED, IN_PROGRESS, GpuFabric
from dynamo_mpi.checks.gpu_facts import GpuFacts
from dynamo_mpi.checks.gpu_health import GpuHealth, no_health
from dynamo_mpi.checks.node_probe import HERE, ProbeResult, domain_of, problems_of, read_result, wait_for_memory
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.deploy import node_watch
from dynamo_mpi.deploy.excluded import describe_excluded, exclude, excluded_before
from dynamo_mpi.deploy.no_kill import is_kept, says_no_kill, warning
from dynamo_mpi.deploy.node_health import SlurmNode, answering, nearest, neighbours, parse_nodes
from dynamo_mpi.deploy.node_watch import CALM_SECONDS, LOOK_SECONDS, SILENT_SECONDS, NodeWatch
from dynamo_mpi.deploy.nodes import Nodes, Worker, assign
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.deploy.settings import RESTARTS_WITH_SPARES, LaunchSettings, read_settings
from dynamo_mpi.deploy.spares import _failure
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import start
from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.servers import closed_port


def settings(**given: str) -> LaunchSettings:
    engines = {"prefill_engine_config": "e", "decode_engine_config": "e"}
    return read_settings({"model": "m", "launcher": "slurm", **engines, **given}, (), {})


@pytest.mark.parametrize(
    ("given", "names", "head", "excluded", "workers", "spares"),
    [
        ({}, "n1 n2 n3", "n1", (), ["n1", "n2"], []),
        ({"spare_nodes": "1"}, "n1 n2 n3", "n1", (), ["n1", "n2"], ["n3"]),
        ({"spare_nodes": "2"}, "n1 n2 n3 n4 n5", "n1", (), ["n1", "n2"], ["n3", "n4"]),
        # the head node never is one
        ({"spare_nodes": "1"}, "n1 n2 n3", "n3", (), ["n1", "n3"], ["n2"]),
        # what the job left out before counts as a spare that is missing
        ({"spare_nodes": "1"}, "n1 n2 n3", "n1", ("n2",), ["n1", "n3"], []),
        ({"spare_nodes": "2"}, "n1 n2 n3 n4", "n1", ("n2",), ["n1", "n3"], ["n4"]),
    ],
)
def test_the_last_nodes_are_spares(
    given: dict[str, str], names: str, head: str, excluded: tuple[str, ...], workers: list[str], spares: list[str]
) -> None:
    found = assign(settings(**given), Nodes(tuple(names.split()), head, "12"), excluded)
    assert [node for worker in found.workers for node in worker.nodes] == workers
    assert list(found.spares) == spares


@pytest.mark.parametrize(
    ("excluded", "head", "workers"),
    [((), "n1", ["n1", "n2"]), (("n2",), "n1", ["n1", "n3"]), (("n1",), "n2", ["n2", "n3"])],
)
def test_the_services_of_another_launch_of_the_job_run_on_no_node_that_is_left_out(
    excluded: tuple[str, ...], head: str, workers: list[str]
) -> None:
    nodes = Nodes(("n1", "n2", "n3"), "n1", "12").with_head_outside(excluded)
    found = assign(settings(spare_nodes="1"), nodes, excluded)
    assert (found.head, [node for worker in found.workers for node in worker.nodes]) == (head, workers)


def test_without_a_node_that_is_not_left_out_the_head_stays() -> None:
    nodes = Nodes(("n1", "n2"), "n1", "12")
    assert nodes.with_head_outside(("n1", "n2")) is nodes


def test_a_worker_s_nodes_stay_in_slurms_order() -> None:
    worker = Worker("decode-0", "decode", "e", ("n2", "n3"), 2)
    order = ("n1", "n2", "n3", "n4")
    assert worker.moved([("n2", "n4")], order).nodes == ("n3", "n4")
    assert worker.moved([("n3", "n1")], order).nodes == ("n1", "n2")


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("--nodes=4 --no-kill --exclusive", True),
        ("-N4 -k", True),
        ("--no-kill=off", False),
        ("--no-kill --nodes=2 --no-kill=off", False),
        ("--nodes=4", False),
        ("--job-name=--no-killer", False),
        ("--nodes=1\n--no-kill", True),
    ],
)
def test_whether_options_have_no_kill(options: str, kept: bool) -> None:
    assert says_no_kill(options) == kept


@pytest.mark.parametrize(
    ("environ", "kept"),
    [({"SBATCH_NO_KILL": "set"}, True), ({"SALLOC_NO_KILL": ""}, True), ({"SALLOC_NO_KILL": "off"}, False)],
)
def test_variables_of_salloc_and_sbatch(environ: dict[str, str], kept: bool) -> None:
    assert is_kept(environ) is kept
    assert ("was allocated without --no-kill" in warning(environ)) is not kept


def test_what_salloc_was_called_with_is_seen_in_its_shell(tmp_path: Path) -> None:
    salloc = tmp_path / "salloc"
    salloc.symlink_to(sys.executable)
    look = "from dynamo_mpi.deploy.no_kill import is_kept; print(is_kept({}))"
    run = "import subprocess, sys; subprocess.run([sys.argv.pop(), '-c', sys.argv.pop()])"
    for option, kept in (("--no-kill", "True"), ("--nodes=4", "False")):
        command = [str(salloc), "-c", run, option, look, sys.executable]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        assert done.stdout.strip() == kept, done.stderr


def test_too_few_nodes_for_the_spares_are_refused() -> None:
    with pytest.raises(UsageError) as refused:
        assign(settings(spare_nodes="2"), Nodes(("n1", "n2", "n3"), "n1", "12"))
    assert "1 decode worker x 1 node, 2 spare nodes: that takes 4 nodes, and job 12 has 3 (n1, n2, n3)" in str(
        refused.value
    )
    assert refused.value.fix.endswith(" and their _WORKERS, or fewer spare nodes: NUM_SPARE_NODES")
    with pytest.raises(UsageError) as refused:
        assign(settings(), Nodes(("n1",), "n1", "12"))
    assert "NUM_SPARE_NODES" not in refused.value.fix
    with pytest.raises(UsageError, match=r"has 1 \(n2\), without the excluded n1"):
        assign(settings(spare_nodes="1"), Nodes(("n1", "n2"), "n1", "12"), ("n1",))


@pytest.mark.parametrize(
    ("given", "most"),
    [({}, 0), ({"spare_nodes": "1"}, RESTARTS_WITH_SPARES), ({"spare_nodes": "1", "max_restarts": "0"}, 0)],
)
def test_spares_bring_restarts_along(given: dict[str, str], most: int) -> None:
    assert (settings(**given).max_restarts, settings(**given).no_kill) == (most, "spare_nodes" in given)


# scontrol of Slurm 22.05, shortened
NODES = """\
NodeName=n1 Arch=x86_64 CoresPerSocket=1 NodeAddr=10.0.0.1 NodeHostName=n1 Port=7001 Version=22.05.8 State=ALLOCATED ThreadsPerCore=1
NodeName=n2 Arch=x86_64 NodeAddr=10.0.0.2 NodeHostName=n2 State=ALLOCATED+DRAIN ThreadsPerCore=1 Reason=fan is loud [root@2026-11-30T23:00:00]
NodeName=n3 NodeAddr=10.0.0.3 NodeHostName=n3 State=DOWN*+DRAIN ThreadsPerCore=1 Reason=Not responding [slurm@2026-11-30T23:00:00]
NodeName=n4 NodeAddr=10.0.0.4 NodeHostName=n4 State=MIXED+NOT_RESPONDING ThreadsPerCore=1
NodeName=n5 NodeAddr=10.0.0.5 NodeHostName=n5 State=ALLOCATED* ThreadsPerCore=1
NodeName=n6 NodeAddr=10.0.0.6 NodeHostName=n6 State=MIXED+FAILING ThreadsPerCore=1
NodeName=n7 NodeAddr=10.0.0.7 NodeHostName=n7 State=IDLE+POWERING_DOWN ThreadsPerCore=1
"""


def test_what_slurm_says_about_nodes() -> None:
    nodes = parse_nodes(NODES)
    assert {name: node.lost for name, node in nodes.items()} == {
        "n1": "",
        "n2": "",
        "n3": "Slurm says down+not_responding (Not responding)",
        "n4": "",
        "n5": "",
        "n6": "",
        "n7": "Slurm says powering_down",
    }
    assert {name for name, node in nodes.items() if node.no_response} == {"n3", "n4", "n5"}
    assert {name for name, node in nodes.items() if node.drained} == {"n2", "n3", "n6"}
    assert nodes["n2"].drained == "Slurm says drain (fan is loud)"
    assert (nodes["n1"].address, nodes["n1"].port, nodes["n2"].port) == ("10.0.0.1", 7001, 6818)
    assert parse_nodes("slurm_load_node error: Invalid node name specified") == {}


TOPOLOGY = """\
SwitchName=s0 Level=0 LinkSpeed=1 Nodes=n[1-4]
SwitchName=root Level=1 LinkSpeed=1 Nodes=n[1-8] Switches=s[0-1]
"""


def test_a_spare_of_the_same_switch_comes_first() -> None:
    groups = neighbours(TOPOLOGY, "n3")
    assert [len(group) for group in groups] == [4, 8]
    assert nearest(["n8", "far", "n4", "n7"], groups) == ["n4", "n8", "n7", "far"]
    blocks = neighbours("BlockName=b1 BlockIndex=0 Nodes=n[1-2] BlockSize=2\n", "n1")
    assert nearest(["n9", "n2"], blocks) == ["n2", "n9"]
    assert nearest(["n9", "n2"], neighbours("", "n1")) == ["n9", "n2"]


def test_a_host_that_refuses_a_connection_is_alive_and_one_that_drops_it_is_not() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket() as full,
        closed_port() as closed,
        contextlib.ExitStack() as clients,
    ):
        # Linux drops a SYN to a port whose queue is full, as a host that is off would
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        ports = {"listens": listening.getsockname()[1], "refuses": closed, "drops": full.getsockname()[1]}
        nodes = [SlurmNode(name, frozenset(), "", "127.0.0.1", port) for name, port in ports.items()]
        nodes.append(SlurmNode("unknown", frozenset(), "", "no.such.host.invalid"))
        began = time.monotonic()
        assert answering(nodes, 0.3) == {"listens": True, "refuses": True, "drops": False, "unknown": None}
        assert time.monotonic() < began + 10
    assert answering([]) == {}


def test_a_watch_calls_a_silent_node_lost_unless_it_is_this_host_that_is_cut_off() -> None:
    watch = NodeWatch(("n1", "n2"))
    watch._seen = {name: node for name, node in parse_nodes(NODES).items() if name in ("n1", "n2")}
    begin = time.monotonic() - SILENT_SECONDS - 1
    watch._silent_since = {"n2": begin}
    assert watch.is_silent("n2")
    assert watch.lost == {}
    # somebody else has answered since
    watch._reached = begin + 1
    assert list(watch.lost) == ["n2"]
    watch._silent_since = {"n2": time.monotonic() - 1}
    assert watch.lost == {}
    assert watch.drained == {"n2": "Slurm says drain (fan is loud)"}


def test_a_node_that_does_not_respond_to_slurm_is_lost_only_if_its_host_is_silent_too() -> None:
    watch = NodeWatch(("n1", "n4"))
    watch._seen = {name: node for name, node in parse_nodes(NODES).items() if name in ("n1", "n4")}
    watch._reached = time.monotonic()
    # slurmd restarts: the host refuses a connection, which is an answer
    assert watch.lost == {}
    watch._silent_since = {"n1": watch._reached - 1, "n4": watch._reached - 1}
    assert watch.lost == {"n4": "Slurm says not_responding"}
    # this host has reached no node since: it may be cut off itself
    watch._silent_since = {"n4": time.monotonic()}
    assert watch.lost == {}


def test_a_watch_looks_at_real_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        watch = NodeWatch(("n1", "n2"))
        watch._seen = {name: SlurmNode(name, frozenset(), "", "127.0.0.1", port) for name in ("n1", "n2")}
        watch._silent_since = {"n1": 0.0, "n2": 0.0}
        watch._look()
    assert not watch.is_silent("n1")
    assert watch._reached > time.monotonic() - 5


GIB = 2**30


def gpu(used: int = 0, **health: int) -> GpuHealth:
    facts = GpuFacts(
        0, "GPU-1", "NVIDIA H100 80GB HBM3", 90, 80 * GIB, 80 * GIB - used, used, ((71, used),) * bool(used)
    )
    return GpuHealth(facts, **health)  # type: ignore[arg-type] # numbers


@pytest.mark.parametrize(
    ("gpus", "problems"),
    [
        ([], []),
        ([gpu()], []),
        ([gpu(slow_reasons=0x8)], []),
        ([gpu(used=40 * GIB)], ["GPU 0 has 40.0 GiB in use 31 s after its worker ended: pid 71 holds 40.0 GiB"]),
        ([gpu(uncorrected=2)], ["V10: GPU 0: 2 uncorrected ECC errors"]),
        ([gpu(recovery_action=2)], ["V9: GPU 0: the driver wants a reboot of the node"]),
        ([no_health("GPU is lost")], ["V15: GPU is lost"]),
    ],
)
def test_what_a_probe_calls_a_problem(gpus: list[GpuHealth], problems: list[str]) -> None:
    assert problems_of("n3", gpus, 31.0) == problems
    found = ProbeResult(tuple(problems), "7f.3")
    assert read_result(f"0: {HERE}\n0: {found.line}\nsrun: a line after it\n") == found


@pytest.mark.parametrize(
    ("fabrics", "domain"),
    [
        ([None, None], ""),
        ([GpuFabric(COMPLETED, 0, "7f", 3)] * 2, "7f.3"),
        ([GpuFabric(COMPLETED, 0, "7f", 3), GpuFabric(COMPLETED, 0, "7f", 4)], ""),
        ([GpuFabric(COMPLETED, 0, "", 3)], ""),
        ([GpuFabric(IN_PROGRESS, 0, "7f", 3)], ""),
        ([], ""),
    ],
)
def test_the_nvlink_domain_of_a_node(fabrics: list[GpuFabric | None], domain: str) -> None:
    gpus = [gpu()._replace(facts=gpu().facts._replace(fabric=fabric)) for fabric in fabrics]
    assert domain_of(gpus) == domain


@pytest.mark.parametrize("output", ["", HERE, "dynamo_mpi node probe: {", 'dynamo_mpi node probe: {"other": 1}'])
def test_a_probe_without_a_result(output: str) -> None:
    assert read_result(output) is None


def test_memory_that_is_given_back_is_waited_for() -> None:
    answers_in_turn = [[gpu(used=40 * GIB)], [gpu(used=40 * GIB)], [gpu()]]
    waited: list[float] = []
    assert wait_for_memory(60, lambda: answers_in_turn.pop(0), waited.append) == [gpu()]
    assert len(waited) == 2
    held = [gpu(used=40 * GIB)]
    assert wait_for_memory(0, lambda: held, waited.append) == held


def test_excluded_nodes_stay_for_their_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    path = tmp_path / "run"
    assert excluded_before(path, "12") == ()
    first = RunDir(path)
    first.write_excluded([exclude("n3", "it doesn't answer", "decode-0"), exclude("n9", "V10")])
    first.close()
    left = excluded_before(path, "12")
    assert [(each.node, each.worker) for each in left] == [("n3", "decode-0"), ("n9", "")]
    assert describe_excluded(left) == "left out: n3 (it doesn't answer); n9 (V10); for a next job: --exclude=n3,n9"
    assert describe_excluded(left, tmp_path / "hosts").endswith(f"take n3, n9 out of {tmp_path / 'hosts'}")
    assert describe_excluded(()) == ""
    assert excluded_before(path, "13") == ()
    RunDir(path).close()
    assert (path / "excluded.json").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    RunDir(path).close()
    assert not (path / "excluded.json").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"job_id": "12", "nodes": [{"reason": "x"}, 3]}', '{"job_id": "12"}'])
def test_an_excluded_file_that_makes_no_sense_excludes_nothing(tmp_path: Path, content: str) -> None:
    RunDir(tmp_path / "run").close()
    (tmp_path / "run" / "excluded.json").write_text(content)
    assert excluded_before(tmp_path / "run", "12") == ()


def test_a_watch_looks_often_only_after_a_first_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    states, looks = {"n2": "ALLOCATED"}, list[int]()

    def ask(nodes: Sequence[str]) -> dict[str, SlurmNode]:
        return parse_nodes("\n".join(f"NodeName={name} State={states.get(name, 'ALLOCATED')}" for name in nodes))

    monkeypatch.setattr(node_watch, "ask_slurm_about", ask)

    def look(nodes: Sequence[SlurmNode]) -> dict[str, bool | None]:
        looks.append(len(nodes))
        return {}

    monkeypatch.setattr(node_watch, "answering", look)
    monkeypatch.setattr(node_watch, "LOOK_SECONDS", 0.01)
    watch = NodeWatch(("n1", "n2"))
    assert watch._period() == CALM_SECONDS
    watch.start()
    try:
        eventually(lambda: len(looks) == 1, "the first look", 5)
        states["n2"] = "ALLOCATED*"
        watch.hurry()  # a failure: at once, though the next look is many seconds away
        eventually(lambda: len(looks) > 3, "many looks", 5)
    finally:
        watch.close()


@pytest.mark.parametrize("states", ["ALLOCATED*", "DOWN", "MIXED+FAIL"])
def test_a_watch_hurries_for_a_while_where_a_node_is_newly_ill(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = NodeWatch(("n1", "n2"))
    watch._seen = parse_nodes("NodeName=n1 State=ALLOCATED+DRAIN")
    assert watch._period() == CALM_SECONDS
    watch._seen = parse_nodes(f"NodeName=n1 State={states}")
    assert watch._period() == LOOK_SECONDS
    watch._hurry_until = 0.0  # the time is over, and the node still ill
    assert watch._period() == CALM_SECONDS
    watch._silent_since = {"n2": 0.0}
    assert watch._period() == LOOK_SECONDS


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        ("", ""),
        ("Traceback\nOSError: no disk\n", ": OSError: no disk"),
        ("ssh: n9: no route\n-----\nPRTE has lost a daemon\n-----\n", ": ssh: n9: no route"),
    ],
)
def test_the_line_with_the_cause_of_a_spares_failure(output: str, shown: str, tmp_path: Path) -> None:
    command = Command("spare-n9", "spare", (("sh", "-c", f"printf -- '{output}'; exit 255"),))
    step = start(command, os.environ, tmp_path / "log")
    eventually(lambda: step.child.exit_code() is not None, "its end", 10)
    assert _failure(step, 255, None) == f"spare-n9 ended with exit code 255{shown}"


def test_a_node_is_unreachable_from_the_look_on_at_which_another_one_has_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, looks, asks = NodeWatch(("n1", "n2")), list[bool](), list[bool]()

    def look(_: object) -> dict[str, bool | None]:
        looks.append(True)
        return {"n1": True, "n2": len(looks) == 1}

    def ask(_: object) -> dict[str, SlurmNode]:
        asks.append(True)
        if len(asks) == 2:  # after the second look, and about a moment before it
            watch.close()
        watch._wake.set()
        return parse_nodes("NodeName=n1 State=ALLOCATED\nNodeName=n2 State=ALLOCATED\n")

    monkeypatch.setattr(node_watch, "answering", look)
    monkeypatch.setattr(node_watch, "ask_slurm_about", ask)
    monkeypatch.setattr(node_watch, "SLURM_SECONDS", 0.0)
    monkeypatch.setattr(node_watch, "LOOK_SECONDS", 0.0)
    watch._run()
    assert (len(looks), watch.is_silent("n2"), watch.is_unreachable("n2")) == (2, True, True)
    assert not watch.is_unreachable("n1")
