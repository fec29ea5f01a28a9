# SPDX-License-Identifier: Apache-2.0
"""A deployment's life with shell commands for steps: real processes, real files, no cluster."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.checks.node_facts import NodeFacts
from dynamo_mpi.checks.node_probe import HERE, ProbeResult
from dynamo_mpi.common.failure import Failure
from dynamo_mpi.common.process import DRAIN_SIGNALS
from dynamo_mpi.common.signals import SIGNALS, Interrupted, Interrupts
from dynamo_mpi.deploy import controller as conductors
from dynamo_mpi.deploy import first_steps, node_inquiry, recovery, reports, spare_checks, step_ender, worker_ends
from dynamo_mpi.deploy.controller import DeploymentController, LaunchContext
from dynamo_mpi.deploy.node_health import parse_nodes
from dynamo_mpi.deploy.node_watch import NodeWatch
from dynamo_mpi.deploy.nodes import Placement, Worker
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.deploy.services import StepFailed
from dynamo_mpi.deploy.settings import LaunchSettings, read_settings
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import MpirunStepController
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.failure_records import FailureRecord, WorkerIdentity, create_if_absent, failure_record
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE, record_key
from tests.servers import closed_port, running_etcd
from tests.unit.worlds import world

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).resolve().parent.parent / "data" / "pyxis"
PREFILL, DECODE = (Worker(f"{role}-0", role, "e.yaml", ("n",), 1) for role in ("prefill", "decode"))
WAIT = "sleep 60 & trap 'kill $!; exit 0' TERM; wait"
SERVE = f"echo '{{}}' > \"$READY\"; {WAIT}"


@dataclass(frozen=True)
class Steps:
    """What each step is, as a shell's script."""

    folder: Path
    check: str = "true"
    kv_check: str = "true"
    services: str = (
        f'echo \'{{"environment": {{"NATS_AUTH_PASSWORD": "s"}}, "url": "", "host": "h"}}\' > services.json; {WAIT}'
    )
    prefill: str = SERVE
    decode: str = SERVE
    checks_in_services: bool = False
    image: str = ""
    probe_script: str = f"echo '{HERE}'; echo '{ProbeResult().line}'"
    prepare_script: str = "true"
    stage_script: str = ""

    def probe(self, node: str) -> Command:
        return self.command(f"probe-{node}", f"NODE={node}; {self.probe_script}")

    def prepare(self, node: str) -> Sequence[Command]:
        scripts = {"spare": self.prepare_script, "stage": self.stage_script}
        return [self.command(f"{name}-{node}", f"NODE={node}; {script}") for name, script in scripts.items() if script]

    def command(self, name: str, script: str) -> Command:
        ready = self.folder / "ready" / f"{name}.json"
        words = ("sh", "-c", f"cd {self.folder}; READY={ready}; {script}", *filter(None, [self.image]))
        return Command(name, name, (words,), {LAUNCH_VARIABLE: name})

    def worker(self, worker: Worker) -> Command:
        script = self.prefill if worker.role == "prefill" else self.decode
        return self.command(worker.name, f"NODES={','.join(worker.nodes)}; {script}")


class Rendered:
    """The steps, as a renderer gives them."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.worker = steps.worker
        self.probe = steps.probe
        self.prepare = steps.prepare
        self.checks_in_services = steps.checks_in_services

    def check(self) -> Command:
        return self._steps.command("check", self._steps.check)

    def kv_check(self, workers: Sequence[Worker]) -> Command:
        return self._steps.command("kv-check", self._steps.kv_check)

    def services(self) -> Command:
        return self._steps.command("services", self._steps.services)


Run = Callable[..., tuple[int, str]]


def is_due(when: str, said: Sequence[str]) -> bool:
    """Return whether the last line has these words; with ``WORDS#2``, for the second time."""
    words, _, count = when.partition("#")
    return words in said[-1] and (not count or sum(words in line for line in said) == int(count))


NONE: Mapping[str, str] = {}


@pytest.fixture
def settings() -> LaunchSettings:
    given = {"model": "m", "prefill_engine_config": "e", "decode_engine_config": "e"}
    return read_settings({**given, "launcher": "slurm", "stop_timeout": "1"}, (), {})


