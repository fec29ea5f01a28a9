# SPDX-License-Identifier: Apache-2.0
"""A deployment with a spare node on the real Slurm, to which faults happen, and what is seen of it meanwhile; for tests and the bench.

Two workers of two nodes each, a rank on each node, the reference engine: ``agg-0`` on n1 (the head node) and n2, ``agg-1`` on n3 and n4, from
which faults take away; spares from n5 on. Streams of ``agg-0`` are open all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.namespaces.commands import InsideProcess
from tests.namespaces.processes import children_of

from .deployment import Deployment
from .session import SlurmSession
from .stack import OUR_MODULES, PROGRAMS

HEARTBEAT = 3.0
MODEL = "tiny"
WORKERS = {"agg-0": ("n1", "n2"), "agg-1": ("n3", "n4")}
# of a stream of another worker, from one piece to the next
LONGEST_STALL = 1.0
RANK = "dynamo_mpi.worker"
DIED, HUNG, LOST = "died", "is stopped or stuck", "is lost"
_BLAMED = re.compile(
    rf"(?:error in \w+: |: )(rank \d+ on \w+)(?:: error in \w+:)? ({DIED}|{HUNG}|{LOST}|was killed by signal \d+)"
)


def write_model(folder: Path) -> Path:
    """Write a llama of two layers, one for each of two pipeline stages; return its folder."""
    from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
    from tests.tiny_llama import write_tiny_gguf

    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_gguf(find_default_gguf(), folder / "tiny.gguf", layers=2)
    return export_model(folder / "tiny.gguf", folder / "model")


def settings(slurm: SlurmSession, model: Path, config: Path, spares: int) -> dict[str, str]:
    """Return the environment of the launcher."""
    config.write_text("tensor_parallel_size: 1\npipeline_parallel_size: 2\nmax_seq_len: 2048\n")
    return {
        **slurm.debian_openmpi_env,
        # the nodes share this machine's cores and don't know
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMP_NUM_THREADS": "1",
        "DYN_LOG": "error",
        # to the worker that a request names
        "DYN_ROUTER_MODE": "direct",
        "MODEL_PATH": str(model),
        "SERVED_MODEL_NAME": MODEL,
        "NUM_GPUS_PER_NODE": "1",
        "NUM_NODES": "2",
        "NUM_WORKERS": "2",
        "NUM_SPARE_NODES": str(spares),
        "ENGINE_CONFIG": str(config),
        "DYN_MPI_ENGINE": "reference",
        "PYTHON": sys.executable,
        "DYN_MPI_PYTHON": sys.executable,
    }


class Seen(NamedTuple):
    """A moment.

    Args:
        text: the launcher's output until then.
        time: in seconds since 1970.
    """

    text: str
    time: float


class RecoveringDeployment(Deployment):
    """The deployment.

    Args:
        slurm: the cluster, of at least 4 + ``spares`` nodes.
        folder: for its files.
        model: the model's folder.
        spares: number of spare nodes.
        words: further flags of `launch`.
        environment: further variables.
    """

    def __init__(
        self,
        slurm: SlurmSession,
        folder: Path,
        model: Path,
        spares: int = 1,
        words: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        used = 4 + spares
        words = ("--nodes", ",".join(slurm.nodes[:used]), *words)
        variables = {**settings(slurm, model, folder / "engine.yaml", spares), **(environment or {})}
        command = (str(ROOT / "scripts" / "srun_aggregated.sh"), "--skip-check", *words)
        command = (*command, "--", "--heartbeat-timeout", str(HEARTBEAT))
        super().__init__(slurm, folder, command, variables, len(slurm.nodes), ("--no-kill",))
        self.clients: list[InsideProcess] = []

    def record(self) -> str:
        """Return the launcher's output and its workers' logs, for a failed test."""
        logs = sorted((self.run_dir / "logs").glob("agg-*.log"))
        return "\n".join([self.text(), *(f"{log.name}:\n{log.read_text(errors='replace')[-8000:]}" for log in logs)])

    # -- what is seen -------------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """Return ``deployment.json``; empty if there is none."""
        try:
            return dict(json.loads((self.run_dir / "deployment.json").read_text()))
        except (OSError, ValueError):
            return {}

    def nodes_of(self, worker: str) -> tuple[str, ...]:
        """Return the nodes that a worker has now."""
        return next(tuple(w["nodes"]) for w in self.description()["workers"] if w["name"] == worker)

    def spares(self) -> dict[str, str]:
        """Return the spares' states by node."""
        return {spare["node"]: spare["state"] for spare in self.description().get("spares", [])}

    def excluded(self) -> dict[str, str]:
        """Return the nodes that are left out, and why."""
        try:
            content = json.loads((self.run_dir / "excluded.json").read_text())
        except OSError:
            return {}
        return {each["node"]: each["reason"] for each in content["nodes"]}

    def ready_file(self, worker: str) -> dict[str, Any]:
        """Return a worker's ready file; empty if it doesn't serve."""
        try:
            return dict(json.loads((self.run_dir / "ready" / f"{worker}.json").read_text()))
        except (OSError, ValueError):
            return {}

    def serves(self, worker: str, attempt: int, seconds: float = 60.0) -> float:
        """Wait until a worker's start with that number, or a later one, serves; return when it did."""

        def look() -> float:
            if self.process.poll() is not None:
                raise AssertionError(f"the launcher has ended:\n{self.text()}")
            content = self.ready_file(worker)
            return time.time() if content.get("attempt", 0) >= attempt else 0.0

        try:
            return eventually(look, f"{worker} serves", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def all_ready(self, seconds: float = 90.0) -> None:
        """Wait until both workers serve, the model is listed, and the spares are ready."""
        self.wait_for_text(f"ready: {MODEL}. Try:", seconds)
        eventually(lambda: self.spares() and "preparing" not in self.spares().values(), "the spares are ready", 60)
        assert set(self.spares().values()) == {"ready"}, self.text()

    def blamed(self) -> set[tuple[str, str]]:
        """Return all ranks with their hosts that a report of the ranks, a node agent, or the launcher names, each with how it ended."""
        return set(_BLAMED.findall(self.text()))

    def status(self) -> dict[str, Any]:
        """Return what `dynamo-mpi status` knows."""
        words = (sys.executable, "-m", "dynamo_mpi", "status", "--output", "json", "--run-dir", self.run_dir)
        done = self.slurm.exec(*words, env=OUR_MODULES, host="n1")
        return dict(json.loads(done.stdout))

    def rank(self, node: str) -> int:
        """Return the pid, on this machine, of the node's rank, which has a forked node agent."""
        pids = self.pids_of(node, RANK)
        forked = {child for pid in pids for child in children_of(pid)}
        (pid,) = [pid for pid in pids if pid not in forked]
        return pid

    def instances(self) -> dict[str, str]:
        """Return the hosts of the workers that have a record in etcd, by their ids in Dynamo."""
        return {str(w["instance"]): ",".join(w["hosts"]) for w in self.status()["workers"]}

    def instance(self, worker: str) -> str:
        """Return a worker's id in Dynamo."""
        hosts = ",".join(self.nodes_of(worker))
        return next(instance for instance, each in self.instances().items() if each == hosts)

    # -- what happens -------------------------------------------------------------------------------------------------

    def streams(self, worker: str = "agg-0", count: int = 2) -> OpenStreams:
        """Keep streams of a worker open until they are closed."""
        words = (sys.executable, PROGRAMS / "keep_streams.py", self.url, MODEL, self.instance(worker), str(count))
        process = self.slurm.cluster.popen(
            words, host="n1", environment=self.slurm.environment(OUR_MODULES), stdin=subprocess.PIPE
        )
        self.clients.append(process)
        return OpenStreams(process)

    def kill(self, node: str, number: int) -> float:
        """Signal the node's rank; return when."""
        now = time.time()
        os.kill(self.rank(node), number)
        return now

    def stop(self) -> None:
        """End it; a job with a lost node takes its time, and ends with its cluster."""
        for client in self.clients:
            client.end()
        self.slurm.exec("scancel", f"--name={self.name}")
        with contextlib.suppress(ProcessLookupError):
            self.process.end()


class OpenStreams:
    """Streams of one worker.

    Args:
        process: ``keep_streams.py``.
    """

    def __init__(self, process: InsideProcess) -> None:
        self._process, self._rows = process, list[dict[str, Any]]()
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line == "open", (line, process.stderr.read() if process.stderr else "")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._rows += [json.loads(line) for line in self._process.stdout]

    def close(self, seconds: float = 60.0) -> list[dict[str, Any]]:
        """Let them end; return what was seen of each."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.stdin = None
        self._reader.join(seconds)
        self._process.wait(seconds)
        return self._rows

    def require_undisturbed(self) -> float:
        """Let them end; return the longest wait for a piece.

        Raises:
            AssertionError: one failed, or stalled.
        """
        rows = self.close()
        assert rows, "no stream has ended"
        failed = [row for row in rows if row["end"] != "done"]
        assert not failed, failed
        longest = max(row["longest_wait"] for row in rows)
        assert longest < LONGEST_STALL, rows
        return float(longest)
