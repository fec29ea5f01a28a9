# SPDX-License-Identifier: Apache-2.0
"""A whole deployment by the project's scripts, inside an allocation of the real Slurm."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.dynamo.running import eventually
from tests.namespaces.processes import command_line

from .session import SlurmSession
from .stack import PROGRAMS

READY_SECONDS = 90.0


class Deployment:
    """A script of ours in the shell of ``salloc``, with its output in a file.

    Args:
        slurm: the cluster.
        folder: for the run folder and the output.
        command: what runs in the allocation.
        environment: that the user has set.
        nodes: of the allocation.
        options: of salloc, further ones.
    """

    def __init__(
        self,
        slurm: SlurmSession,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        nodes: int = 4,
        options: Sequence[str] = (),
    ) -> None:
        self.slurm, self.run_dir, self.log = slurm, folder / "run folder", folder / "launch.log"
        self.name = f"deployment-{folder.name}"
        salloc = ("salloc", f"--job-name={self.name}", f"--nodes={nodes}", "--exclusive", "--gpus-per-node=4")
        # as users who say it do: srun would take it for each of our steps
        command = (*salloc, "--ntasks-per-node=4", *options, *command)
        variables = {**environment, "DYN_MPI_RUN_DIR": str(self.run_dir)}
        with self.log.open("wb") as log:
            self.process = slurm.cluster.popen(
                command, environment=slurm.environment(variables), stdout=log, stderr=log
            )

    def text(self) -> str:
        """Return what salloc and the launcher have printed."""
        return self.log.read_text(errors="replace")

    def wait_for_text(self, words: str, seconds: float = READY_SECONDS) -> None:
        """Wait until ``words`` are in the output."""
        end = time.monotonic() + seconds
        while words not in self.text() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert words in self.text(), self.text()

    @property
    def url(self) -> str:
        """The frontend's address."""
        return str(json.loads((self.run_dir / "services.json").read_text())["url"])

    def post(self, body: Mapping[str, Any], host: str = "n1") -> tuple[int, str]:
        """Post a chat request on one of the nodes; return the HTTP status and the answer."""
        done = self.slurm.exec(sys.executable, PROGRAMS / "post_chat.py", self.url, json.dumps(body), host=host)
        status, _, answer = done.stdout.partition(" ")
        return int(status), answer

    @property
    def job(self) -> str:
        """Slurm's id of the job."""
        return self.slurm.exec("squeue", "--noheader", "--format=%A", f"--name={self.name}").stdout.strip()

    def steps(self) -> dict[str, str]:
        """Return the nodes of the job's steps by their names, without what distinguishes deployments."""
        text = self.slurm.exec("squeue", "--steps", "--noheader", f"--jobs={self.job}", "--format=%j|%N").stdout
        named = (line.partition("|") for line in text.splitlines())
        return {name.split("-", 2)[2]: nodes for name, _, nodes in named if name.startswith("dynmpi-")}

    def launcher(self) -> int:
        """Return the pid, on this machine, of the launcher itself."""
        return self.pids_of("login", "launch")[0]

    def pids_of(self, host: str, word: str) -> list[int]:
        """Return a host's processes that have a word in their command line, but for those that are about to become it (pdeathsig)."""
        return [
            pid
            for pid in self.slurm.pids(host)
            if word in (line := command_line(pid)) and not any("pdeathsig" in w for w in line)
        ]

    def left(self) -> list[list[str]]:
        """Return the command lines of Python, etcd and NATS that run on any node."""
        lines = [command_line(pid) for host in (*self.slurm.nodes, "login") for pid in self.slurm.pids(host)]
        names = ("python", "etcd", "nats-server", "srun")
        ours = (line for line in lines if line and "tests.slurm.cluster.inside" not in line)
        return [line for line in ours if Path(line[0]).name.startswith(names)]

    def assert_ended_in_order(self, *also: str) -> None:
        """Assert that no step was cancelled, and that nothing is left but logs, timelines, how it ended, and ``also``."""
        assert "cancelling" not in self.text()
        assert self.left() == []
        kept = {"ended.json", "lock", "logs", "ready", "services", "timeline", *also}
        assert {path.name for path in self.run_dir.iterdir()} == kept
        assert not list((self.run_dir / "ready").iterdir())

    def wait(self, seconds: float = 60) -> int:
        """Wait for salloc to end, and return the launcher's exit code, which is salloc's."""
        return self.process.wait(seconds)

    def stop(self) -> None:
        """End it, whatever it does, and wait until its nodes are free again."""
        self.slurm.exec("scancel", f"--name={self.name}")
        with contextlib.suppress(ProcessLookupError):
            self.process.end()
        eventually(lambda: not self.job, f"{self.name} is gone", 30)