@pytest.fixture
def run(tmp_path: Path, settings: LaunchSettings, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a deployment of these steps; what it says is looked at by ``when``, which may end it."""
    monkeypatch.setattr(conductors, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(step_ender, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(conductors, "REACHED_SECONDS", 0.0)
    monkeypatch.setattr(recovery, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(reports, "GRACE_SECONDS", 0.2)
    folder = tmp_path / "run"

    def begin(
        when: str | tuple[str, ...] = "",
        do: Callable[[], None] = lambda: None,
        max_restarts: int = 0,
        workers: Sequence[Worker] = (PREFILL, DECODE),
        spares: tuple[str, ...] = (),
        watch: NodeWatch | None = None,
        changes: Mapping[str, str] = NONE,
        in_services: bool = False,
        **scripts: str,
    ) -> tuple[int, str]:
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            if any(words and is_due(words, said) for words in ((when,) if isinstance(when, str) else when)):
                # not from within: what it does may be looked at before this line returns
                threading.Thread(target=do).start()

        run_dir = RunDir(folder)
        try:
            with Interrupts((*SIGNALS, *DRAIN_SIGNALS)) as interrupts:
                conductor = DeploymentController(
                    replace(settings, max_restarts=max_restarts, **changes),  # type: ignore[arg-type] # texts
                    Placement(tuple(workers), spares, "head", ("head", "m", "n", "o", *spares)),
                    Rendered(Steps(folder, checks_in_services=in_services, **scripts)),
                    MpirunStepController(),
                    LaunchContext(run_dir, interrupts, say, watch=watch),
                )
                try:
                    return conductor.run(), "\n".join(said)
                except StepFailed as error:
                    return error.status, "\n".join([*said, str(error), error.log])
                except Interrupted as end:
                    return end.exit_code, "\n".join(said)
        finally:
            run_dir.close()

    return begin


def raise_signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


READY = "ready, according to its workers"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR2, 0), (signal.SIGUSR1, 0)],
)
def test_a_signal_ends_prefill_then_decode_then_the_services(run: Run, number: signal.Signals, code: int) -> None:
    ended, said = run(READY, raise_signal(number))
    assert ended == code
    order = [line.split("ending ")[1] for line in said.splitlines() if "ending " in line]
    assert order == ["prefill-0", "decode-0", "services"]
    assert "cancelling" not in said


def test_the_stop_file_ends_it(run: Run, tmp_path: Path) -> None:
    assert run(READY, (tmp_path / "run" / "stop").touch)[0] == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock", "logs", "ready", "timeline"]


def test_a_check_that_refuses_is_the_end(run: Run, tmp_path: Path) -> None:
    code, said = run(check="echo error B1; exit 78")
    assert (code, "error B1" in said, "nothing was launched" in said) == (78, True, True)
    assert not (tmp_path / "run" / "logs" / "services.log").exists()


CHECKED = "echo 'head node: check: passed'"


def test_in_a_container_the_services_step_runs_the_check(run: Run, tmp_path: Path) -> None:
    first = f"touch {tmp_path}/started; sleep 0.3; {CHECKED}; {Steps.services}"
    code, said = run(READY, raise_signal(signal.SIGTERM), in_services=True, check="exit 78", services=first)
    assert (code, said.index("check: passed") < said.index("services on h")) == (143, True)
    assert not (tmp_path / "run" / "logs" / "check.log").exists()


@pytest.mark.parametrize(
    ("services", "code", "says"),
    [
        ("echo error B1; exit 78", 78, "the check refused the deployment with exit code 78; nothing was launched"),
        ("exit 0", 69, "the check refused the deployment with exit code 69; nothing was launched"),
        (f"{CHECKED}; exit 64", 64, "the services ended with exit code 64"),
        (f"cat {RECORDED}/image_missing.txt; exit 1", 66, "check: Pyxis didn't start the container"),
    ],
)
def test_a_services_step_that_ends_in_or_after_its_check(run: Run, services: str, code: int, says: str) -> None:
    ended, said = run(in_services=True, services=services)
    assert (ended, says in said) == (code, True), said


@pytest.mark.parametrize(
    ("kv_check", "code", "said"),
    [
        ("on", 75, "the KV check refused the deployment with exit code 75; no worker was started"),
        ("warn", 0, "warning: the KV check ended with exit code 75; the workers start all the same"),
        ("off", 0, READY),
    ],
)
def test_a_kv_check_that_fails_refuses_or_warns(run: Run, tmp_path: Path, kv_check: str, code: int, said: str) -> None:
    report = (
        "printf '0: dynamo_mpi: rank 0 on n1: error in kv check: 1 error, no worker was started\\n"
        "1: other words\\n0: error T2: no KV comes through\\n0:   found:    n2 <- n1\\n0: dynamo_mpi: rank 0: bye\\n'; exit 75"
    )
    apart = (PREFILL, replace(DECODE, nodes=("n2",)))
    stop = (tmp_path / "run" / "stop").touch
    ended, words = run(READY, stop, workers=apart, changes={"kv_check": kv_check}, kv_check=report)
    assert (ended, said in words) == (code, True), words
    assert ("no worker was started\nerror T2: no KV comes through\n  found:    n2 <- n1\n" in words) == (
        kv_check == "on"
    )
    assert (tmp_path / "run" / "logs" / "services.log").exists() == (kv_check != "on")


def test_a_kv_check_without_a_report_ends_with_its_code(run: Run) -> None:
    apart = (PREFILL, replace(DECODE, nodes=("n2",)))
    code, words = run(workers=apart, kv_check="echo no MPI here; exit 64")
    assert (code, "no MPI here" in words, "--kv-check off skips the check" in words) == (64, True, True)


def test_services_that_end_are_reported_with_their_output(run: Run) -> None:
    code, said = run(services="echo no etcd here; exit 69")
    assert (code, "no etcd here" in said) == (69, True)
    assert run(services="exit 0")[0] == 69


def test_services_that_are_ready_where_we_cannot_see_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_steps, "UNSEEN_SECONDS", 0.2)
    code, said = run(services=f"echo 'head node: 0.5 s  ready: /elsewhere/services.json'; {WAIT}")
    assert (code, "on a file system that the nodes and this host share" in said) == (64, True)


# a temporary failure, three times the same, is no reason for a requeue
@pytest.mark.parametrize(("code", "end"), [(70, 70), (75, 70), (137, 137)])
def test_a_worker_that_failed_is_started_again_so_often(run: Run, tmp_path: Path, code: int, end: int) -> None:
    count = tmp_path / "count"
    ended, said = run(max_restarts=2, decode=f'echo "$DYN_MPI_ATTEMPT" >> {count}; {SERVE.split(";")[0]}; exit {code}')
    assert (ended, count.read_text().split()) == (end, ["1", "2", "3"])
    assert f"decode-0: ended with exit code {code}; start 3 of at most 3" in said
    assert "prefill-0: ended" not in said


def test_a_start_of_the_launcher_that_is_not_its_first_counts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_MPI_ATTEMPT", "4")
    run(prefill=f'echo "$DYN_MPI_ATTEMPT" > {tmp_path}/count', decode="exit 0")
    assert (tmp_path / "count").read_text() == "4\n"


def test_before_the_jobs_time_ends_all_is_ended_in_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # two roles that may take a second each
    end = int(time.time()) + conductors.END_SECONDS + 2 + 4
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(end)))
    code, said = run()
    assert time.time() < end - conductors.END_SECONDS
    assert code == 0
    assert said.index(READY) < said.index("ending in order") < said.index("ending prefill-0")


def test_time_that_is_too_short_from_the_start_is_only_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 5))
    code, said = run(READY, raise_signal(signal.SIGUSR2))
    assert (code, "ending in order" in said) == (0, False)
    assert "warning: the job's time ends at " in said
    assert "an orderly end may take 102 s" in said


@pytest.mark.parametrize("code", [64, 65, 66, 77, 78])
def test_a_mistake_is_not_tried_again(run: Run, code: int) -> None:
    ended, said = run(max_restarts=2, prefill=f"exit {code}")
    assert (ended, "start 2" in said) == (code, False)


@pytest.mark.parametrize("step", ["check", "services", "prefill"])
def test_a_container_that_pyxis_cannot_start_is_a_mistake(run: Run, step: str) -> None:
    # a mount that one node lacks: srun ends the other ranks, and with 143
    fails = f"cat {RECORDED}/mount_missing.txt; exit 143"
    code, said = run(max_restarts=2, **{step: fails})
    assert (code, "start 2" in said) == (66, False)
    name = "prefill-0" if step == "prefill" else step
    assert f"{name}: Pyxis didn't start the container: --container-mounts: source path does not exist: /dev/shm" in said
    assert "refused the deployment" not in said


READY_ON_S1 = AGAIN_ON_S1 = "decode-0: ready"
APART = (replace(PREFILL, nodes=("m",)), DECODE)
AGAIN = "decode-0: ready#2"
READY_AND = SERVE.split(";")[0]
SICK = f"""echo '{HERE}'; echo '{ProbeResult(("V10: GPU 3: 2 uncorrected ECC errors",)).line}'"""
WELL = Steps.probe_script
# the worker fails on the node n and serves on any other
FAILS_ON_N = f'if [ "$NODES" = n ]; then {READY_AND}; sleep 0.3; exit 137; else {SERVE}; fi'


FAILS_WITH_WORDS = f'if [ "$NODES" = n ]; then echo "srun: error: n: task 0: Killed"; exit 137; else {SERVE}; fi'


def content_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_sick_node_is_left_out_and_a_spare_takes_its_place(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"

    def look() -> None:
        copy.write_text((tmp_path / "run" / "deployment.json").read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    probe = f'if [ "$NODE" = n ]; then {SICK}; else {WELL}; fi'
    own = (replace(PREFILL, nodes=("m",)), DECODE)
    code, said = run(
        AGAIN, look, 3, workers=own, spares=("s1", "s2"), probe_script=probe, decode=FAILS_ON_N, prefill=SERVE
    )
    assert code == 143, said
    moved = (
        "decode-0: ended with exit code 137; n is left out (V10: GPU 3: 2 uncorrected ECC errors), s1 takes its place"
    )
    assert moved in said
    assert said.index(moved) < said.index("decode-0: 1 rank on s1")
    assert "prefill-0: 1 rank on m" in said
    assert said.count("prefill-0: ready") == 1
    written = content_of(tmp_path / "run" / "excluded.json")
    assert [(one["node"], one["worker"]) for one in written["nodes"]] == [("n", "decode-0")]
    assert said.rstrip().endswith("for a next job: --exclude=n")
    described = content_of(copy)
    assert [worker["nodes"] for worker in described["workers"]] == [["m"], ["s1"]]
    assert [(spare["node"], spare["state"]) for spare in described["spares"]] == [("s1", "used"), ("s2", "ready")]
    assert [one["node"] for one in described["excluded"]] == ["n"]
    assert {"probe-n", "probe-s1", "spare-s1"} <= set(described["steps"])


def test_a_spare_of_the_same_nvlink_domain_comes_first(run: Run) -> None:
    pair = (PREFILL, replace(DECODE, nodes=("m", "n")))
    near, far = (f"echo '{HERE}'; echo '{ProbeResult((), domain).line}'" for domain in ("7f.1", "7f.2"))
    probe = f'if [ "$NODE" = n ]; then {SICK}; else {near}; fi'
    prepare = f'if [ "$NODE" = s2 ]; then {near}; else {far}; fi'
    fails = f'if [ "$NODES" = m,n ]; then {READY_AND}; sleep 1; exit 137; else {SERVE}; fi'
    more = {"workers": pair, "spares": ("s1", "s2"), "changes": {"kv_check": "off"}}
    code, said = run(
        AGAIN, raise_signal(signal.SIGTERM), 3, probe_script=probe, prepare_script=prepare, decode=fails, **more
    )
    assert (code, "s2 takes its place" in said, "decode-0: 2 ranks on m,s2" in said) == (143, True, True), said


def test_a_healthy_node_gets_the_worker_again_at_once(run: Run, tmp_path: Path) -> None:
    again = f"if [ -e {tmp_path}/once ]; then {SERVE}; else touch {tmp_path}/once; {READY_AND}; sleep 0.3; exit 137; fi"
    code, said = run(AGAIN, raise_signal(signal.SIGTERM), 3, spares=("s1",), decode=again)
    assert code == 143
    assert "decode-0: ended with exit code 137; start 2 of at most 4 in an hour, at once" in said
    assert said.count("decode-0: 1 rank on n") == 2
    assert not (tmp_path / "run" / "excluded.json").exists()


def killed(tmp_path: Path, times: int) -> str:
    """Return a worker whose rank is killed so often, which its node's agent reports."""
    content = {"rank": 0, "host": "n", "phase": "serve", "cause": "disconnect", "exit_code": 70, "error": "died"}
    written = json.dumps({**content, "time": 1.0, "report": "rank 0 on n died"})
    report = f"mkdir -p failures/decode-0; echo '{written}' > failures/decode-0/backend-rank-0.json"
    ends = f"echo 'srun: error: n: task 0: Killed'; umask 077; {report}; exit 70"
    return f'echo >> {tmp_path}/starts; if [ "$(wc -l < {tmp_path}/starts)" -gt {times} ]; then {SERVE}; fi; {ends}'


def test_a_node_whose_gpu_the_driver_calls_broken_is_left_out_without_being_asked(run: Run, tmp_path: Path) -> None:
    error = {"xid": 79, "gpu": 3, "uuid": "GPU-3", "host": "n", "at": -0.4}
    content = {"rank": 0, "host": "n", "phase": "serve", "cause": "report", "exit_code": 70, "error": "NCCL error"}
    written = json.dumps({**content, "time": 1.0, "report": "NCCL error", "gpu_errors": [error]})
    report = f"mkdir -p failures/decode-0; echo '{written}' > failures/decode-0/backend-rank-0.json"
    fails = f'if [ "$NODES" = n ]; then {READY_AND}; sleep 0.3; umask 077; {report}; exit 70; else {SERVE}; fi'
    probe = f"touch {tmp_path}/probed-$NODE; {WELL}"
    code, said = run(
        AGAIN, raise_signal(signal.SIGTERM), 3, workers=APART, spares=("s1",), decode=fails, probe_script=probe
    )
    assert code == 143, said
    why = "Xid 79 (GPU has fallen off the bus) on GPU 3 (GPU-3)"
    assert f"decode-0: ended with exit code 70; n is left out ({why}), s1 takes its place; start 2 at once" in said
    assert [path.name for path in tmp_path.glob("probed-*")] == ["probed-s1"]
    (left,) = content_of(tmp_path / "run" / "excluded.json")["nodes"]
    assert (left["node"], left["reason"]) == ("n", why)


@pytest.mark.parametrize("times", [1, 2])
def test_after_a_rank_was_killed_no_probe_is_waited_for_the_first_time(run: Run, tmp_path: Path, times: int) -> None:
    probe = f"touch {tmp_path}/probed; {WELL}"
    fails = killed(tmp_path, times)
    code, said = run(
        "decode-0: ready", raise_signal(signal.SIGTERM), 3, spares=("s1",), decode=fails, probe_script=probe
    )
    assert (code, (tmp_path / "probed").exists()) == (143, times > 1), said
    assert "decode-0: ended with exit code 70; start 2 of at most 4 in an hour, at once" in said
    assert ("n is left out (2 failures within an hour began there" in said) == (times > 1)


def test_the_spare_that_is_taken_is_the_one_that_was_probed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_inquiry, "topology_of", lambda node: [frozenset({node, "s2"})])
    probe = f'touch {tmp_path}/probed-$NODE; if [ "$NODE" = n ]; then {SICK}; else {WELL}; fi'
    watch = watch_of("head=ALLOCATED m=ALLOCATED n=ALLOCATED s1=ALLOCATED s2=ALLOCATED")
    fails = FAILS_WITH_WORDS.replace("exit 137", f"{READY_AND}; sleep 1; exit 137")
    code, said = run(
        "decode-0: 1 rank on s",
        raise_signal(signal.SIGTERM),
        3,
        workers=APART,
        spares=("s1", "s2"),
        watch=watch,
        probe_script=probe,
        decode=fails,
    )
    assert (code, "s2 takes its place" in said) == (143, True), said
    assert sorted(path.name for path in tmp_path.glob("probed-*")) == ["probed-n", "probed-s2"]


