# SPDX-License-Identifier: Apache-2.0
"""What Slurm does in a job with ``--no-kill`` when a node is lost, drained or hung, as `deploy` relies on it; and how steps end there."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.deploy.first_death import first_death
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import REST_SECONDS, SlurmStepController, Step, StepEnd, start
from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.namespaces.processes import command_line

from .conftest import MakeSlurm
from .session import SlurmSession

pytestmark = [pytest.mark.slurm, pytest.mark.full]
# none of the tests waits for it
NODE_TIMEOUT = 300


@pytest.fixture
def slurm(make_slurm: MakeSlurm) -> Iterator[SlurmSession]:
    """A cluster of the test's own, as it breaks nodes."""
    session = make_slurm(nodes=4, node_timeout=NODE_TIMEOUT, requeue_delay=10)
    yield session
    session.cluster.down()


class Job:
    """An allocation with ``--no-kill``, and steps in it by our own code, on this machine: its commands enter the login node."""

    def __init__(self, slurm: SlurmSession, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slurm, self.folder = slurm, folder
        done = slurm.exec("salloc", "--no-shell", "--no-kill", "--nodes=4", "--exclusive", "--gpus-per-node=4")
        self.id = done.stderr.split("job allocation ")[1].split()[0]
        conf, folder_inside = slurm.cluster.settings.slurm_conf, slurm.cluster.settings.state
        enter = f"nsenter --target={slurm.cluster.init_pid('login')} --mount --uts --ipc --net --pid"
        enter = f"{enter} -- env --chdir={folder_inside} SLURM_CONF={conf}"
        for name in ("srun", "squeue", "scancel"):
            program = folder / name
            program.write_text(f'#!/bin/sh\nexec {enter} {shutil.which(name)} "$@"\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        self.controller = SlurmStepController(self.id)

    def start(self, name: str, nodes: str, *options: str) -> Step:
        """Start a step of two tasks on each node, which sleep, under the name that a worker's steps have."""
        count = nodes.count(",") + 1
        placed = (f"--jobid={self.id}", f"--job-name=dynmpi-x-{name}", f"--nodelist={nodes}", f"--nodes={count}")
        tasks = (f"--ntasks={2 * count}", "--ntasks-per-node=2", "--gpus-per-node=4", "--label", *options)
        command = Command(name, f"dynmpi-x-{name}", (("srun", *placed, *tasks, "sleep", "3611"),))
        return start(command, os.environ, self.folder / f"{name}.log")

    def tasks(self) -> dict[str, int]:
        """Return how many tasks run on each node that is on."""
        on = [node for node in self.slurm.nodes if self.slurm.cluster.find_init_pid(node)]
        counts = {node: sum(command_line(pid)[1:] == ["3611"] for pid in self.slurm.pids(node)) for node in on}
        return {node: count for node, count in counts.items() if count}


@pytest.fixture
def job(slurm: SlurmSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(slurm, tmp_path, monkeypatch)


@pytest.mark.parametrize("how", ["off", "cut"])
def test_what_is_left_of_a_lost_nodes_step_ends_in_seconds_and_its_nodes_are_used_again(how: str, job: Job) -> None:
    step = job.start("decode-0", "n2,n3", "--no-kill", "--overlap")
    other = job.start("decode-1", "n4", "--no-kill", "--overlap")
    eventually(lambda: job.tasks() == {"n2": 2, "n3": 2, "n4": 2}, f"both run: {step.last_words()}", 20)
    if how == "off":
        job.slurm.kill_node("n3")
    else:
        job.slurm.switch_cable("n3", on=False)
    begin = time.monotonic()
    end = StepEnd(step, job.controller)
    eventually(lambda: "n2" not in job.tasks(), "nothing is left on the other node", 2)
    eventually(end.poll, "its launcher has ended", REST_SECONDS + 2)
    assert time.monotonic() - begin < REST_SECONDS + 2
    # Slurm lists it on, and its name is the next one's
    assert "dynmpi-x-decode-0" in (job.controller.running() or {}).values()
    following = job.start("decode-0", "n1,n2", "--no-kill", "--overlap")
    eventually(lambda: job.tasks().get("n1") == job.tasks().get("n2") == 2, "the next one runs there", 5)
    job.controller.signal([following])
    eventually(lambda: not {"n1", "n2"} & job.tasks().keys(), "the next one is signalled", 5)
    eventually(lambda: following.child.exit_code() is not None, "and ends", 5)
    assert other.child.exit_code() is None
    assert job.tasks()["n4"] == 2
    other.child.kill()


def test_a_step_without_overlap_waits_for_what_a_lost_one_holds(job: Job) -> None:
    step = job.start("decode-0", "n2,n3", "--no-kill")
    eventually(lambda: job.tasks() == {"n2": 2, "n3": 2}, "it runs", 20)
    job.slurm.kill_node("n3")
    end = StepEnd(step, job.controller)
    eventually(end.poll, "its launcher has ended", REST_SECONDS + 2)
    waiting, shares = job.start("waits", "n2"), job.start("shares", "n2", "--overlap")
    eventually(lambda: job.tasks() == {"n2": 2}, "the one with --overlap runs", 5)
    eventually(lambda: "dynmpi-x-shares" in (job.controller.running() or {}).values(), "it is listed", 5)
    assert "dynmpi-x-waits" not in (job.controller.running() or {}).values()
    for each in (waiting, shares):
        each.child.kill()


@pytest.mark.parametrize("how", ["off", "slurmd"])
def test_a_node_that_cannot_start_a_step_is_named(how: str, job: Job) -> None:
    if how == "off":
        job.slurm.kill_node("n3")
    else:
        job.slurm.stop_slurmd("n3", stopped=True)
    step = job.start("decode-0", "n2,n3", "--no-kill", "--overlap")
    eventually(lambda: step.child.exit_code() is not None, "srun gives up", 40)
    assert step.child.exit_code() != 0
    death = first_death(step.child.output())
    assert death is not None
    assert death.host == "n3", step.child.output()
    eventually(lambda: job.tasks() == {}, "nothing is left", 5)


def test_a_drained_node_goes_on_and_slurm_says_drain(job: Job) -> None:
    step = job.start("decode-0", "n2", "--no-kill", "--overlap")
    eventually(lambda: job.tasks() == {"n2": 2}, "it runs", 20)
    job.slurm.drain("n2")
    assert "State=ALLOCATED+DRAIN " in job.slurm.exec("scontrol", "--oneliner", "show", "node", "n2").stdout
    assert step.child.exit_code() is None
    job.slurm.resume("n2")
    step.child.kill()


def test_a_requeued_job_leaves_the_excluded_nodes_out(slurm: SlurmSession, tmp_path: Path) -> None:
    scripts = tmp_path / "checkout" / "scripts"
    scripts.mkdir(parents=True)
    run_dir, log = tmp_path / "run dir", tmp_path / "batch.log"
    run_dir.mkdir()
    nodes = [{"node": node, "reason": '"node": "lost"'} for node in ("n2", "n1")]
    (run_dir / "excluded.json").write_text(json.dumps({"schema": 1, "nodes": nodes}))
    # in the launcher's place: the first time it ends with 75
    launcher = scripts / "srun_disaggregated.sh"
    launcher.write_text(
        '#!/bin/sh\necho "run ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"\n[ -n "$SLURM_RESTART_COUNT" ] || exit 75\n'
    )
    launcher.chmod(0o755)
    variables = {"DYN_MPI_RUN_DIR": str(run_dir), "DYN_MPI_CHECKOUT": str(scripts.parent)}
    words = ("--parsable", "--nodes=1", f"--output={log}", "--exclude=n3", ROOT / "scripts" / "sbatch_disaggregated.sh")
    submitted = slurm.sbatch(*words, env=variables, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    eventually(lambda: log.exists() and "without n1,n2 (excluded.json)" in log.read_text(), "it is requeued", 30)
    job = submitted.stdout.strip()
    shown = slurm.exec("scontrol", "--oneliner", "show", "job", job).stdout
    assert "ExcNodeList=n3,n1,n2 " in shown, shown
    facts = slurm.wait_for_job(job, 60)
    assert facts["JobState"] == "COMPLETED", log.read_text()
    assert "run 1 on n4" in log.read_text(), log.read_text()


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_becomes_of_a_batch_job_that_loses_the_node_of_its_script(
    is_kept: bool, make_slurm: MakeSlurm, tmp_path: Path
) -> None:
    slurm = make_slurm(nodes=3, node_timeout=5, requeue_delay=10)
    try:
        script = tmp_path / "job.sh"
        script.write_text("#!/bin/sh\nsrun --overlap --no-kill sleep 3612\n")
        # as sbatch_disaggregated.sh does
        words = ("--parsable", "--nodes=2", "--requeue", *(["--no-kill"] if is_kept else []))
        job = slurm.sbatch(*words, script, cwd=tmp_path).stdout.strip()

        def facts() -> dict[str, str]:
            shown = slurm.exec("scontrol", "--oneliner", "show", "job", job).stdout
            return dict(word.split("=", 1) for word in shown.split() if "=" in word)

        def runs(node: str) -> bool:
            return any(command_line(pid)[1:] == ["3612"] for pid in slurm.pids(node))

        eventually(lambda: runs("n1") and runs("n2"), f"it runs: {facts()}", 20)
        slurm.kill_node("n1")
        if is_kept:
            eventually(lambda: facts()["NodeList"] == "n2", "the job goes on without the node", 60)
            assert (facts()["JobState"], facts()["Restarts"], facts()["BatchHost"]) == ("RUNNING", "0", "n1"), facts()
            assert runs("n2")
        else:
            eventually(lambda: facts()["Restarts"] == "1", "it is requeued", 60)
            eventually(lambda: facts()["NodeList"] == "n[2-3]", "it runs on other nodes", 60)
    finally:
        slurm.cluster.down()
