# SPDX-License-Identifier: Apache-2.0
"""A whole worker on a real Slurm: over several nodes, through the real frontend, and to its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from dynamo_mpi.common.errors import of_signal
from tests.dynamo.running import eventually

from .cluster.settings import LOGIN
from .session import SlurmSession
from .stack import PROGRAMS, SlurmWorker, Stack, answer_of

pytestmark = pytest.mark.slurm
Start = Callable[..., SlurmWorker]


class Layout(NamedTuple):
    """Where the ranks go, and how they share the model."""

    nodes: int
    ranks_per_node: int
    engine_config: str

    def options(self, slurm: SlurmSession) -> tuple[str, ...]:
        """Return srun's options; the nodes are named, as an earlier job may still be completing on the first ones."""
        names = ",".join(slurm.nodes[: self.nodes])
        return (f"--nodes={self.nodes}", f"--nodelist={names}", f"--ntasks-per-node={self.ranks_per_node}")


THREE_BY_ONE = Layout(3, 1, "tensor_parallel_size: 3\n")
TWO_BY_THREE = Layout(2, 3, "tensor_parallel_size: 3\npipeline_parallel_size: 2\n")


def library(slurm: SlurmSession, plugin: str) -> dict[str, str]:
    """Return the environment with the MPI library that goes with ``srun --mpi=PLUGIN``."""
    if plugin == "pmi2":
        return {**slurm.mpich_env}
    # the nodes share this machine's cores and don't know: without it, waiting ranks keep the working ones from theirs (9 times slower)
    return {**slurm.debian_openmpi_env, "OMPI_MCA_mpi_yield_when_idle": "1"}


@pytest.fixture
def start(stack: Stack, tmp_path: Path, small_model_dir: Path) -> Iterator[Start]:
    """Start a worker; whatever is left of it is ended."""
    workers: list[SlurmWorker] = []

    def begin(
        layout: Layout,
        plugin: str,
        *options: str,
        model: Path = small_model_dir,
        flags: Sequence[str] = (),
        **environment: str,
    ) -> SlurmWorker:
        config = tmp_path / "engine.yaml"
        config.write_text(layout.engine_config)
        flags = ("--model", str(model), "--engine-config", str(config), *flags)
        variables = {**stack.environment, **library(stack.slurm, plugin), **environment}
        srun = (f"--mpi={plugin}", *layout.options(stack.slurm), *options)
        workers.append(SlurmWorker(stack.slurm, tmp_path, srun, flags, variables))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


@pytest.mark.serial  # under PMI2 the tokens must be there within the drain's default limit, see below
@pytest.mark.landing("pmi2")
@pytest.mark.parametrize("plugin", ["pmix", "pmi2"])
def test_answers_over_several_nodes_and_drains_on_sigterm(
    plugin: str, start: Start, stack: Stack, model_dir: Path
) -> None:
    layout = TWO_BY_THREE if plugin == "pmix" else THREE_BY_ONE
    # on a busy machine the tokens take longer than the drain's default limit
    worker = start(layout, plugin, "--label", model=model_dir, flags=("--drain-timeout", "90"))
    ready = worker.ready()
    assert (ready["ranks"], ready["host"]) == (layout.nodes * layout.ranks_per_node, "n1")
    assert {node: len(pids) for node, pids in worker.ranks().items()} == dict.fromkeys(
        stack.slurm.nodes[: layout.nodes], layout.ranks_per_node
    )
    assert stack.keys()

    with stack.ask(model_dir.name, "What is the capital of France?", 12) as asking:
        assert "The capital of France is Paris" in answer_of(asking)["text"]

    step = f"{worker.job}.0"
    with stack.ask(model_dir.name, "Tell me a long story about a fox.", 60) as asking:
        assert asking.stdout is not None
        asking.stdout.readline()
        assert stack.slurm.exec("scancel", "--signal=TERM", step).returncode == 0
        eventually(lambda: stack.keys() == [], "the keys are gone", 10)
        answer = answer_of(asking, 90)
        assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 60), answer
    assert worker.wait() == 0, worker.text()
    assert "drain: deregistered, 1 request in flight" in worker.text()
    assert not worker.ready_file.exists()
    assert worker.ranks() == {}

    spoken = [line for line in worker.text().splitlines() if "dynamo_mpi" in line]
    assert spoken
    for line in spoken:
        # srun's label, then ours, once
        assert re.fullmatch(r"0: dynamo_mpi: rank 0 on n1: (?!.*\brank 0\b).*", line), line


def probe(stack: Stack, node: str, port: int, path: str) -> tuple[int, str]:
    """Ask a node from the login node, as a supervisor elsewhere would; status 0 without an answer."""
    url = f"http://{stack.slurm.addresses[node]}:{port}{path}"
    status, _, body = stack.slurm.exec(sys.executable, PROGRAMS / "ask_probe.py", url).stdout.partition(" ")
    return int(status), body


def eventually_answers(stack: Stack, node: str, port: int, path: str, status: int) -> str:
    """Wait for an answer of this status, and return it."""

    def read() -> tuple[int, str] | None:
        answer = probe(stack, node, port, path)
        return answer if answer[0] == status else None

    return eventually(read, f"{path} of {node} is {status}", 30)[1]