def test_two_workers_that_fail_at_once_have_different_spares_probed(run: Run, tmp_path: Path) -> None:
    workers = (*APART, replace(DECODE, name="decode-1", nodes=("o",)))
    probe = f'echo >> {tmp_path}/probed-$NODE; sleep 2; case "$NODE" in s*) {WELL};; *) {SICK};; esac'
    fails = f'case "$NODES" in s*) {SERVE};; *) {READY_AND}; sleep 1; exit 137;; esac'
    more = {"workers": workers, "spares": ("s1", "s2"), "probe_script": probe, "decode": fails}
    code, said = run("takes its place#2", raise_signal(signal.SIGTERM), 3, **more)
    assert (code, "s1 takes its place" in said, "s2 takes its place" in said) == (143, True, True), said
    assert [(tmp_path / f"probed-{node}").read_text() for node in ("s1", "s2")] == ["\n", "\n"]


def test_without_a_spare_it_goes_on_with_the_others_of_the_role(run: Run, tmp_path: Path) -> None:
    described: list[dict[str, Any]] = []

    def look() -> None:
        while not described or not any(worker["given_up"] for worker in described[-1]["workers"]):
            described.append(content_of(tmp_path / "run" / "deployment.json"))
        os.kill(os.getpid(), signal.SIGTERM)

    workers = (PREFILL, DECODE, replace(DECODE, name="decode-1", nodes=("m",)))
    probe = f'if [ "$NODE" = n ]; then {SICK}; else {WELL}; fi'
    code, said = run("warning: decode-0", look, 3, workers=workers, probe_script=probe, decode=FAILS_ON_N)
    assert code == 143, said
    assert (
        "warning: decode-0: ended with exit code 137, and isn't started again: no spare node is left for n of" in said
    )
    assert "decode-1 of its role still serve" in said
    assert [worker["given_up"] is not None for worker in described[-1]["workers"]] == [False, True, False]


