# SPDX-License-Identifier: Apache-2.0
"""A deployment of two workers with spare nodes on the real Slurm of the tests, under load, with a random fault every 30 to 90 s. It exits
with 1 unless `launch` brings each worker back, no client gets a wrong answer, or a truncated one that looks whole, memory stays flat, and
both workers serve at the end.

    python -m tests.bench.soak_recovery [--minutes 60] [--seed 1] [--threads 4] [--spares 3]

Faults: a rank is killed or stopped, and, as long as spares are left, a node is powered off or cut off. Needs root on Debian.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
from tests.bench.faults import note
from tests.bench.soak import LOAD, Requests
from tests.dynamo.running import eventually
from tests.namespaces.anchor import remove_leftovers
from tests.namespaces.processes import command_line
from tests.slurm.cluster.cluster import Cluster, why_unavailable
from tests.slurm.recovery import MODEL, RecoveringDeployment
from tests.slurm.session import SlurmSession
from tests.slurm.stack import OUR_MODULES

PAUSE_SECONDS = (30.0, 90.0)
SERVES_SECONDS = 180.0
# the head node is n1: its loss ends the deployment
KINDS = ("killed", "stopped", "off", "cut")
NODE_KINDS = ("off", "cut")
SAMPLE_SECONDS = 5.0
# of the second quarter's median, and beside it in MiB
GROWTH, GROWTH_MIB = 1.1, 20.0
_PARTS = {"launch": "login", "etcd": "n1", "nats-server": "n1", "dynamo.frontend": "n1"}


class Event(NamedTuple):
    """A fault.

    Args:
        kind: what happened.
        worker: to which worker.
        node: on which node.
        seconds: until the worker served again.
        began: when, in seconds since 1970.
    """

    kind: str
    worker: str
    node: str
    seconds: float
    began: float


@dataclass
class Memory:
    """Memory of the parts that live through all faults, over time, in MiB."""

    deployment: RecoveringDeployment
    samples: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in _PARTS})
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Read it until the end."""
        slurm = self.deployment.slurm
        pids = {
            part: pid
            for part, host in _PARTS.items()
            for pid in slurm.pids(host)
            if any(word == part or word.endswith(f"/{part}") for word in command_line(pid))
        }
        while not self.over.wait(SAMPLE_SECONDS):
            for part, pid in pids.items():
                if found := re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()):
                    self.samples[part].append(int(found[1]) / 1024)

    def lines(self) -> tuple[list[str], bool]:
        """Return what was seen, and whether it is flat; what wasn't seen isn't."""
        lines, is_flat = [], True
        for part, samples in self.samples.items():
            quarter = len(samples) // 4
            if not quarter:
                is_flat = False
                lines.append(
                    f"memory of {part}: TOO FEW SAMPLES ({len(samples)}): was it found, and the run long enough?"
                )
                continue
            early, late = (statistics.median(s) for s in (samples[quarter : 2 * quarter], samples[-quarter:]))
            fits = late <= early * GROWTH + GROWTH_MIB
            is_flat &= fits
            lines.append(f"memory of {part}: {early:.0f} MiB, at the end {late:.0f} MiB" + ("" if fits else ": GROWS"))
        return lines, is_flat


