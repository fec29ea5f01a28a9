# SPDX-License-Identifier: Apache-2.0
"""A worker under srun and what it needs beside it: etcd on the login node's address, the frontend on that node's loopback."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_mpi.deploy.programs import find_etcd
from dynamo_mpi.deploy.services import Etcd, Frontend
from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.namespaces.commands import InsideProcess
from tests.namespaces.processes import command_line

from .cluster.settings import LOGIN
from .session import SlurmSession

PROGRAMS = Path(__file__).with_name("programs")
WORKER = (sys.executable, "-m", "dynamo_mpi.worker")
OUR_MODULES = {"PYTHONPATH": str(ROOT)}
# the login node's network is its own: no port of it is taken
ETCD_PORT, FRONTEND_PORT = 2379, 8000


@dataclass(frozen=True)
class Stack:
    """etcd and the frontend, running on the login node of ``slurm``."""

    slurm: SlurmSession
    etcd: Etcd
    frontend: Frontend

    @property
    def environment(self) -> Mapping[str, str]:
        """What ranks need to find Dynamo, and our modules."""
        return {**self.frontend.discovery, **OUR_MODULES, "DYN_LOG": "error"}

    def keys(self) -> list[str] | None:
        """Return the keys that Dynamo has in etcd; None while etcd doesn't answer."""
        done = self.slurm.exec(sys.executable, PROGRAMS / "etcd_keys.py", self.etcd.url)
        return done.stdout.split() if done.returncode == 0 else None

    def ask(self, model: str, text: str, max_tokens: int) -> InsideProcess:
        """Start a chat completion on the login node: ``programs/ask_frontend.py`` says what it prints."""
        words = (str(self.frontend.port), model, str(max_tokens), text)
        return self.slurm.popen(sys.executable, PROGRAMS / "ask_frontend.py", *words, env=OUR_MODULES)


@contextmanager
def running_stack(slurm: SlurmSession, folder: Path) -> Iterator[Stack]:
    """Run etcd and the frontend until the block ends.

    Args:
        slurm: the cluster.
        folder: for their logs and etcd's data.
    """
    etcd = Etcd(find_etcd(), ETCD_PORT, folder / "etcd", host=slurm.addresses[LOGIN])
    frontend = Frontend(FRONTEND_PORT, {"ETCD_ENDPOINTS": etcd.url, "DYN_REQUEST_PLANE": "tcp"})
    stack = Stack(slurm, etcd, frontend)
    with ExitStack() as services:
        for service in (etcd, frontend):
            with (folder / f"{service.name}.log").open("wb") as log:
                environment = slurm.environment({**stack.environment, **service.environment()})
                process = slurm.cluster.popen(service.command(), environment=environment, stdout=log, stderr=log)
            services.callback(process.end)
            if service is etcd:  # or else the frontend waits longer for it than it needs to start
                eventually(lambda: stack.keys() is not None, "etcd answers", 20)
        yield stack


def answer_of(asking: InsideProcess, seconds: float = 60) -> dict[str, Any]:
    """Wait for a completion and return the whole answer, as ``dynamo_mpi.deploy.local.ask.Answer`` has it."""
    out, err = asking.communicate(timeout=seconds)
    assert asking.returncode == 0, err
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


class SlurmWorker:
    """``srun python -m dynamo_mpi.worker`` as a job of its own, with its output in a file.

    Args:
        slurm: the cluster.
        folder: for the ready file and the output.
        options: srun's.
        flags: the worker's.
        environment: of the ranks.
    """

    def __init__(
        self,
        slurm: SlurmSession,
        folder: Path,
        options: Sequence[str],
        flags: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self._slurm = slurm
        self.ready_file, self.log = folder / "ready.json", folder / "worker.log"
        self.name = f"worker-{folder.name}"
        command = ("srun", f"--job-name={self.name}", *options, *WORKER, *flags, "--ready-file", str(self.ready_file))
        with self.log.open("wb") as log:
            self.process = slurm.cluster.popen(
                command, environment=slurm.environment(environment), stdout=log, stderr=log
            )

    def text(self) -> str:
        """Return what srun and the ranks have printed."""
        return self.log.read_text(errors="replace")

    def wait_for_text(self, words: str, seconds: float = 60) -> None:
        """Wait until ``words`` are in the output."""
        eventually(lambda: words in self.text() or self._ended(), f"{words!r} in the output", seconds)
        assert words in self.text(), self.text()

    def ready(self, seconds: float = 60) -> dict[str, Any]:
        """Wait for the ready file and return what is in it."""
        try:
            eventually(lambda: self.ready_file.exists() or self._ended(), "the ready file", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None
        assert self.ready_file.exists(), self.text()
        content: dict[str, Any] = json.loads(self.ready_file.read_text())
        return content

    def _ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def job(self) -> str:
        """Slurm's id of the job; its step 0 is the worker."""
        return self._slurm.exec("squeue", "--noheader", "--format=%A", f"--name={self.name}").stdout.strip()

    def ranks(self) -> dict[str, list[int]]:
        """Return the ranks' pids on this machine by node, for the nodes that have any."""
        return self.processes(WORKER)

    def processes(self, begin: Sequence[str]) -> dict[str, list[int]]:
        """Return the pids on this machine of the processes whose command line begins so, by node."""
        found = {}
        for node in self._slurm.nodes:
            pids = [pid for pid in self._slurm.pids(node) if command_line(pid)[: len(begin)] == list(begin)]
            if pids:
                found[node] = pids
        return found

    def wait(self, seconds: float = 40) -> int:
        """Wait for srun to end, and return its exit code."""
        return self.process.wait(seconds)

    def stop(self) -> None:
        """End it, and wait until its nodes are free again."""
        self._slurm.exec("scancel", "--signal=KILL", f"--name={self.name}")
        with contextlib.suppress(ProcessLookupError):
            self.process.end()
        eventually(lambda: not self.job, f"{self.name} is gone")