def test_without_a_spare_and_another_of_the_role_it_drains_and_asks_for_a_requeue(run: Run, tmp_path: Path) -> None:
    code, said = run(max_restarts=3, probe_script=SICK, decode=FAILS_ON_N)
    assert (code, "no spare node is left for n of decode-0 (V10: GPU 3" in said) == (75, True)
    assert "ending prefill-0" in said
    assert content_of(tmp_path / "run" / "excluded.json")["nodes"][0]["node"] == "n"


def test_a_node_that_takes_no_step_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_inquiry, "STEP_SECONDS", 0.5)
    probe = f'if [ "$NODE" = n ]; then sleep 60; else {WELL}; fi'
    # the spare, which is ready by then, takes one: it isn't this host's fault
    slow = FAILS_ON_N.replace("sleep 0.3", "sleep 1")
    began = time.monotonic()
    code, said = run(AGAIN, raise_signal(signal.SIGTERM), 3, spares=("s1",), probe_script=probe, decode=slow)
    assert (code, "n is left out (it takes no step in" in said) == (143, True), said
    assert time.monotonic() < began + 20


def test_a_spare_that_is_bad_itself_is_passed_over(run: Run, tmp_path: Path) -> None:
    probe = f'if [ "$NODE" = n ]; then {SICK}; else {WELL}; fi'
    prepare = f'if [ "$NODE" = s1 ]; then {SICK}; exit 0; fi; {WELL}'
    slow = FAILS_ON_N.replace("sleep 0.3", "sleep 1")
    code, said = run(
        AGAIN,
        raise_signal(signal.SIGTERM),
        3,
        spares=("s1", "s2"),
        probe_script=probe,
        prepare_script=prepare,
        decode=slow,
    )
    assert code == 143, said
    assert "warning: the spare node s1 is left out: V10: GPU 3: 2 uncorrected ECC errors" in said
    assert "s2 takes its place" in said
    assert [one["node"] for one in content_of(tmp_path / "run" / "excluded.json")["nodes"]] == ["s1", "n"]


def facts_of(host: str, **engine_configs: str) -> NodeFacts:
    files = {"/model/config.json": "c", **{f"/{name}.yaml": digest for name, digest in engine_configs.items()}}
    return NodeFacts(host, "1.0", "cpython 3.12", "/model", 1, "w", files)


def serving_as(facts: NodeFacts, folder: Path) -> str:
    """Return the part of a script that writes a ready file with a node's facts."""
    path = folder / f"ready-{facts.host}.json"
    path.write_text(json.dumps({"node": facts._asdict()}))
    return f'cp {path} "$READY.new"; mv "$READY.new" "$READY"'


def checked_as(*spares: NodeFacts, folder: Path) -> str:
    """Return the script of a spare's check that finds these facts."""
    for facts in spares:
        (folder / f"spare-{facts.host}.json").write_text(json.dumps(facts._asdict()))
    written = f"{folder}/run/spares"
    copy = f"cp {folder}/spare-$NODE.json {written}/$NODE.new; mv {written}/$NODE.new {written}/$NODE.json"
    return f"umask 077; echo >> {folder}/checks-$NODE; mkdir -p {written}; {copy}; {WELL}"


def test_a_spare_that_differs_from_all_workers_is_left_out_before_it_is_needed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_checks, "LOOK_SECONDS", 0.05)
    folder, states = tmp_path / "run", list[dict[str, str]]()
    other = facts_of("s1")._replace(version="0.9")
    serves = f"{serving_as(facts_of('m'), tmp_path)}; {WAIT}"

    def look() -> None:
        while not states or "preparing" in states[-1].values():
            spares = content_of(folder / "deployment.json")["spares"]
            states.append({spare["node"]: spare["state"] for spare in spares})
        os.kill(os.getpid(), signal.SIGTERM)

    why = "P4: dynamo_mpi 0.9, on m 1.0"
    left_out = f"warning: the spare node s1 is left out: {why}"
    prepare = checked_as(other, facts_of("s2"), folder=tmp_path)
    more = {"prefill": serves, "decode": serves, "prepare_script": prepare}
    code, said = run(left_out, look, 3, workers=APART, spares=("s1", "s2"), **more)
    assert (code, left_out in said) == (143, True), said
    assert states[-1]["s2"] == "ready"
    (left,) = content_of(folder / "excluded.json")["nodes"]
    assert (left["node"], left["reason"]) == ("s1", why)
    # not more often than workers have started
    assert 1 <= len((tmp_path / "checks-s1").read_text()) <= 3


def test_a_spare_that_differs_from_one_worker_is_its_last_choice(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_checks, "LOOK_SECONDS", 0.05)
    prefill, decode = facts_of("m", prefill="p"), facts_of("n", decode="d")
    known = "until grep -q 'the last choice for decode-0: P2: /decode.yaml differs' deployment.json; do sleep 0.1; done"
    fails = f'{serving_as(decode, tmp_path)}; if [ "$NODES" = n ]; then {known}; exit 137; else {WAIT}; fi'
    spares = facts_of("s1", prefill="p", decode="other"), facts_of("s2", prefill="p", decode="d")
    scripts = {"prefill": f"{serving_as(prefill, tmp_path)}; {WAIT}", "decode": fails}
    prepare = checked_as(*spares, folder=tmp_path)
    probe = f'if [ "$NODE" = n ]; then {SICK}; else {WELL}; fi'
    more = {**scripts, "prepare_script": prepare, "probe_script": probe}
    code, said = run(AGAIN, raise_signal(signal.SIGTERM), 3, workers=APART, spares=("s1", "s2"), **more)
    assert (code, "s2 takes its place" in said) == (143, True), said
    assert "s1 is left out" not in said


@pytest.mark.parametrize(("failures", "reason"), [(1, ""), (2, "no copy of the model there: stage-s1 ended with exit")])
def test_a_spare_to_which_the_model_is_not_copied_is_kept(run: Run, tmp_path: Path, failures: int, reason: str) -> None:
    stage = f"echo >> {tmp_path}/copies; [ $(wc -l < {tmp_path}/copies) -gt {failures} ] || {{ echo full; exit 1; }}"
    described: list[dict[str, Any]] = [{}]

    def look() -> None:
        while described[-1].get("state") in (None, "preparing"):
            described.append(content_of(tmp_path / "run" / "deployment.json")["spares"][0])
        os.kill(os.getpid(), signal.SIGTERM)

    code, said = run(READY, look, 3, spares=("s1",), stage_script=stage)
    assert (code, described[-1]["state"]) == (143, "ready"), said
    assert described[-1]["reason"].startswith(reason)
    assert bool(described[-1]["reason"]) == bool(reason)
    assert (tmp_path / "copies").read_text() == "\n\n"
    assert not (tmp_path / "run" / "excluded.json").exists()