class Soak:
    """One run.

    Args:
        deployment: the deployment.
        dice: chooses.
    """

    def __init__(self, deployment: RecoveringDeployment, dice: random.Random) -> None:
        self.deployment, self.dice = deployment, dice
        self.events: list[Event] = []

    def strike(self) -> None:
        """Let one fault happen, and wait until its worker serves again."""
        has_spare = any(state in ("ready", "preparing") for state in self.deployment.spares().values())
        kind = self.dice.choice(KINDS if has_spare else KINDS[:2])
        worker = self.dice.choice(("agg-0", "agg-1"))
        slurm, nodes = self.deployment.slurm, self.deployment.nodes_of(worker)
        node = self.dice.choice([each for each in nodes if each != "n1" or kind not in NODE_KINDS])
        attempt, began = self.deployment.ready_file(worker)["attempt"], time.time()
        if kind == "off":
            slurm.kill_node(node)
        elif kind == "cut":
            slurm.switch_cable(node, on=False)
        else:
            self.deployment.kill(node, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        served = self.deployment.serves(worker, attempt + 1, SERVES_SECONDS)
        self.events.append(Event(kind, worker, node, served - began, began))
        note(f"{worker}: {kind} on {node}, serves again after {served - began:.1f} s")

    def table(self) -> list[str]:
        """Return the faults, as lines in Markdown."""
        lines = ["| fault | times | serving again: median, worst |", "|---|---|---|"]
        for kind in KINDS:
            if seconds := [event.seconds for event in self.events if event.kind == kind]:
                lines.append(f"| {kind} | {len(seconds)} | {statistics.median(seconds):.1f} s, {max(seconds):.1f} s |")
        return lines


def request_lines(requests: Requests, events: Sequence[Event]) -> tuple[list[str], bool]:
    """Return what clients got, and whether no answer was wrong and none failed without a fault."""
    kinds = collections.Counter(row["kind"] for row in requests.rows)
    # the frontend may route to a worker for a moment after it serves
    spans = [(event.began - 1.0, event.began + event.seconds + 15.0) for event in events]
    failed = [row for row in requests.rows if row["kind"] == "failed"]
    strange = [row for row in failed if not any(row["began"] < end and row["ended"] > begin for begin, end in spans)]
    wrong = [row for row in requests.rows if row["kind"] == "wrong"]
    lines = [
        f"{len(requests.rows)} requests: {kinds['right']} whole and right, {len(wrong)} wrong or truncated, {len(failed)} failed with an "
        f"error, {len(strange)} of them without a fault",
        *(f"  {row}" for row in (*wrong[:5], *strange[:5])),
    ]
    return lines, not wrong and not strange and kinds["right"] > 0


def main() -> int:
    """Run it, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long faults happen (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of faults (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=4, help="requests at once (default: %(default)s)")
    parser.add_argument("--spares", type=int, default=3, help="spare nodes (default: %(default)s)")
    arguments = parser.parse_args()
    if reason := why_unavailable():
        note(f"no Slurm cluster: {reason}")
        return 2
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix="soak-recovery-"))
    cluster = Cluster.temporary(nodes=4 + arguments.spares, node_timeout=60)
    deployment = None
    try:
        model = export_model(find_default_gguf(), folder / "model")
        cluster.up(die_with_parent=True)
        words = ("--max-restarts", "1000")
        slurm = SlurmSession(cluster, Path("/nonexistent"))
        deployment = RecoveringDeployment(
            slurm, folder, model, arguments.spares, words, {"DYN_ROUTER_MODE": "round-robin"}
        )
        deployment.all_ready(300)
        return _run(deployment, arguments)
    finally:
        if deployment is not None:
            (Path(tempfile.gettempdir()) / "soak-recovery.log").write_text(deployment.text())
            deployment.stop()
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


def _run(deployment: RecoveringDeployment, arguments: argparse.Namespace) -> int:
    command = (sys.executable, LOAD, deployment.url.rpartition("/")[2], MODEL, str(arguments.threads))
    process = deployment.slurm.cluster.popen(
        command, host="n1", environment=deployment.slurm.environment(OUR_MODULES), stdin=subprocess.PIPE
    )
    deployment.clients.append(process)
    requests, memory = Requests(process), Memory(deployment)
    readers = [threading.Thread(target=work, daemon=True) for work in (requests.read, memory.watch)]
    for reader in readers:
        reader.start()
    assert requests.has_references.wait(300), "the load got no references"
    soak = Soak(deployment, random.Random(arguments.seed))  # noqa: S311 - no secret
    end = time.monotonic() + 60 * arguments.minutes
    while (pause := soak.dice.uniform(*PAUSE_SECONDS)) < end - time.monotonic():
        time.sleep(pause)  # under load, there is nothing to wait for
        soak.strike()
    right = sum(row["kind"] == "right" for row in requests.rows)
    eventually(lambda: sum(row["kind"] == "right" for row in requests.rows) > right + 5, "it answers at the end", 60)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    readers[0].join(120)
    memory.over.set()
    readers[1].join(30)
    serve = all(deployment.ready_file(worker) for worker in ("agg-0", "agg-1"))
    answers, is_right = request_lines(requests, soak.events)
    memories, is_flat = memory.lines()
    lines = [*soak.table(), "", *answers, *memories, f"at the end both workers {'serve' if serve else 'DO NOT serve'}"]
    lines.append(f"left out: {', '.join(deployment.excluded()) or 'no node'}")
    print("\n".join(lines), flush=True)
    os.kill(deployment.launcher(), signal.SIGINT)
    return 0 if is_right and is_flat and serve and deployment.wait(120) == 130 else 1


if __name__ == "__main__":
    sys.exit(main())