def test_each_nodes_probes_report_the_whole_world(start: Start, stack: Stack) -> None:
    first, second, third = stack.slurm.nodes[:3]
    # the same port on every node, and on the last one it is taken
    with stack.slurm.popen(sys.executable, PROGRAMS / "silent_server.py", "0.0.0.0", host=third) as other:  # noqa: S104 - as we do
        assert other.stdout is not None
        port = int(other.stdout.readline())
        worker = start(THREE_BY_ONE, "pmix", DYN_SYSTEM_PORT=str(port))
        eventually_answers(stack, second, port, "/live", 200)
        assert probe(stack, second, port, "/health")[0] == 503
        assert worker.ready()["system"] == f"http://{stack.slurm.addresses[first]}:{port}"
        for number, node in enumerate((first, second)):
            found = json.loads(eventually_answers(stack, node, port, "/health", 200))
            assert (found["phase"], found["rank"], found["host"]) == ("serve", number, node)
        assert "dynamo_mpi_ready 1\n" in probe(stack, second, port, "/metrics")[1]
        taken = f"rank 2 on {third}: warning: this node has no health server: DYN_SYSTEM_PORT={port}"
        assert taken in worker.text()
        # a death on the one node ends the answers of the others as well
        os.kill(worker.ranks()[third][0], signal.SIGKILL)
        assert worker.wait() != 0
        for node in (first, second):
            eventually_answers(stack, node, port, "/live", 0)
        other.end()


@pytest.mark.landing("pmix")
@pytest.mark.parametrize("plugin", ["pmix", "pmi2"])
def test_scancel_leaves_nothing(plugin: str, start: Start, stack: Stack) -> None:
    worker = start(THREE_BY_ONE, plugin)
    worker.ready()
    job = worker.job
    assert stack.slurm.exec("scancel", job).returncode == 0
    # SIGTERM for all, and KillWait is long enough to drain: no process is killed
    assert worker.wait() == 0, worker.text()
    assert "drain: deregistered, 0 requests in flight" in worker.text()
    assert worker.ranks() == {}
    assert stack.keys() == []
    assert stack.slurm.wait_for_job(job)["JobState"] == "CANCELLED"


def test_its_operator_sees_it_and_ends_it_from_the_login_node(start: Start, stack: Stack) -> None:
    def ours(*words: str) -> subprocess.CompletedProcess[str]:
        return stack.slurm.exec(sys.executable, "-m", "dynamo_mpi", *words, env=stack.environment, timeout=120)

    worker = start(TWO_BY_THREE, "pmix")
    done = ours("wait", "--frontend", stack.frontend.url, "--timeout", "60")
    assert done.returncode == 0, done.stderr + worker.text()
    (row,) = json.loads(ours("status", "--output", "json").stdout)["workers"]
    assert (row["layout"]["text"], row["hosts"], row["phase"]) == ("TP3/PP2", ["n1", "n2"], "serve")

    step = f"{worker.job}.0"
    # any of the user's steps may have its name
    assert f"its step {step} has the name " in ours("down", "--namespace", "dynamo", "--dry-run").stdout
    named = ours("down", "--namespace", "dynamo", "--job", step, "--dry-run").stdout
    assert f"scancel --signal=TERM {step}\n" in named
    done = ours("down", "--namespace", "dynamo", "--job", step, "--timeout", "60")
    assert done.returncode == 0, done.stderr
    assert worker.wait() == 0, worker.text()
    assert "drain: deregistered" in worker.text()
    assert (worker.ranks(), stack.keys()) == ({}, [])


@pytest.mark.landing("pmi2")
@pytest.mark.parametrize("plugin", ["pmix", "pmi2"])
def test_signal_to_rank_0_alone_ends_all_also_before_it_serves(plugin: str, start: Start, slurm: SlurmSession) -> None:
    """Under MPICH nothing else informs the other ranks: they'd wait for the verdict for ever."""
    address = slurm.addresses[LOGIN]
    with slurm.popen(sys.executable, PROGRAMS / "silent_server.py", address) as server:
        assert server.stdout is not None
        etcd = f"http://{address}:{server.stdout.readline().strip()}"
        worker = start(THREE_BY_ONE, plugin, ETCD_ENDPOINTS=etcd, DYN_MPI_PROBE_TIMEOUT="300")
        worker.wait_for_text("preflight: ok")
        (leader,) = worker.ranks()["n1"]
        os.kill(leader, signal.SIGTERM)
        assert worker.wait() == of_signal(signal.SIGTERM), worker.text()
        eventually(lambda: worker.ranks() == {}, "no rank is left")
        server.end()


def shared_memory(stack: Stack) -> dict[str, set[str]]:
    """Return the files in the shared memory of the first two nodes."""
    find = ("find", "/dev/shm", "-type", "f")
    return {node: set(stack.slurm.exec(*find, host=node).stdout.split()) for node in stack.slurm.nodes[:2]}


@pytest.mark.full
def test_where_a_step_was_killed_the_next_serves_until_slurms_warning(start: Start, stack: Stack) -> None:
    before = shared_memory(stack)
    killed = start(TWO_BY_THREE, "pmix", ETCD_LEASE_TTL="60")
    old = killed.ready()
    for pid in [pid for pids in killed.ranks().values() for pid in pids]:
        os.kill(pid, signal.SIGKILL)
    assert killed.wait() != 0, killed.text()
    eventually(lambda: not killed.job and killed.ranks() == {}, "its nodes are free", 60)
    assert killed.ready_file.exists()

    # as Slurm says it in a job that it has requeued
    worker = start(TWO_BY_THREE, "pmix", SLURM_RESTART_COUNT="1")
    worker.wait_for_text("ready: ")
    ready = worker.ready()
    assert (ready["attempt"], ready["pid"] != old["pid"]) == (2, True)
    # as `--signal=USR2@120` has it done: for the processes of all ranks
    assert stack.slurm.exec("scancel", "--signal=USR2", f"{worker.job}.0").returncode == 0
    assert worker.wait() == 0, worker.text()
    assert "the launcher says that its time is nearly up (SIGUSR2): ending in order" in worker.text()
    assert "drain: deregistered" in worker.text()
    assert worker.ranks() == {}
    assert shared_memory(stack) == before, "the killed step's shared memory"