def test_a_spare_is_taken_before_it_is_ready_and_its_preparation_ended(run: Run, tmp_path: Path) -> None:
    probe = f'if [ "$NODE" = n ]; then {SICK}; else {WELL}; fi'
    prepare = f"echo $$ > {tmp_path}/pid; sleep 60"
    code, said = run(
        AGAIN,
        raise_signal(signal.SIGTERM),
        3,
        spares=("s1",),
        probe_script=probe,
        prepare_script=prepare,
        decode=FAILS_ON_N,
    )
    assert (code, "s1 takes its place" in said) == (143, True), said
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_node_that_is_blamed_a_second_time_is_left_out(run: Run) -> None:
    code, said = run(READY_ON_S1, raise_signal(signal.SIGTERM), 3, spares=("s1",), decode=FAILS_WITH_WORDS)
    assert code == 143, said
    assert (
        "n is left out (2 failures within an hour began there; the last one: was killed by signal 9 (SIGKILL))" in said
    )
    assert said.count("decode-0: 1 rank on n") == 2
    assert said.count("decode-0: 1 rank on s1") == 1


def test_three_ends_for_the_same_cause_end_it(run: Run) -> None:
    code, said = run(max_restarts=9, spares=("s1", "s2"), decode="echo; exit 70")
    assert (code, "decode-0 ended 3 times with the same cause" in said) == (70, True), said
    assert "start 4" not in said


def test_the_last_of_several_ends_has_a_fix_where_the_ranks_have_reported(run: Run) -> None:
    code, said = run(max_restarts=9, decode="echo 'dynamo_mpi: rank 0 on n: error: broken'; exit 70")
    assert (code, "decode-0 ended 3 times with the same cause" in said) == (70, True), said
    assert re.search(r"expected: a worker that .*\n +fix: +correct the cause in the log, .*/decode-0\.log", said), said


DRAINS = f"{READY_AND}; trap 'rm $READY; echo exit: done; kill $!; exit 0' TERM; sleep 60 & wait"


def request(tmp_path: Path, node: str) -> Callable[[], None]:
    """Ask for a node to be replaced, as `dynamo-mpi replace` does."""

    def write() -> None:
        (tmp_path / "run" / "replace").mkdir(mode=0o700)
        (tmp_path / "run" / "replace" / node).touch(mode=0o600)

    return write


def replacements(run: Run, tmp_path: Path, node: str, last: str, **more: Any) -> tuple[int, str, list[dict[str, Any]]]:
    """Run a deployment with a request; return its end, and the request's, when the last words were said."""
    seen: list[dict[str, Any]] = []

    def act() -> None:
        if not seen:
            seen.append({})
            request(tmp_path, node)()
            return
        while seen[-1].get("state") not in ("done", "refused"):
            seen.append((content_of(tmp_path / "run" / "deployment.json")["replacements"] or [{}])[-1])
        os.kill(os.getpid(), signal.SIGTERM)

    code, said = run((READY, last), act, 3, **more)
    return code, said, seen


def test_a_node_is_taken_out_by_request_and_its_worker_moves_to_a_spare(run: Run, tmp_path: Path) -> None:
    code, said, seen = replacements(run, tmp_path, "n", AGAIN, workers=APART, spares=("s1",), decode=DRAINS)
    assert code == 143, said
    assert "replace n of decode-0: draining, s1 takes its place" in said
    assert "decode-0: ended with 0, as requested" in said
    assert said.index("as requested") < said.index("decode-0: 1 rank on s1")
    assert (seen[-1]["state"], seen[-1]["to"], seen[-1]["worker"]) == ("done", "s1", "decode-0")
    assert said.count("prefill-0: ready") == 1
    written = content_of(tmp_path / "run" / "excluded.json")["nodes"]
    assert [(one["node"], one["reason"]) for one in written] == [("n", "taken out by request")]


def test_a_worker_that_mpirun_would_kill_is_not_asked_to_drain(run: Run, tmp_path: Path) -> None:
    far = SERVE.replace("{}", '{"host": "elsewhere", "pid": 1}')
    more = {"workers": APART, "spares": ("s1",), "decode": far}
    code, said, seen = replacements(run, tmp_path, "n", "replace n of decode-0: refused", **more)
    assert (code, seen[-1]["state"], "rank 0 runs on elsewhere" in seen[-1]["reason"]) == (143, "refused", True), said
    assert said.count("decode-0: 1 rank on n") == 1
    assert "decode-0: ended" not in said


def test_without_a_spare_another_worker_of_the_role_has_to_serve(run: Run, tmp_path: Path) -> None:
    workers = (*APART, replace(DECODE, name="decode-1", nodes=("o",)))
    code, said, seen = replacements(run, tmp_path, "n", "replace n of decode-0: done", workers=workers, decode=DRAINS)
    assert (code, seen[-1]["state"]) == (143, "done"), said
    assert "decode-0: ended with 0, as requested" in said
    assert said.count("decode-0: 1 rank") == 1


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ("n", "no spare node is left, and no other worker of its role serves while it is away"),
        ("head", "it is the head node"),
        ("z", "no worker and no spare of this deployment is there"),
    ],
)
def test_a_request_that_is_refused_changes_nothing(run: Run, tmp_path: Path, node: str, why: str) -> None:
    code, said, seen = replacements(run, tmp_path, node, f"replace {node}", workers=APART, decode=DRAINS)
    assert (code, seen[-1]["state"], why in seen[-1]["reason"]) == (143, "refused", True), said
    assert said.count("decode-0: 1 rank") == 1


def requests(run: Run, tmp_path: Path, acts: Sequence[tuple[str, str]], last: str, **more: Any) -> tuple[int, str]:
    """Run a deployment until ``last`` is printed; for each pair print of a line follows a request for a node, or a file if it has a dot."""
    left = list(acts)
    RunDir(tmp_path / "run").close()
    (tmp_path / "run" / "replace").mkdir(mode=0o700)

    def act() -> None:
        if not left:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        for node in left.pop(0)[1].split(","):
            path = tmp_path / node if "." in node else tmp_path / "run" / "replace" / node
            path.touch(mode=0o600)

    return run((*(when for when, _ in acts), last), act, 3, **more)


SLOWLY = DRAINS.replace("trap '", "trap 'sleep 1; ")


def test_a_request_that_is_repeated_while_the_worker_drains_changes_nothing(run: Run, tmp_path: Path) -> None:
    workers = (*APART, replace(DECODE, name="decode-1", nodes=("o",)))
    acts = ((READY, "n"), ("draining, s1 takes", "n"))
    code, said = requests(
        run, tmp_path, acts, "replace n of decode-0: done", workers=workers, spares=("s1",), decode=SLOWLY
    )
    assert (code, said.count("decode-0: 1 rank on s1"), said.count("draining")) == (143, 1, 1), said


def test_two_nodes_of_one_worker_are_taken_out_by_two_requests(run: Run, tmp_path: Path) -> None:
    workers = (PREFILL, replace(DECODE, nodes=("m", "o")))
    more = {"workers": workers, "spares": ("s1", "s2"), "decode": SLOWLY, "changes": {"kv_check": "off"}}
    code, said = requests(run, tmp_path, ((READY, "m,o"),), "of decode-0: done#2", **more)
    assert (code, said.count("decode-0: ended with 0, as requested")) == (143, 1), said
    assert said.count("decode-0: 2 ranks on s1,s2") + said.count("decode-0: 2 ranks on s2,s1") == 1
    assert [one["node"] for one in content_of(tmp_path / "run" / "excluded.json")["nodes"]] == ["m", "o"]


def test_a_request_whose_worker_is_given_up_on_the_spare_is_refused(run: Run, tmp_path: Path) -> None:
    workers = (*APART, replace(DECODE, name="decode-1", nodes=("o",)))
    probe = f'if [ "$NODE" = s1 ]; then {SICK}; else {WELL}; fi'
    fails = f'if [ "$NODES" = s1 ]; then exit 137; fi; {DRAINS}'
    more = {"workers": workers, "spares": ("s1",), "decode": fails, "probe_script": probe}
    code, said = requests(run, tmp_path, ((READY, "n"),), "replace n of decode-0: refused", **more)
    why = "refused, s1 takes its place (decode-0 has ended meanwhile: no spare node is left for s1 of decode-0"
    assert (code, why in said) == (143, True), said


def test_a_request_whose_worker_ends_while_it_waits_is_refused(run: Run, tmp_path: Path) -> None:
    workers = (*APART, replace(DECODE, name="decode-1", nodes=("o",)))
    ends = f'{READY_AND}; while [ ! -e {tmp_path}/end.now ]; do sleep 0.1; done; rm "$READY"; echo exit: done; exit 0'
    decode = f'if [ "$NODES" = n ]; then {ends}; else {WAIT}; fi'
    acts = (("decode-0: ready", "n"), ("replace n of decode-0: waiting", "end.now"))
    code, said = requests(
        run, tmp_path, acts, "replace n of decode-0: refused", workers=workers, spares=("s1",), decode=decode
    )
    assert (code, "decode-0 has ended meanwhile: it isn't started again" in said) == (143, True), said
    assert "s1 takes" not in said


def test_a_spare_is_taken_out(run: Run, tmp_path: Path) -> None:
    code, said, seen = replacements(run, tmp_path, "s1", "replace s1: done", workers=APART, spares=("s1", "s2"))
    assert (code, seen[-1]["reason"]) == (143, "it was a spare"), said


def watch_of(states: str) -> NodeWatch:
    """Return a watch over nodes in these states, which no Slurm changes: ``n=DOWN``."""
    pairs = [pair.split("=") for pair in states.split()]
    watch = NodeWatch([name for name, _ in pairs])
    watch._seen = parse_nodes("\n".join(f"NodeName={name} State={state}" for name, state in pairs))
    return watch


def test_a_lost_head_node_ends_it_with_75(run: Run) -> None:
    code, said = run(workers=APART, watch=watch_of("head=DOWN m=ALLOCATED n=ALLOCATED"), max_restarts=3, spares=("s1",))
    assert (code, "the head node head is lost, with etcd, NATS and the frontend: Slurm says down" in said) == (75, True)


def test_a_sick_head_node_keeps_its_services_and_its_worker_moves(run: Run) -> None:
    own = (replace(PREFILL, nodes=("m",)), replace(DECODE, nodes=("head",)))
    fails = FAILS_ON_N.replace("= n ]", "= head ]")
    probe = f'if [ "$NODE" = head ]; then {SICK}; else {WELL}; fi'
    watch = watch_of("head=ALLOCATED m=ALLOCATED s1=ALLOCATED")
    code, said = run(
        AGAIN,
        raise_signal(signal.SIGTERM),
        3,
        workers=own,
        watch=watch,
        spares=("s1",),
        probe_script=probe,
        decode=fails,
    )
    assert code == 143, said
    assert "head is left out (V10: GPU 3: 2 uncorrected ECC errors), s1 takes its place" in said
    assert said.count("prefill-0: ready") == 1


def test_a_lost_node_s_launcher_is_not_waited_for(run: Run) -> None:
    deaf = f'if [ "$NODES" = n ]; then trap "" TERM INT; while :; do sleep 0.1; done; else {SERVE}; fi'
    began = time.monotonic()
    watch = watch_of("head=ALLOCATED m=ALLOCATED n=DOWN*")
    code, said = run(
        AGAIN_ON_S1, raise_signal(signal.SIGTERM), 3, workers=APART, watch=watch, spares=("s1",), decode=deaf
    )
    assert code == 143, said
    assert "decode-0: n is lost (Slurm says down+not_responding): ending what is left of its step" in said
    assert (
        "decode-0: ended with exit code 75; n is left out (Slurm says down+not_responding), s1 takes its place" in said
    )
    assert time.monotonic() < began + 20


DEAF = 'trap "" TERM INT; while :; do sleep 0.1; done'


def test_a_step_whose_rank_died_before_its_agent_is_ended(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_ends, "SILENT_LINGER_SECONDS", 0.3)
    hangs = f"echo 'srun: error: n: task 1: Exited with exit code 127'; {DEAF}"
    decode = f"if [ -e {tmp_path}/once ]; then {SERVE}; else touch {tmp_path}/once; {hangs}; fi"
    watch = watch_of("head=ALLOCATED m=ALLOCATED n=ALLOCATED s1=ALLOCATED")
    began = time.monotonic()
    code, said = run(
        "decode-0: ready", raise_signal(signal.SIGTERM), 3, workers=APART, watch=watch, spares=("s1",), decode=decode
    )
    assert (code, "decode-0: its ranks have failed, and its launcher still runs: ending" in said) == (143, True), said
    assert said.count("decode-0: 1 rank on n") == 2
    assert time.monotonic() < began + 20


def test_an_mpirun_that_outlives_its_ranks_report_is_ended(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_ends, "HANG_SECONDS", 0.3)
    hangs = f"mkdir -p failures/decode-0; echo '{{}}' > failures/decode-0/backend-rank-3.json; {DEAF}"
    decode = f"if [ -e {tmp_path}/once ]; then {SERVE}; else touch {tmp_path}/once; {hangs}; fi"
    code, said = run("decode-0: ready", raise_signal(signal.SIGTERM), 3, workers=APART, decode=decode)
    assert (code, "decode-0: its ranks have failed, and its launcher still runs: ending" in said) == (143, True), said
    assert said.count("decode-0: 1 rank on n") == 2


def test_a_drained_node_is_reported_once_and_its_worker_goes_on(run: Run) -> None:
    watch = watch_of("head=ALLOCATED+DRAIN m=ALLOCATED n=ALLOCATED+DRAIN s1=ALLOCATED+DRAIN s2=DOWN")
    code, said = run(READY, raise_signal(signal.SIGTERM), 3, workers=APART, watch=watch, spares=("s1", "s2", "s3"))
    assert (code, said.count("warning: n is drained (Slurm says drain); decode-0 goes on: dynamo-mpi replace n")) == (
        143,
        1,
    )
    assert said.count("warning: head is drained (Slurm says drain); etcd, NATS and the frontend run there") == 1
    assert said.count("decode-0: 1 rank") == 1
    assert "the spare node s1 is left out: Slurm says drain" in said
    assert "the spare node s2 is left out: Slurm says down" in said
    assert said.rstrip().endswith("--exclude=s1,s2")


WITH_FRONTEND = Steps.services.replace('"url": ""', '"url": "http://h:1"')


@pytest.mark.parametrize(("after", "code"), [("exit 70", 70), ("kill -9 $$", 137)])
def test_a_worker_that_ends_before_the_frontend_lists_it_ends_the_wait(
    run: Run, monkeypatch: pytest.MonkeyPatch, after: str, code: int
) -> None:
    monkeypatch.setattr(conductors, "listed_models", lambda url: [])
    began = time.monotonic()
    ended, said = run(services=WITH_FRONTEND, decode=f"{SERVE.split(';')[0]}; sleep 1; {after}")
    assert ended == code
    assert time.monotonic() < began + conductors.LISTED_SECONDS / 2
    assert "all workers are ready" not in said


def test_a_worker_that_is_started_again_meanwhile_is_waited_for_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(conductors, "listed_models", lambda url: ["m"] if (tmp_path / "again").exists() else [])
    again = f"[ -e {tmp_path}/once ] && touch {tmp_path}/again"
    once = f"touch {tmp_path}/once; {SERVE.split(';')[0]}; sleep 0.5; exit 70"
    code, said = run(
        "ready: m. Try:",
        raise_signal(signal.SIGTERM),
        1,
        services=WITH_FRONTEND,
        decode=f"if {again}; then {SERVE}; else {once}; fi",
    )
    assert code == 143
    assert said.count("decode-0: ready") == 2
    assert said.index("start 2 of at most 2") < said.index("ready: m. Try:")


def test_a_worker_that_drains_meanwhile_is_not_called_ready(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conductors, "listed_models", lambda url: [])
    drains = f'{SERVE.split(";")[0]}; sleep 0.5; rm "$READY"; exit 0'
    code, said = run(
        services=WITH_FRONTEND, decode=drains, prefill=f'{SERVE.split(";")[0]}; sleep 1; rm "$READY"; exit 0'
    )
    assert (code, "all workers have ended" in said) == (0, True)
    assert "all workers are ready" not in said


def with_etcd(url: str) -> str:
    return Steps.services.replace('"NATS_AUTH_PASSWORD"', f'"ETCD_ENDPOINTS": "{url}", "NATS_AUTH_PASSWORD"')


@contextlib.contextmanager
def etcd_with_both() -> Iterator[tuple[str, GrpcEtcdClient]]:
    """Run an etcd in which two workers are registered; the value is its URL, and a connection."""
    with running_etcd() as url, contextlib.closing(GrpcEtcdClient([url], EtcdAuth(), 5)) as etcd:
        for name in ("prefill-0", "decode-0"):
            instance, own = etcd.grant(60).id, etcd.grant(60).id
            record = world(name.partition("-")[0], launch=name, instance=f"{instance:x}")
            etcd.put(f"v1/instances/{name}", b"", instance)
            etcd.put(record_key(record, own), record.pack(), own)
        yield url, etcd


def test_what_a_killed_worker_has_left_in_etcd_is_taken_out(run: Run) -> None:
    with etcd_with_both() as (url, etcd):
        code, said = run(services=with_etcd(url), decode=f"{SERVE.split(';')[0]}; exit 137")
        assert [entry.key for entry in etcd.get_prefix("v1/")] == ["v1/instances/prefill-0"]
        assert len(etcd.get_prefix("dynamo_mpi/v1/worlds/")) == 1
    assert code == 137
    assert said.count("decode-0: was still registered; it is deregistered now") == 1
    assert "warning" not in said


def test_one_that_had_to_be_cancelled_is_taken_out_while_the_others_drain(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_ender, "CANCEL_SECONDS", 0.2)
    deaf = f"{SERVE.split(';')[0]}; trap '' TERM INT; while :; do sleep 0.1; done"
    with etcd_with_both() as (url, etcd):
        code, said = run(READY, raise_signal(signal.SIGTERM), services=with_etcd(url), prefill=deaf)
        assert [entry.key for entry in etcd.get_prefix("v1/")] == ["v1/instances/decode-0"]
    assert code == 143
    order = ("cancelling prefill-0", "prefill-0: was still registered", "ending decode-0")
    assert sorted(order, key=said.index) == list(order)


@pytest.mark.parametrize(("decode", "expected"), [(f"{SERVE.split(';')[0]}; sleep 0.5; exit 137", 1), ("exit 137", 0)])
def test_where_etcd_cannot_be_asked_that_is_reported_of_a_worker_that_served(
    run: Run, decode: str, expected: int
) -> None:
    with closed_port() as port:
        code, said = run(services=with_etcd(f"http://127.0.0.1:{port}"), max_restarts=1, decode=decode)
    assert code == 137
    assert said.count("warning: decode-0 may stay registered until its lease ends") == 2 * expected
    assert said.count(f"(http://127.0.0.1:{port}: connection refused)") == 2 * expected


KILLED = "printf '%s\\n' 'srun: error: n: task 0: Killed' 'srun: launch/slurm: _step_signal: Terminating StepId=1.0'; exit 143"
WHO = (
    "decode-0 ended with exit code 143: rank 0 on n was killed by signal 9 (SIGKILL), and no rank was left to report it"
)


def failure_file(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "backend-rank-0.json").read_text())
    return content


def test_a_death_that_no_rank_is_left_to_report_is_reported(run: Run, tmp_path: Path) -> None:
    with etcd_with_both() as (url, etcd):
        (record,) = etcd.get_prefix("dynamo_mpi/v1/worlds/dynamo/backend/")
        code, said = run(services=with_etcd(url), decode=f"{SERVE.split(';')[0]}; {KILLED}")
        (left,) = etcd.get_prefix("dynamo_mpi/v1/failures/")
    assert (code, said.count(WHO)) == (143, 1)
    failure = FailureRecord.unpack(left.value)
    # under the name that the next holder would take as well
    assert left.key.rpartition("/")[2] == record.key.rpartition("/")[2]
    assert (failure.launch, failure.attempt, failure.rank, failure.host) == ("decode-0", 1, 0, "n")
    assert (failure.cause, failure.exit_code, failure.phase, failure.error) == ("disconnect", 143, "preflight", WHO)
    assert failure.report.splitlines()[0] == WHO
    written = failure_file(tmp_path / "run" / "failures" / "decode-0")
    assert (written["rank"], written["attempt"], written["report"]) == (0, 1, failure.report)
    assert "expected: " in written["report"]
    assert "fix:      find out what killed it" in written["report"]


@pytest.mark.parametrize(
    "words",
    [
        "echo 'dynamo_mpi: rank 0 on n: error in serve: it broke'",
        "echo '1: dynamo_mpi: n: error in mpi_init: rank 1 has ended'",
        """echo '{"time":"t","level":"ERROR","target":"dynamo_mpi","message":"error in load"}'""",
        "mkdir -p failures/decode-0; echo '{}' > failures/decode-0/backend-rank-3.json",
    ],
)
def test_what_the_ranks_have_reported_is_not_reported_again(run: Run, tmp_path: Path, words: str) -> None:
    with etcd_with_both() as (url, etcd):
        code, said = run(services=with_etcd(url), decode=f"{words}; {KILLED}")
        assert etcd.get_prefix("dynamo_mpi/v1/failures/") == []
    assert (code, "decode-0 ended with exit code 143" in said, "no rank was left" in said) == (143, True, False)
    assert not (tmp_path / "run" / "failures" / "decode-0" / "backend-rank-0.json").exists()


def test_what_a_node_agent_has_left_in_etcd_is_a_report(run: Run, tmp_path: Path) -> None:
    with etcd_with_both() as (url, etcd):
        origin = WorkerIdentity.of(world("decode", launch="decode-0"))
        failure = failure_record(origin, Failure(1, 70, "it broke"), "n", "error in serve: it broke")
        create_if_absent(etcd, failure, 7)
        code, said = run(services=with_etcd(url), decode=KILLED)
        assert len(etcd.get_prefix("dynamo_mpi/v1/failures/")) == 1
    assert (code, "no rank was left" in said) == (143, False)


def test_what_an_earlier_start_has_left_is_no_report_of_this_one(run: Run, tmp_path: Path) -> None:
    RunDir(tmp_path / "run").close()
    folder = tmp_path / "run" / "failures" / "decode-0"
    folder.mkdir(mode=0o700, parents=True)
    (folder / "backend-rank-0.json").write_text("{}")
    with etcd_with_both() as (url, etcd):
        origin = WorkerIdentity.of(world("decode", launch="decode-0"))
        create_if_absent(etcd, failure_record(origin, Failure(1, 70, "it broke"), "n", "error"), 7)
        code, said = run(services=with_etcd(url), decode=KILLED, max_restarts=1)
        assert len(etcd.get_prefix("dynamo_mpi/v1/failures/")) == 2
    # the first start is the one that etcd knows of, though its files are older
    assert (code, said.count(WHO)) == (143, 1)
    assert failure_file(folder)["attempt"] == 2


def test_where_etcd_cannot_be_asked_a_death_is_said_and_written_all_the_same(run: Run, tmp_path: Path) -> None:
    with closed_port() as port:
        code, said = run(services=with_etcd(f"http://127.0.0.1:{port}"), decode=KILLED)
    assert (code, said.count(WHO)) == (143, 1)
    assert failure_file(tmp_path / "run" / "failures" / "decode-0")["error"] == WHO


@pytest.mark.parametrize("image", ["", "--container-image=/a.sqsh"])
def test_a_task_of_a_container_that_left_with_1_may_be_pyxiss(run: Run, tmp_path: Path, image: str) -> None:
    # recorded from Slurm 22.05, which has dropped what slurmstepd said on n2
    lost = (
        "srun: error: n: task 0: Exited with exit code 1",
        "srun: launch/slurm: _step_signal: Terminating StepId=1.1",
        "srun: Force Terminated StepId=1.1",
    )
    code, said = run(decode="; ".join(f"echo '{line}'" for line in lost) + "; exit 143", image=image)
    assert code == 143
    assert "decode-0 ended with exit code 143: rank 0 on n left with exit code 1, and no rank was left" in said
    assert ("check n; if its container could not be started, slurmd's log there has" in said) == bool(image)


def test_a_launcher_that_says_nothing_is_reported_as_that(run: Run) -> None:
    code, said = run(decode="echo last words; exit 14")
    assert (code, "its launcher does not report how they ended" in said) == (14, True)


def test_a_launcher_that_was_killed_is_reported_as_that(run: Run) -> None:
    code, said = run(decode="kill -9 $$")
    expected = (
        "decode-0 ended with exit code 137: its launcher was killed by signal 9 (SIGKILL), and its ranks left no report"
    )
    assert (code, said.count(expected)) == (137, 1)


def test_a_mistake_needs_no_failure_file(run: Run, tmp_path: Path) -> None:
    code, said = run(decode="echo 'srun: error: n: task 0: Exited with exit code 64'; exit 64")
    assert (code, "no rank was left" in said, (tmp_path / "run" / "failures").exists()) == (64, False, False)


def test_a_host_that_is_lost_while_a_worker_loads_is_no_orderly_end(run: Run) -> None:
    lost = (
        "echo 'ORTE has lost communication with a remote daemon. HNP daemon : x Remote daemon: [[910,0],2] on node n'"
    )
    code, said = run(decode=f"{lost}; exit 0")
    assert (code, "rank 0 on n was lost with its host" in said) == (75, True)


def test_a_worker_that_was_drained_leaves_the_others(run: Run) -> None:
    code, said = run("decode-0: ended with 0", raise_signal(signal.SIGTERM), decode="exit 0")
    assert (code, "ending prefill-0" in said) == (143, True)


def test_a_launcher_that_calls_a_lost_host_success_is_not_believed(run: Run) -> None:
    ready = SERVE.split(";")[0]
    code, said = run(decode=f"{ready}; sleep 0.3; exit 0")
    assert (code, "decode-0: its launcher ended with 0" in said) == (75, True)
    # a folder whose file system is late to show that the file has gone
    last_line = "echo 'dynamo_mpi: rank 0 on n: exit: done after 1.0 s'"
    code, said = run(
        "decode-0: ended with 0", raise_signal(signal.SIGTERM), decode=f"{ready}; sleep 0.3; {last_line}; exit 0"
    )
    assert code == 143


def test_when_all_workers_have_ended_it_is_done(run: Run) -> None:
    code, said = run(prefill="exit 0", decode="exit 0")
    assert (code, "all workers have ended" in said) == (0, True)


def test_a_step_that_does_not_end_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_ender, "CANCEL_SECONDS", 0.2)
    monkeypatch.setattr(conductors, "SERVICES_STOP_SECONDS", 0.2)
    deaf = f"{SERVE.split(';')[0]}; trap '' TERM INT; while :; do sleep 0.1; done"
    code, said = run("", decode=deaf, prefill="sleep 0.3; exit 3")
    assert (code, "cancelling decode-0" in said) == (3, True)


def test_a_second_signal_does_not_wait(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_ender, "CANCEL_SECONDS", 0.2)
    slow = f"{SERVE.split(';')[0]}; trap 'sleep 30' TERM; while :; do sleep 0.1; done"

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    code, said = run(READY, twice, decode=slow)
    assert (code, "cancelling decode-0" in said) == (143, True)


def test_services_set_no_variable_of_workers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read the services file, which one variable names."""
    monkeypatch.setenv("ETCD_AUTH_PASSWORD", "of another etcd")
    seen = tmp_path / "seen"
    services = Steps.services.replace('"s"', '"s", "LD_AUDIT_": "x", "MODEL_NAME": "x"')
    run(READY, raise_signal(signal.SIGTERM), services=services, decode=f"env > {seen}; {SERVE}")
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert "PATH" in names
    assert not names & {"NATS_AUTH_PASSWORD", "ETCD_AUTH_PASSWORD", "LD_AUDIT_", "MODEL_NAME"}


def test_what_runs_is_described(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"

    def look() -> None:
        copy.write_text((tmp_path / "run" / "deployment.json").read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    run(READY, look)
    content = json.loads(copy.read_text())
    assert (content["schema"], content["pid"], content["model"]) == (1, os.getpid(), "m")
    assert [worker["name"] for worker in content["workers"]] == ["prefill-0", "decode-0"]


def test_a_folder_belongs_to_one_deployment(tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run")
    with pytest.raises(Exception, match="another deployment runs in"):
        RunDir(tmp_path / "run")
    first.close()
    RunDir(tmp_path / "run").close()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(Exception, match="others can write"):
        RunDir(tmp_path / "run")
